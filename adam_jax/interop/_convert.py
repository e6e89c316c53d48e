"""Conversion of states between optimizers and storage formats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._engine import split_params
from adam_jax._engine.state import moment_fields, moments, named_tuples, state_class
from adam_jax._engine.transformation import links_of
from adam_jax._util import errors
from adam_jax._util.numerics import abs_sq, arithmetic_dtype
from adam_jax._util.typing import PyTree
from adam_jax.storage import _moments
from adam_jax.storage._reduced import divide_by_mean
from adam_jax.transforms.gradient_release import GradientRelease

COUNTS = ("count", "t", "step_count")

Kind: TypeAlias = frozenset[str] | type
"""A state's moment names, or its class if it has none; states of one kind are convertible."""


def convert_state(
    state: PyTree, tx: optax.GradientTransformation | GradientRelease, params: optax.Params
) -> PyTree:
    """Convert a running state to the storage formats and structure of `tx`, to continue the run.

    The state may have other formats, or come from another chain, `optax.inject_hyperparams`,
    Optax's Adafactor, or Optax's optimizer of the same variant. The moments of both states must
    have the same names, except those of Adafactor and of centered RMSprop. They are decoded and
    encoded as in `tx`, rounded to nearest, or down for running maxima. The new state has the old
    step counts. Other parts of the state of `tx` (Schedule-Free's z, a chain's other states) are
    copied if `state` has them, and are new otherwise.

    Args:
      state: the state of a running optimizer, Optax's or ours, or `nnx.Optimizer.opt_state`.
      tx: the optimizer or the `gradient_release` step that continues the run.
      params: the parameters, or any tree with their structure, shapes, and dtypes.

    Returns:
      a state for `tx`.

    Raises:
      ValueError: the moments of `tx` have other names or shapes; the message lists them.

    >>> import adam_jax, jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones((64, 128))}
    >>> running = optax.adamw(1e-3).init(params)
    >>> tx = adam_jax.adamw(1e-3, storage="int8")
    >>> convert_state(running, tx, params)[0].mu.codes["w"].dtype
    dtype('int8')
    """
    with errors.error_context("convert_state"):
        inner = tx.tx if isinstance(tx, GradientRelease) else tx
        errors.transformation("tx", inner, "convert_state(state, tx, params)")
        fresh = tx.init(params)
        wanted = {_kind(s) for _, s in named_tuples(fresh)}
        donors: dict[Kind, list[PyTree]] = {}
        for _, s in named_tuples(state):
            s = _recentered(_from_adafactor(s, wanted, params), wanted)
            donors.setdefault(_kind(s), []).append(s)
        declared = [moment for _, link in links_of(inner) for moment in link.rule.moments.items()]
        maxima = {name for name, moment in declared if moment.round_down}
        encode = functools.partial(_moment, params, maxima)
        converted = _convert(fresh, donors, _first_count(state), encode)
        unused = [sorted(kind) for kind, s in donors.items() if s and isinstance(kind, frozenset)]
        if unused:
            errors.not_convertible(unused, "which tx has no place for")
        return converted


def _kind(state: PyTree) -> Kind:
    return frozenset(moment_fields(state)) or type(state)


def _from_adafactor(state: PyTree, wanted: Collection[Kind], params: optax.Params) -> PyTree:
    """Convert the state of Optax's Adafactor to Adam's or RMSprop's, if `wanted` has one.

    nu is the outer product of rows and columns, divided by their mean; leaves that aren't factored
    are copied. mu starts at 0, because Adafactor has none.
    """
    forms = [frozenset({"mu", "nu"}), frozenset({"nu"})]
    form = next((form for form in forms if form in wanted), None)
    if not isinstance(state, optax.FactoredState) or form is None or type(state) in wanted:
        return state

    def nu(p: jax.Array, row: jax.Array, column: jax.Array, full: jax.Array) -> jax.Array:
        if full.shape == p.shape:
            return full
        *_, d1, d0 = np.argsort(p.shape)  # row is the mean over d0, column over d1
        row, column = jnp.expand_dims(row, d0), jnp.expand_dims(column, d1)
        return divide_by_mean(row, d1) * column

    moments = {"nu": jax.tree.map(nu, params, state.v_row, state.v_col, state.v)}
    if "mu" in form:
        moments = {"mu": jax.tree.map(jnp.zeros_like, params), **moments}
    return state_class(tuple(moments), True)(count=state.count, **moments)


def _recentered(state: PyTree, wanted: Collection[Kind]) -> PyTree:
    """Convert centered RMSprop's nu to the variance nu - mu², or back, if `wanted` has it."""
    forms = frozenset({"mu", "nu"}), frozenset({"mu", "variance"})
    kind = _kind(state)
    if kind not in forms or kind in wanted or not any(form in wanted for form in forms):
        return state
    old, new, sign = ("nu", "variance", -1) if kind == forms[0] else ("variance", "nu", 1)
    values, count = moments(state), _first_count(state)
    other = jax.tree.map(lambda m, v: v + sign * abs_sq(m), values["mu"], values[old])
    fresh = state_class(("mu", new), count is not None)
    counted = {name: jnp.zeros([], jnp.int32) if count is None else count for name in COUNTS}
    counted = {name: x for name, x in counted.items() if name in fresh._fields}
    return fresh(**counted, mu=values["mu"], **{new: other})


def _convert(
    node: PyTree,
    donors: dict[Kind, list[PyTree]],
    count: jax.Array | None,
    encode: Callable[[str, PyTree, PyTree], PyTree],
) -> PyTree:
    """Fill a fresh state, or a container of them, with values from `donors`.

    encode(name, moment, like) returns a moment in the formats of `like`.
    """

    def convert(fresh: PyTree) -> PyTree:
        if not hasattr(fresh, "_fields"):
            return fresh
        kind = _kind(fresh)
        donor = donors[kind].pop(0) if donors.get(kind) else None
        if donor is None and isinstance(kind, frozenset):
            left = (k for k, s in donors.items() if s and isinstance(k, frozenset))
            held = "; ".join(", ".join(sorted(k)) for k in left)
            why = f"which tx needs together: the state has {held or 'no others'}"
            errors.not_convertible([sorted(kind)], why)
        fields = moment_fields(fresh)
        new = {}
        for name in fresh._fields:
            old = getattr(fresh, name)
            # check _fields, because every tuple has a method `count`
            given = getattr(donor, name) if name in getattr(donor, "_fields", ()) else None
            copied = given is not None and name not in COUNTS and not named_tuples(old)
            if name in fields or copied:
                new[name] = encode(name, given, old)
            elif name in COUNTS:
                given = count if given is None else jax.tree.leaves(given)[0]
                new[name] = old if given is None else jnp.asarray(given, old.dtype)
            else:
                new[name] = _convert(old, donors, count, encode)
        return type(fresh)(**new)

    return jax.tree.map(convert, node, is_leaf=lambda x: hasattr(x, "_fields"))


def _moment(
    params: PyTree, maxima: Collection[str], name: str, given: PyTree, old: PyTree
) -> PyTree:
    """Encode the values of `given` in the formats of `old`; round down if `maxima` has the name."""
    given_leaves, old_leaves = _moments.leaves(given, params), _moments.leaves(old, params)
    if given_leaves.keys() != old_leaves.keys():
        missing, extra = (
            [path for path, _ in sorted(keys)[:5]]
            for keys in (
                old_leaves.keys() - given_leaves.keys(),
                given_leaves.keys() - old_leaves.keys(),
            )
        )
        errors.not_convertible(
            [[name]], f"whose parameters differ: missing {missing}, unexpected {extra}"
        )
    for key, x in old_leaves.items():
        shape = jnp.shape(_moments.whole(x, _moments.shape_of(given_leaves[key])))
        got = jnp.shape(_moments.whole(given_leaves[key], shape))
        if got != shape:
            errors.not_convertible([[name]], f"whose {key[0]!r} has shape {got}, but {shape} in tx")
    new = [_recode(name, name in maxima, given_leaves[key], x) for key, x in old_leaves.items()]
    return _moments.with_leaves(old, new)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _recode(name: str, round_down: bool, x: PyTree, like: PyTree) -> PyTree:
    stored_dtype = getattr(like, "dtype", jnp.float32)
    if name == "rest" and jnp.issubdtype(stored_dtype, jnp.integer):  # master weights' residual
        return split_params.residual_as(x, like.dtype)
    dtype = arithmetic_dtype(*_moments.dtypes((x, like)))
    values = _moments.read(x, dtype)
    shape = jnp.broadcast_shapes(values.shape, _moments.shape_of(like))
    return _moments.encode(jnp.broadcast_to(values, shape), like, None, round_down=round_down)


def _first_count(state: PyTree) -> jax.Array | None:
    """Return the first step count in a state."""
    for _, s in named_tuples(state):
        for name in COUNTS:
            if name in getattr(s, "_fields", ()):
                return jax.tree.leaves(getattr(s, name))[0]
    return None

"""Running states from elsewhere: another optimizer's, another storage format's."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from adam_jax import checks, storage
from adam_jax.arithmetic import arithmetic_dtype
from adam_jax.states import moment_fields, named_tuples

COUNTS = ("count", "t", "step_count")


def convert_state(
    state: chex.ArrayTree, tx: optax.GradientTransformation, params: optax.Params
) -> chex.ArrayTree:
    """A running state in the formats and the layout of `tx`: to go on with it from there.

    From float32 to int8 or back, out of another chain or `optax.inject_hyperparams`, from Optax's
    optimizer to ours of the same variant: moments are found by their names, decoded, and encoded as
    `tx` keeps them, to the nearest. Step counts are taken over; what `tx` has beside them and the
    state has too (Schedule-Free's z, a chain's other states) is copied, and the rest starts anew.

    Args:
      state: the state of a running optimizer, Optax's or ours, or `nnx.Optimizer.opt_state`.
      tx: the optimizer to go on with.
      params: the parameters, or anything of their structure, shapes and dtypes.

    Returns:
      a state for `tx`.

    Raises:
      ValueError: the moments are not those of `tx`, or have other shapes; says which.

    >>> import adam_jax, jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones((64, 128))}
    >>> running = optax.adamw(1e-3).init(params)
    >>> tx = adam_jax.adamw(1e-3, storage="int8")
    >>> convert_state(running, tx, params)[0].mu.codes["w"].dtype
    dtype('int8')
    """
    with checks.naming("convert_state"):
        fresh = tx.init(params)
        donors: dict[Any, list[Any]] = {}
        for _, s in named_tuples(state):
            donors.setdefault(_kind(s), []).append(s)
        converted = _convert(fresh, donors, _any_count(state))
        left = [kind for kind, unused in donors.items() if unused and isinstance(kind, frozenset)]
        if left:
            checks.not_convertible(map(sorted, left), "which tx does not keep")
        return converted


def _kind(s: Any) -> Any:
    """What makes two states one transformation's: the names of their moments, or their class."""
    return frozenset(moment_fields(s)) or type(s)


def _convert(node: Any, donors: dict[Any, list[Any]], steps: Any) -> Any:
    """A fresh state, or a container of some, with what the donors have in its place."""
    if not hasattr(node, "_fields"):
        if isinstance(node, (tuple, list)):
            return type(node)(_convert(x, donors, steps) for x in node)
        if isinstance(node, dict):
            return {k: _convert(x, donors, steps) for k, x in node.items()}
        return node
    kind = _kind(node)
    donor = donors[kind].pop(0) if donors.get(kind) else None
    if donor is None and isinstance(kind, frozenset):
        checks.not_convertible([sorted(kind)], "which the state does not have")
    new = {}
    for name in node._fields:
        mine, given = getattr(node, name), getattr(donor, name, None)
        if name in moment_fields(node):
            new[name] = _moment(name, given, mine)
        elif name in COUNTS:
            given = steps if given is None else jax.tree.leaves(given)[0]
            new[name] = mine if given is None else jnp.asarray(given, mine.dtype)
        elif named_tuples(mine) or given is None:
            new[name] = _convert(mine, donors, steps)
        else:
            new[name] = _moment(name, given, mine)
    return type(node)(**new)


def _moment(name: str, given: Any, mine: Any) -> Any:
    """A moment's values, read from one state, as another keeps them."""
    theirs, ours = storage.leaves(given), storage.leaves(mine)
    if set(theirs) != set(ours):
        missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        checks.not_convertible(
            [[name]], f"for other parameters: without {missing[:5]}, and beside them {extra[:5]}"
        )
    new = []
    for path, old in ours.items():
        x, shape = theirs[path], jnp.shape(storage.codes_of(old))
        if jnp.shape(storage.codes_of(x)) != shape:
            got = jnp.shape(storage.codes_of(x))
            checks.not_convertible([[name]], f"of {path!r} in shape {got} where tx has {shape}")
        new.append(_recode(name, x, old))
    return storage.with_leaves(mine, new)


@functools.partial(jax.jit, static_argnums=0)
def _recode(name: str, x: Any, like: Any) -> Any:
    dtype = arithmetic_dtype(*storage.dtypes((x, like)))
    return storage.encode(name, storage.decode(x, dtype), like, None)


def _any_count(state: Any) -> Any:
    """The first step count in a state; None where there is none."""
    for _, s in named_tuples(state):
        for name in COUNTS:
            if name in getattr(s, "_fields", ()):
                return jax.tree.leaves(getattr(s, name))[0]
    return None

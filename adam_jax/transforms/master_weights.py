"""Master weights and stochastic rounding for bfloat16 parameters.

Plain bfloat16 parameters lose updates below half an ulp, which is up to 1/256 of the parameter. The
wrappers here go around everything that computes updates. They emit float32 differences, which
`optax.apply_updates` turns into exact parameters if nothing changes the differences.
`optax.apply_updates` copies the parameters; `adam_jax.apply` updates them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._engine.apply import step
from adam_jax._engine.chain import Tree
from adam_jax._engine.split_params import SplitParam, is_split, to_arithmetic, value
from adam_jax._engine.state import named_tuples
from adam_jax._engine.transformation import Transformation, describe, is_exact, transformation_of
from adam_jax._util import errors
from adam_jax._util.paths import is_box, map_with_path, unbox
from adam_jax._util.typing import DType, KeyPath, PyTree

REST = {32: jnp.int16, 24: jnp.int8}
"""The dtype of the residual, by the bits of a master."""


class MasterWeightsState(NamedTuple):
    """The state of `master_weights`."""

    step_count: jax.Array
    rest: PyTree
    """The residual of each bfloat16 parameter; one zero for others."""
    inner_state: optax.OptState


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`."""

    step_count: jax.Array
    inner_state: optax.OptState


def master_weights(tx: optax.GradientTransformation, bits: int = 32) -> Transformation:
    """Keep float32 master weights: bfloat16 parameters, and their lower bits in the state.

    The inner transformation receives the masters as its parameters and updates them. The outer
    parameters are the masters, rounded. With bits=32, the run equals a float32 run to the bit, and
    the lower bits (the residual) take 2 bytes per parameter. With bits=24, they take 1 byte:
    masters are rounded stochastically to 16 significant bits, with a relative error below 2⁻¹⁵ per
    step and zero on average.

    Leaves of other dtypes pass through, including float16: a residual can't extend its range.

    Put it around everything that computes updates, such as `optax.chain(optax.clip(1.0), ...)`.
    Only wrappers that pass updates through unchanged may go around it, such as `zero1`, `groups`,
    `optax.MultiSteps`, `optax.apply_if_finite`, and a Flax optimizer. `optax.apply_if_finite` needs
    gradients cast to the updates' dtype, float32.

    `optax.apply_updates` is exact if the new parameter is 0 or at least 2⁻¹⁵ of the old one's size.
    Otherwise, its float32 addition may give a neighboring value, and the residual is relative to
    that value. `adam_jax.apply` always gives the nearest value. Numbers below 2⁻¹²⁶ count as 0.
    Source: FlashOptim (2026), arXiv:2602.23349; computing the residual after the addition is ours.

    Args:
      tx: any Optax transformation; adam_jax optimizers make no float32 copies.
      bits: 32 or 24, the bits of a master, including its parameter's 16.

    Returns:
      a transformation whose updates are float32 for bfloat16 parameters, and whose state is a
      `MasterWeightsState`.

    Raises:
      ValueError: bits isn't 32 or 24; at init, a leaf is float64; at update, params are missing or
        don't match init.

    >>> import adam_jax, jax.numpy as jnp, optax
    >>> tx = master_weights(adam_jax.adamw(1e-4), bits=24)
    >>> params = {"w": jnp.ones(4, jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": jnp.ones(4, jnp.bfloat16)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"][0], get_master_weights(params, state)["w"].dtype
    (Array(1, dtype=bfloat16), dtype('float32'))
    """
    with errors.error_context("master_weights"):
        errors.number_of("bits", bits, list(REST))
    residual_dtype = REST[bits]

    def init(params: PyTree) -> MasterWeightsState:
        with errors.error_context("master_weights"):
            map_with_path(errors.no_wider_than_float32, params)
            rest = jax.tree.map(lambda p: _zero_residual(p, residual_dtype), params, is_leaf=is_box)
            return MasterWeightsState(jnp.zeros([], jnp.int32), rest, tx.init(_to_float32(params)))

    return _wrap(tx, "master_weights", f"bits={bits}", init, residual_dtype)


def stochastic_rounding(tx: optax.GradientTransformation, seed: int = 0) -> Transformation:
    """Round bfloat16 parameters stochastically, so that no update is lost on average.

    p + u is rounded to one of its two bfloat16 neighbors, the nearer one more often, so that the
    mean is p + u. The only state is a step count. Parameters keep the rounding noise of 8
    significant bits. The inner transformation receives parameters and gradients in float32, and
    its updates stay float32. Random bits are a hash of seed, path, step, and position, independent
    of replica and sharding. For its place in a chain and the leaves that pass through, see
    `master_weights`.

    Args:
      tx: any Optax transformation.
      seed: an integer from 0 to 2³² - 1.

    Returns:
      a transformation whose updates are float32 for bfloat16 parameters, and whose state is a
      `StochasticRoundingState`.

    Raises:
      ValueError: seed is out of range; at init, a leaf is float64; at update, params are missing.

    >>> import adam_jax, jax.numpy as jnp, optax
    >>> tx = stochastic_rounding(optax.sgd(1e-3))
    >>> params = jnp.ones(10_000, jnp.bfloat16)
    >>> updates, state = tx.update(jnp.ones(10_000, jnp.bfloat16), tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> float(params.max()), abs(float(params.astype(jnp.float32).mean()) - 0.999) < 1e-4
    (1.0, True)
    """
    with errors.error_context("stochastic_rounding"):
        errors.seed(seed)
    seed = int(seed)  # arithmetic on a NumPy integer may overflow

    def init(params: PyTree) -> StochasticRoundingState:
        with errors.error_context("stochastic_rounding"):
            map_with_path(errors.no_wider_than_float32, params)
            return StochasticRoundingState(jnp.zeros([], jnp.int32), tx.init(_to_float32(params)))

    return _wrap(tx, "stochastic_rounding", f"seed={seed}", init, None, seed)


def get_master_weights(params: optax.Params, state: PyTree) -> optax.Params:
    """Return the float32 masters of `master_weights`, for evaluation or checkpoints.

    Args:
      params: the parameters that belong to the state.
      state: a state that contains the state of `master_weights`; also `nnx.Optimizer.opt_state`.

    Returns:
      `params` with float32 masters in place of bfloat16 leaves.

    Raises:
      ValueError: the state has no masters, or several.
    """
    found = [s for _, s in named_tuples(state) if isinstance(s, MasterWeightsState)]
    if len(found) != 1:
        errors.not_one("get_master_weights", "MasterWeightsState", len(found))
    leaves, treedef = jax.tree.flatten(params)
    residuals = jax.tree.leaves(found[0].rest)
    with errors.error_context("get_master_weights"):
        errors.as_many(leaves, residuals)

    def master(p: PyTree, rest: jax.Array) -> PyTree:
        return to_arithmetic(SplitParam(p, rest, None), jnp.float32) if _is_bfloat16(p) else p

    return treedef.unflatten(map(master, leaves, residuals))


def _wrap(
    tx: optax.GradientTransformation,
    name: str,
    settings: str,
    init: Callable[[optax.Params], optax.OptState],
    residual_dtype: DType,
    seed: int = 0,
) -> Transformation:
    """Wrap tx to step bfloat16 parameters as SplitParams with residuals of this dtype."""
    state_type = StochasticRoundingState if residual_dtype is None else MasterWeightsState
    with errors.error_context(name):
        errors.transformation("tx", tx, f"{name}(tx)")
        errors.nothing_after(filter(is_exact, [tx]))

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, PyTree],
        *,
        emit_params: bool,
    ) -> tuple[PyTree, PyTree]:
        errors.parameters_given(params)
        errors.made_by_init(state, state_type)
        tree = Tree(updates)
        old = tree.like("parameters", params)
        residuals = tree.like("state", None if residual_dtype is None else state.rest)
        seed_of_step = None if residual_dtype == jnp.int16 else _step_seed(state.step_count, seed)

        def split(path: KeyPath, p: PyTree, rest: PyTree) -> PyTree:
            errors.residual(path, p, rest, residual_dtype)
            return SplitParam(p, rest, seed_of_step) if _is_bfloat16(p) else p

        paths = [path for path, _ in tree.leaves]
        inside = tree.with_leaves(list(map(split, paths, old, residuals)))
        new, inner = step(tx, updates, state.inner_state, inside, extra, emit_params=emit_params)
        new = tree.like("parameters", new)
        state = state._replace(step_count=optax.safe_increment(state.step_count), inner_state=inner)
        if residual_dtype is not None:
            residuals = [getattr(p, "residual", r) for p, r in zip(new, residuals, strict=True)]
            state = state._replace(rest=tree.with_leaves(residuals, state.rest))
        if not emit_params:
            gradients = [u for _, u in tree.leaves]
            return tree.with_leaves(list(map(_emit_update, gradients, old, new))), state
        return tree.with_leaves(list(map(value, new))), state

    named = errors.error_context(name)(update)
    text = f"{name}({describe(tx)}, {settings})"
    return transformation_of((tx,), init, named, text, emits_params=True, exact=True)


def _emit_update(gradient: PyTree, old: PyTree, new: PyTree) -> PyTree:
    """Return a parameter's update: a float32 difference if it is split, else tx's update."""
    if gradient is None or not is_split(new):
        return None if gradient is None else new
    return new.value.astype(jnp.float32) - old.astype(jnp.float32)


def _zero_residual(p: PyTree, dtype: DType) -> PyTree:
    """Return a zero residual with the sharding of p; one zero if p isn't bfloat16."""
    leaf = unbox(p)
    if _is_bfloat16(leaf):
        return jax.tree.map(lambda x: jnp.zeros_like(x, dtype), p)
    return jnp.zeros((1,) * np.ndim(leaf), dtype)


def _to_float32(params: optax.Params) -> optax.Params:
    """Return the parameters with bfloat16 leaves cast to float32."""
    return jax.tree.map(lambda p: p.astype(jnp.float32) if _is_bfloat16(p) else p, params)


def _is_bfloat16(x: PyTree) -> bool:
    return getattr(x, "dtype", None) == jnp.bfloat16


def _step_seed(count: jax.Array, seed: int) -> jax.Array:
    """Return the seed of a step's random bits."""
    return count.astype(jnp.uint32) + jnp.uint32(seed * 0x9E3779B1 % 2**32)

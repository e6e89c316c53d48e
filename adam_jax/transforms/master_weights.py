"""bfloat16 parameters that lose nothing: the bits below them kept beside, or rounding by chance.

Plain bfloat16 parameters drop every update below half of their last digit, 1/256 of their size.
The wrappers here go around everything that computes updates, and what they emit lands exactly under
`optax.apply_updates`: a float32 difference that nothing may change on its way. While that function
runs, a copy of the parameters is needed; `adam_jax.apply` steps them in place.
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
"""What the bits of a master below its upper 16 are kept in."""


class MasterWeightsState(NamedTuple):
    """The state of `master_weights`."""

    step_count: jax.Array
    rest: PyTree
    """The bits below each bfloat16 parameter; one zero for any other."""
    inner_state: optax.OptState


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`."""

    step_count: jax.Array
    inner_state: optax.OptState


def master_weights(tx: optax.GradientTransformation, bits: int = 32) -> Transformation:
    """Keeps the bits below bfloat16 parameters, which together with them are float32 masters.

    The transformation inside sees the masters in the place of the parameters, and its updates move
    them; the parameters are the masters, rounded. With 32 bits that is a float32 run, to the bit,
    for 2 bytes per parameter beside the parameter's own 2. With 24 bits it is 1 byte: masters are
    rounded stochastically to 16 significant bits, a relative error below 2⁻¹⁵ at a step and none
    on average.

    Leaves of other dtypes pass through, float16 among them: what fails there is the range, which
    more bits below would not widen.

    Goes around all that computes updates: `optax.chain(optax.clip(1.0), ...)` inside, and only
    `zero1`, `optax.MultiSteps`, `optax.apply_if_finite` and a Flax optimizer outside. The last of
    Optax's wants gradients of the updates' dtype, float32 (cast them in front).

    Updates land exactly where the new parameter is 0 or has at least 2⁻¹⁵ of the old one's size.
    What the float32 addition of `optax.apply_updates` cannot reach becomes the neighbour that it
    can, and the rest is taken from there; numbers below 2⁻¹²⁶ count as 0.
    Source of the split: FlashOptim (2026), arXiv:2602.23349; here it is of what the addition gives.

    Args:
      tx: any Optax transformation; ours is stepped without a float32 copy of anything.
      bits: 32 or 24, of a master, its parameter's 16 among them.

    Returns:
      a transformation whose updates are float32 for bfloat16 parameters, and whose state is a
      `MasterWeightsState`.

    Raises:
      ValueError: bits is neither; at init, a float64 leaf; at update, params are missing, or are
        not those of init.

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
    kept = REST[bits]

    def init(params: PyTree) -> MasterWeightsState:
        with errors.error_context("master_weights"):
            map_with_path(errors.no_wider_than_float32, params)
            rest = jax.tree.map(lambda p: _rest(p, kept), params, is_leaf=is_box)
            return MasterWeightsState(jnp.zeros([], jnp.int32), rest, tx.init(_to_float32(params)))

    return _around(tx, "master_weights", f"bits={bits}", init, kept)


def stochastic_rounding(tx: optax.GradientTransformation, seed: int = 0) -> Transformation:
    """Rounds what updates bfloat16 parameters by chance, so that on average none is lost.

    p + u becomes one of the two bfloat16 numbers beside it, the nearer one more often: the mean is
    p + u. There is no state but a count of steps; a parameter's noise stays that of its 8
    significant bits. The transformation inside sees the parameters, gradients and its own updates
    in float32. Draws are a hash of seed, path, step and place: the same on every replica and in
    every layout, and other ones with another seed. Where it goes in a chain, and what passes
    through, `master_weights` tells.

    Args:
      tx: any Optax transformation.
      seed: from 0 up to 2³² - 1.

    Returns:
      a transformation whose updates are float32 for bfloat16 parameters, and whose state is a
      `StochasticRoundingState`.

    Raises:
      ValueError: the seed is out of range; at init, a float64 leaf; at update, params are missing.

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

    def init(params: PyTree) -> StochasticRoundingState:
        with errors.error_context("stochastic_rounding"):
            map_with_path(errors.no_wider_than_float32, params)
            return StochasticRoundingState(jnp.zeros([], jnp.int32), tx.init(_to_float32(params)))

    return _around(tx, "stochastic_rounding", f"seed={seed}", init, None, seed)


def get_master_weights(params: optax.Params, state: PyTree) -> optax.Params:
    """The float32 masters that `master_weights` keeps: to evaluate with, and for checkpoints.

    Args:
      params: the parameters that belong to the state.
      state: the state of `master_weights`, also inside others, or `nnx.Optimizer.opt_state`.

    Returns:
      float32 for each bfloat16 leaf, the others as they are, in the structure of `params`.

    Raises:
      ValueError: the state holds no masters, or several.
    """
    found = [s for _, s in named_tuples(state) if isinstance(s, MasterWeightsState)]
    if len(found) != 1:
        errors.not_one("get_master_weights", "states of master_weights", len(found))
    leaves, treedef = jax.tree.flatten(params)
    rests = jax.tree.leaves(found[0].rest)
    with errors.error_context("get_master_weights"):
        errors.as_many(leaves, rests)

    def master(p: PyTree, rest: jax.Array) -> PyTree:
        return to_arithmetic(SplitParam(p, rest, None), jnp.float32) if _is_bfloat16(p) else p

    return treedef.unflatten(map(master, leaves, rests))


def _around(
    tx: optax.GradientTransformation,
    name: str,
    settings: str,
    init: Callable[[optax.Params], optax.OptState],
    kept: DType,
    seed: int = 0,
) -> Transformation:
    """Return tx, which steps bfloat16 parameters as SplitParams with residuals of dtype `kept`."""
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
        tree = Tree(updates)
        old = tree.like("parameters", params)
        rests = tree.like("state", None if kept is None else state.rest)
        seed_of_step = None if kept == jnp.int16 else _step_seed(state.step_count, seed)

        def split(path: KeyPath, p: PyTree, rest: PyTree) -> PyTree:
            errors.rest(path, p, rest, kept)
            return SplitParam(p, rest, seed_of_step) if _is_bfloat16(p) else p

        paths = [path for path, _ in tree.leaves]
        inside = tree.with_leaves(list(map(split, paths, old, rests)))
        new, inner = step(tx, updates, state.inner_state, inside, extra, emit_params=emit_params)
        new = tree.like("parameters", new)
        state = state._replace(step_count=optax.safe_increment(state.step_count), inner_state=inner)
        if kept is not None:
            rests = [getattr(p, "residual", rest) for p, rest in zip(new, rests, strict=True)]
            state = state._replace(rest=tree.with_leaves(rests, state.rest))
        if not emit_params:
            gradients = [u for _, u in tree.leaves]
            return tree.with_leaves(list(map(_emitted, gradients, old, new))), state
        return tree.with_leaves(list(map(value, new))), state

    named = errors.error_context(name)(update)
    text = f"{name}({describe(tx)}, {settings})"
    return transformation_of((tx,), init, named, text, emits_params=True, exact=True)


def _emitted(gradient: PyTree, old: PyTree, new: PyTree) -> PyTree:
    """What is to be added to a parameter: exact in float32, or as the transformation gave it."""
    if gradient is None or not is_split(new):
        return None if gradient is None else new
    return new.value.astype(jnp.float32) - old.astype(jnp.float32)


def _rest(p: PyTree, dtype: DType) -> PyTree:
    """No bits below the parameter yet, laid out as it is; one zero for what is not bfloat16."""
    leaf = unbox(p)
    if _is_bfloat16(leaf):
        return jax.tree.map(lambda x: jnp.zeros_like(x, dtype), p)
    return jnp.zeros((1,) * np.ndim(leaf), dtype)


def _to_float32(params: optax.Params) -> optax.Params:
    """Return the parameters that the transformation inside is initialized with."""
    return jax.tree.map(lambda p: p.astype(jnp.float32) if _is_bfloat16(p) else p, params)


def _is_bfloat16(x: PyTree) -> bool:
    return getattr(x, "dtype", None) == jnp.bfloat16


def _step_seed(count: jax.Array, seed: int) -> jax.Array:
    """Return the seed of a step's random bits."""
    return count.astype(jnp.uint32) + jnp.uint32(seed * 0x9E3779B1 % 2**32)

"""The plain XLA backend, which traces the step unchanged for XLA to fuse."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding

from adam_jax._backends import tile_view, unaligned
from adam_jax._backends.per_shard import Shard, per_shard
from adam_jax._backends.step import (
    Aliased,
    Means,
    Operands,
    Part,
    Result,
    Step,
    complete,
)
from adam_jax._util.typing import PyTree
from adam_jax.storage._blockwise import block_absmax
from adam_jax.storage._moments import any_of_other_shape
from adam_jax.storage._random_bits import positions


def execute_leaf(step: Step, operands: Operands, sharding: NamedSharding | None) -> Result:
    """Run the step of the whole leaf at once.

    On explicit mesh axes, JAX neither splits a sharded axis into blocks nor broadcasts an unsharded
    array to a sharded one. So steps of lossy state and per-leaf numbers run shard by shard.
    """
    axis_types = jax.typeof(operands.update).sharding.mesh.axis_types
    explicit = AxisType.Explicit in axis_types and operands.update.ndim > 0
    if explicit and any_of_other_shape(operands.moments):
        return per_shard(functools.partial(_execute_shard, step), step, operands, sharding)
    if step.platform == "tpu" and not step.batch_axes and tile_view.fits(operands):
        return _execute_in_tiles(step, operands)
    seeds = operands.seeds
    position = functools.partial(positions, operands.update.shape)
    output, encode = step(operands, Part(_mean, position))
    if seeds is not None and operands.param is not None and orders_writes(step.platform):
        seeds = _after(_new_param(step, operands, output), seeds)
    return Result(output, encode(seeds))


def _execute_in_tiles(step: Step, operands: Operands) -> Result:
    position = functools.partial(tile_view.positions, operands.update.shape)
    part = Part(_mean, position, lambda x, block: block_absmax(x, block=block))
    return tile_view.joined(complete(step, tile_view.split(operands), part), step, operands)


def _execute_shard(step: Step, operands: Operands, shard: Shard) -> Result:
    if shard.unaligned:
        return unaligned.execute_shard(step, operands, shard)
    shape = operands.update.shape
    return complete(step, operands, Part(shard.mean, functools.partial(shard.positions, shape)))


def _mean(xs: Sequence[jax.Array], batch_axes: int) -> Means:
    if not batch_axes:
        return [jnp.mean(x) for x in xs]
    return [jnp.mean(x, axis=tuple(range(batch_axes, x.ndim)), keepdims=True) for x in xs]


def orders_writes(platform: str) -> bool:
    """Whether to write new moments after the new parameter, so that XLA:CPU copies no moments.

    XLA:CPU computes new moments again for the direction. If old moments might be overwritten before
    that, XLA:CPU copies them, which doubles the time of a bfloat16 step.
    Ordering reads one element of the result, which is local only on a single device.
    """
    return platform == "cpu" and jax.device_count() == 1


def _after(result: jax.Array, seeds: jax.Array) -> jax.Array:
    """Return `seeds` with a fake data dependency on `result`, so that XLA schedules it first."""
    first = result[(0,) * result.ndim]  # XLA doesn't infer that it is never both NaN and Inf
    return seeds ^ (jnp.isnan(first) & jnp.isinf(first)).astype(seeds.dtype)


def _new_param(step: Step, operands: Operands, output: PyTree) -> jax.Array:
    """Compute the new parameter exactly as Optax does, so that XLA merges the two sums."""
    if step.aliased is Aliased.PARAM:
        return jax.tree.leaves(output)[0]
    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.leaves(optax.apply_updates(operands.param, output))[0]

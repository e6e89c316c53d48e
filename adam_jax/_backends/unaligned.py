"""The step of a shard whose edges split blocks, with scales computed across devices.

Each device has all scales of its rows. The step divides blocks into parts that no edge splits, and
uses a block's scale for each of its parts. Parts are an axis of the arrays, so that XLA computes
new moments and their maxima in one loop.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from adam_jax._backends.per_shard import Shard
from adam_jax._backends.step import Moments, Operands, Part, Result, Step, complete
from adam_jax.storage._blockwise import QuantizedLeaf, block_absmax
from adam_jax.storage._moments import Stored, block_size, is_quantized
from adam_jax.storage._random_bits import Position


def execute_shard(step: Step, operands: Operands, shard: Shard) -> Result:
    """Run the step of the whole shard twice: to compute the new scales, and to use them.

    Computing new moments twice moves fewer bytes than keeping them in float32 until the devices
    have exchanged the scales. XLA:CPU merges both runs, and does keep the moments.
    """
    *rows, columns = operands.update.shape
    old = _quantized(operands.moments)
    width = math.gcd(columns, *map(block_size, old))
    parts = columns // width

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, min(width, x.shape[-1]))

    def block_of_part(stored: QuantizedLeaf) -> jax.Array:
        """Return the index of the block that contains each part of a row."""
        part = shard.origin[-1] // width + jnp.arange(parts, dtype=jnp.uint32)
        return part // (block_size(stored) // width)

    def split_moment(stored: Stored) -> Stored:
        if not is_quantized(stored):
            return jax.tree.map(split, stored)
        return QuantizedLeaf(split(stored.codes), scales_of_parts(stored))

    def scales_of_parts(stored: QuantizedLeaf) -> jax.Array:
        return stored.scales[..., block_of_part(stored)][..., None]

    def with_new_scales(stored: QuantizedLeaf, new: QuantizedLeaf) -> QuantizedLeaf:
        """Return an old moment with new scales, each the maximum over a block's parts."""
        of_parts = new.scales[..., 0]
        of_parts = jnp.where(jnp.isnan(of_parts), jnp.inf, of_parts)  # a maximum may ignore a NaN
        scales = jnp.zeros_like(stored.scales).at[..., block_of_part(stored)].max(of_parts)
        scales = jax.lax.pmax(scales, shard.unaligned)
        return stored._replace(scales=jnp.where(jnp.isinf(scales), jnp.nan, scales))

    def position() -> Position:
        row = jnp.arange(math.prod(rows)).reshape(*rows, 1, 1)
        column = jax.lax.broadcasted_iota(jnp.int32, (*(1 for _ in rows), parts, 1), len(rows))
        return shard.position(row, column * width, width, (*rows, columns))

    def part_absmax(x: jax.Array, block: int) -> jax.Array:
        del block
        return block_absmax(x, block=width)

    u, g, p = jax.tree.map(split, operands[:3])
    moments = [tuple(map(split_moment, stored)) for stored in operands.moments]
    given = operands._replace(update=u, grad=g, param=p, moments=moments)
    again, part = given._replace(seeds=None), Part(shard.mean, position)
    if step.platform != "cpu":
        again = jax.lax.optimization_barrier(again)
        part = part._replace(block_absmax=part_absmax)
    first = complete(step, again, part)
    scaled = list(map(with_new_scales, old, _quantized(first.moments)))
    known = iter(list(map(scales_of_parts, scaled)))
    new = complete(step, given, part._replace(block_absmax=lambda x, block: next(known)))
    whole = iter(scaled)
    moments = [
        tuple(x._replace(scales=next(whole).scales) if is_quantized(x) else x for x in stored)
        for stored in new.moments
    ]
    like = Result(step.aliased.of(operands), operands.moments)
    return jax.tree.map(lambda x, y: x.reshape(y.shape), new._replace(moments=moments), like)


def _quantized(moments: Moments) -> list[QuantizedLeaf]:
    return [x for stored in moments for x in stored if is_quantized(x)]

"""The step of a shard whose edges split blocks, with block maxima computed across devices.

Each device has all scales of the leaf. The step uses smaller blocks that no edge splits, each with
the scale of the block that contains it.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from adam_jax._backends.per_shard import Shard
from adam_jax._backends.step import Operands, Part, Result, Step, complete
from adam_jax.storage._blockwise import QuantizedLeaf, absmax, magnitudes
from adam_jax.storage._moments import Stored, block_size


def execute_shard(step: Step, operands: Operands, shard: Shard) -> Result:
    """Run the step of the whole shard."""
    shape, columns = operands.update.shape, operands.update.shape[-1]

    def block_index(block: int) -> jax.Array:
        """Return the index of the block that contains each of the smaller blocks."""
        part = math.gcd(columns, block)
        parts = jax.lax.iota(jnp.uint32, columns // part)
        return (shard.origin[-1] // part + parts) // (block // part)

    def across_devices(largest: jax.Array, block: int) -> jax.Array:
        """Return the maxima of whole blocks from the maxima of their parts."""
        largest = jnp.where(jnp.isnan(largest), jnp.inf, largest)  # a maximum may ignore a NaN
        empty = jnp.zeros((*largest.shape[:-1], -(-shard.leaf_shape[-1] // block)), largest.dtype)
        whole = empty.at[..., block_index(block)].max(largest)
        return jax.lax.pmax(whole, shard.unaligned)

    def block_absmax(x: jax.Array, block: int) -> jax.Array:
        largest = absmax(magnitudes(x), math.gcd(columns, block))
        return across_devices(largest, block)[..., block_index(block)]

    def to_parts(x: Stored) -> Stored:
        if not isinstance(x, QuantizedLeaf):
            return x
        return x._replace(scales=x.scales[..., block_index(block_size(x))])

    def to_blocks(x: Stored, old: Stored) -> Stored:
        if not isinstance(x, QuantizedLeaf):
            return x
        scales = across_devices(x.scales, block_size(old))
        return x._replace(scales=jnp.where(jnp.isinf(scales), jnp.nan, scales))

    inside = [tuple(map(to_parts, moments)) for moments in operands.moments]
    part = Part(shard.mean, functools.partial(shard.positions, shape), block_absmax)
    output, new = complete(step, operands._replace(moments=inside), part)
    pairs = zip(new, operands.moments, strict=True)
    return Result(output, [tuple(map(to_blocks, *pair)) for pair in pairs])

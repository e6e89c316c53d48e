"""The step of a shard whose edges cut blocks in two: it finds their largest across devices.

The scales lie whole on each device. Inside, the shard is coded in smaller blocks that no edge cuts,
each with the scale of the block that it is a part of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_jax import storage
from adam_jax._backends.per_shard import Shard
from adam_jax._backends.steps import Step, finish
from adam_jax.storage import Blocks
from adam_jax.storage._blockwise import largest_of


def run(
    leaf: Callable[..., Step],
    u: jax.Array,
    g: jax.Array | None,
    p: Any,
    stored: Any,
    scalars: jax.Array,
    key: jax.Array | None,
    shard: Shard,
) -> Any:
    """The step of the shard at once."""
    shape, columns = u.shape, u.shape[-1]

    def blocks(block: int) -> jax.Array:
        """For each of the smaller blocks the index of the whole one that it is a part of."""
        part = math.gcd(columns, block)
        parts = jax.lax.iota(jnp.uint32, columns // part)
        return (shard.origin[-1] // part + parts) // (block // part)

    def whole(largest: jax.Array, block: int) -> jax.Array:
        """The largest of whole blocks from the largest of those parts that are here."""
        largest = jnp.where(jnp.isnan(largest), jnp.inf, largest)  # a NaN may get lost in a maximum
        empty = jnp.zeros((*largest.shape[:-1], -(-shard.whole[-1] // block)), largest.dtype)
        return jax.lax.pmax(empty.at[..., blocks(block)].max(largest), shard.cut)

    def share(sizes: jax.Array, block: int) -> jax.Array:
        largest = largest_of(sizes, math.gcd(columns, block))
        return whole(largest, block)[..., blocks(block)]

    def narrow(x: Any) -> Any:
        if not isinstance(x, Blocks):
            return x
        return Blocks(x.codes, x.scales[..., blocks(storage.block_of(x))])

    def widen(x: Any, old: Any) -> Any:
        if not isinstance(x, Blocks):
            return x
        scales = whole(x.scales, storage.block_of(old))
        return Blocks(x.codes, jnp.where(jnp.isinf(scales), jnp.nan, scales))

    def mean(xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return shard.mean([jnp.sum(x) for x in xs])

    inside = [tuple(narrow(x) for x in moments) for moments in stored]
    result, new = finish(leaf(u, g, p, inside, scalars, key, shard.all_of(shape), share), mean)
    return result, [tuple(map(widen, *pair)) for pair in zip(new, stored, strict=True)]

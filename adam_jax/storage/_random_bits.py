"""Stateless random bits, keyed by leaf path, step, and position; independent of sharding."""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = np.uint32(0x9E3779B9)
"""2³² over the golden ratio: its multiples lie far apart."""


class Position(NamedTuple):
    """The position of elements in the leaf, [row, column + lane]; rows count all other axes."""

    row: jax.Array
    column: jax.Array
    lane: jax.Array


def positions(shape: tuple[int, ...]) -> Position:
    """Return the positions of an array that is all of its leaf.

    It comes from iotas, which a partitioner splits as it splits the array: an element draws the
    same number however it is sharded. (Inside a shard_map of one's own the index is the shard's.)
    """
    per_row = (*shape[:-1], 1) if shape else ()
    row = jnp.zeros(per_row, jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        iota = jax.lax.broadcasted_iota(jnp.uint32, per_row, axis)
        row = row * jnp.uint32(size) + iota
    lane = jnp.zeros((), jnp.uint32)
    if shape:
        per_lane = (*(1 for _ in shape[:-1]), shape[-1])
        lane = jax.lax.broadcasted_iota(jnp.uint32, per_lane, len(shape) - 1)
    return Position(row, jnp.zeros_like(row), lane)


@functools.cache
def name_key(name: str) -> int:
    """A name's share of a key: equal leaves, and moments, are rounded independently."""
    return zlib.crc32(name.encode())


def random_bits(key: jax.Array, step: jax.Array, place: Position, name: str = "") -> jax.Array:
    """Return 32 random bits per element of the leaf with this key at a step; others by name.

    The step is a uint32: float32 has no odd numbers above 2²⁴.
    """
    key = _mix(key ^ step) ^ jnp.uint32(name_key(name))
    row = _mix(place.row ^ key) + place.column * GOLDEN
    # once for each row: fused, it would be for each element
    row = jax.lax.optimization_barrier(row)
    return _half_mix(row + place.lane * GOLDEN)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers in which every input bit moves every output bit."""
    x = _half_mix((x ^ (x >> 16)) * np.uint32(0x21F0AAAD))
    return x ^ (x >> 15)


def _half_mix(x: jax.Array) -> jax.Array:
    """One multiplication of the two: enough for integers that lie far apart."""
    return (x ^ (x >> 15)) * np.uint32(0xD35A2D97)

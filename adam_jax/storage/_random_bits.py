"""Stateless random bits, keyed by leaf path, step, and position; independent of sharding."""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = np.uint32(0x9E3779B9)
"""2³² divided by the golden ratio. Its multiples modulo 2³² are far apart."""


class Position(NamedTuple):
    """The position of elements in the leaf: [row, column + lane]; `row` ravels the other axes."""

    row: jax.Array
    column: jax.Array
    lane: jax.Array


def positions(shape: tuple[int, ...]) -> Position:
    """Return the positions of an array that is a whole leaf.

    The partitioner shards the iotas like the array, so that random bits don't depend on sharding.
    (Inside a user's own shard_map, positions are relative to the shard.)
    """
    row_shape = (*shape[:-1], 1) if shape else ()
    row = jnp.zeros(row_shape, jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        iota = jax.lax.broadcasted_iota(jnp.uint32, row_shape, axis)
        row = row * jnp.uint32(size) + iota
    lane = jnp.zeros((), jnp.uint32)
    if shape:
        lane_shape = (*(1 for _ in shape[:-1]), shape[-1])
        lane = jax.lax.broadcasted_iota(jnp.uint32, lane_shape, len(shape) - 1)
    return Position(row, jnp.zeros_like(row), lane)


@functools.cache
def name_key(name: str) -> int:
    """Return a hash of `name`, which makes the random bits of moments independent."""
    return zlib.crc32(name.encode())


def random_bits(
    key: jax.Array, step: jax.Array, position: Position, name: str = "", *, by_row: bool = True
) -> jax.Array:
    """Return 32 random bits per element, keyed by leaf, step, position, and name.

    The step is a uint32, because float32 has no odd numbers above 2²⁴. With `by_row`, XLA computes
    the hash of a row once, in a loop of its own; without it, for each element, in one loop.
    """
    row, column, lane = position
    if not by_row:
        key = key + ((row | lane) >> 31)  # adds 0, which XLA can't infer
    key = mix(key ^ step) ^ jnp.uint32(name_key(name))
    row = mix(row ^ key) + column * GOLDEN
    if by_row:
        row = jax.lax.optimization_barrier(row)
    return _half_mix(row + lane * GOLDEN)


def second_bits(bits: jax.Array) -> jax.Array:
    """Return random bits whose upper 16 are independent of the upper 16 of `bits`."""
    return bits + (bits << 16)


def mix(x: jax.Array) -> jax.Array:
    """Mix 32-bit integers bijectively, so that every input bit affects every output bit."""
    x = _half_mix((x ^ (x >> 16)) * np.uint32(0x21F0AAAD))
    return x ^ (x >> 15)


def _half_mix(x: jax.Array) -> jax.Array:
    """Mix with one multiplication instead of two, which is enough for integers far apart."""
    return (x ^ (x >> 15)) * np.uint32(0xD35A2D97)

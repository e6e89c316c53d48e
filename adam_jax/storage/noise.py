"""Random bits as a function of what they are for: no key to carry, the same in every layout."""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp


def path_key(path: str) -> int:
    """A leaf's share of the key, so that two leaves of equal content are rounded independently."""
    return zlib.crc32(path.encode())


def fold(key: jax.Array, moment: str, t: jax.Array) -> jax.Array:
    """The key of one moment of a leaf at one step."""
    return _mix(_mix(key + jnp.uint32(path_key(moment))) ^ t.astype(jnp.uint32))


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits for each element, from its row and column in the whole array.

    They come from iotas, which a partitioner splits as it splits the array: an element draws the
    same number however it is sharded. (Inside a shard_map of one's own the index is the shard's.)
    """
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, shape)
    row = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        row = row * jnp.uint32(size) + iota(axis)
    column = iota(len(shape) - 1) if shape else row
    return _mix(_mix(row ^ key) + column * jnp.uint32(0x9E3779B1))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers in which every input bit moves every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)

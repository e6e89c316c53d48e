"""Moments kept as a code for each element and a scale for each block along the last axis.

The codes have the leaf's shape; the scales its shape with the last axis counted in blocks. So the
parameter's PartitionSpec fits both, and what is stored tells by itself how to read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """A coded moment: its codes and their scales, each a tree like the parameters'.

    A leaf that stays uncoded has its values for codes, and scales of ones.
    """

    codes: Any
    scales: Any

    def __repr__(self) -> str:
        """The trees, and how many leaves stayed uncoded, so that none does so silently."""
        dtypes = [str(x.dtype) for x in jax.tree.leaves(self.codes) if hasattr(x, "dtype")]
        kept = sorted({d for d in dtypes if "float" in d and "float8" not in d})
        told = "".join(f", {dtypes.count(d)} of {len(dtypes)} leaves kept {d}" for d in kept)
        return f"Blocks(codes={self.codes!r}, scales={self.scales!r}{told})"


@dataclasses.dataclass(frozen=True)
class Code:
    """How the numbers of one block, divided by the largest magnitude among them, are coded.

    Attributes:
      dtype: of the codes; no two codes share one, because it says how a state is read.
      encode: (y, draw) → codes, with y in [-1, 1] ([0, 1] for a code of non-negative numbers) and
        draw uniform in [0, 1) for stochastic rounding; it is 1/2 where the nearest is wanted.
      decode: codes → y in float32. ±1 and 0 must come back exactly.
      block: how many elements along the last axis share a scale, a power of two.
      round_down: y → codes, rounded down, to zero too, for a running maximum; without it, such a
        moment is rounded to nearest.
    """

    dtype: Any
    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    block: int = 128
    round_down: Callable[[jax.Array], jax.Array] | None = None


def scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape of the scales of an array that is coded in blocks."""
    return (*shape[:-1], -(-shape[-1] // block))


def size(stored: Blocks) -> int:
    """How many elements share a scale: the power of two that the shapes tell."""
    block = 1
    while -(-stored.codes.shape[-1] // block) > stored.scales.shape[-1]:
        block *= 2
    return block


def decode(code: Code, stored: Blocks) -> jax.Array:
    """The moment in float32."""
    y = code.decode(stored.codes)
    return y * _each(stored.scales, size(stored), y.shape[-1])


def encode(
    code: Code,
    x: jax.Array,
    draw: jax.Array,
    block: int,
    share: Callable[[jax.Array], jax.Array] | None = None,
    *,
    down: bool = False,
    saturate: bool = False,
) -> Blocks:
    """Encode x, each block's largest magnitude exactly; an Inf or NaN makes its block NaN.

    `share` finds the largest of each block where x is only a part of them. With `down` nothing is
    rounded up, if the code can round down. With `saturate` a scale is the largest finite number in
    place of NaN: the square of a finite gradient overflows above 1.8e19.
    """
    n = x.shape[-1]
    largest = largest_of(_sizes(x), block) if share is None else share(_sizes(x))
    if saturate:
        largest = jnp.where(largest == jnp.inf, jnp.finfo(largest.dtype).max, largest)
    round_down = code.round_down if down else None
    # scales that seldom change: under equal scales, what was rounded down before stays as it is
    scales = _power_of_four(largest) if round_down else largest
    scales = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
    # a hair above 1, so that the largest reaches 1 in spite of rounding; in two factors, because
    # 1/scale leaves float32's range at both of its ends
    halfway = jnp.where(scales > 1, 2.0**-63, 2.0**63).astype(jnp.float32)
    inverse = jnp.where(scales > 0, (1 + 2.0**-22) / (scales * halfway), 0)
    y = x * _each(halfway, block, n) * _each(inverse, block, n)
    y = at_least(y, jnp.where(x > 0, jnp.finfo(y.dtype).tiny, -1))  # no underflow
    y = at_most(y, 1)
    codes = round_down(y) if round_down else code.encode(y, draw)
    return Blocks(codes, scales)


def at_least(x: jax.Array, low: jax.typing.ArrayLike) -> jax.Array:
    """maximum(x, low) in one instruction: without a NaN's, which no code has."""
    return jnp.where(x > low, x, low)


def at_most(x: jax.Array, high: jax.typing.ArrayLike) -> jax.Array:
    return jnp.where(x < high, x, high)


def largest_of(sizes: jax.Array, block: int) -> jax.Array:
    """The largest of each block of magnitudes."""
    most = _bits(apart(sizes, block))
    # halves against each other: whole vectors, in one loop of XLA:CPU. (Into 16 against the next 16
    # it would fuse what computes x, which codes and scales have to read from one array.)
    while most.shape[-1] > 16:
        half = most.shape[-1] // 2
        most = jnp.maximum(most[..., :half], most[..., half:])
    return jnp.max(_floats(most), axis=-1)


def apart(sizes: jax.Array, block: int) -> jax.Array:
    """Magnitudes with an axis of their own for each block, the last one filled up with zeros."""
    missing = -sizes.shape[-1] % block
    if missing:
        sizes = jnp.pad(sizes, [(0, 0)] * (sizes.ndim - 1) + [(0, missing)])
    return sizes.reshape(*sizes.shape[:-1], -1, block)


def _power_of_four(x: jax.Array) -> jax.Array:
    """Round x ≥ 0 up to the next of the numbers …, ⅛, ½, 2, 8, …; the largest of them is 2¹²⁷."""
    up = _bits(x) + 0x00FFFFFF & ~0x00FFFFFF
    return _floats(jnp.minimum(up, 0x7F000000))


def _sizes(x: jax.Array) -> jax.Array:
    """|x|, and Inf for a NaN, which compiled maxima may skip. Magnitudes order as their bits do."""
    return _floats(jnp.minimum(_bits(x) & 0x7FFFFFFF, 0x7F800000))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _each(per_block: jax.Array, block: int, n: int) -> jax.Array:
    """A value for each element of (…, n) from one for each block."""
    spread = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block))
    spread = spread.reshape(*per_block.shape[:-1], -1)
    return spread if spread.shape[-1] == n else spread[..., :n]

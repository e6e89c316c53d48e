"""Blockwise quantization: a code for each element, and a scale for each block of the last axis.

Codes have the leaf's shape, and scales its shape with the last axis counted in blocks. So the
parameter's PartitionSpec fits both, and their shapes and dtypes say how to read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adam_jax._util.typing import PyTree


class Quantized(NamedTuple):
    """A quantized moment in a state: its codes and scales, each a tree like the parameters.

    A leaf that isn't quantized has its values for codes, and scales of ones.
    """

    codes: PyTree
    scales: PyTree

    def __repr__(self) -> str:
        """Show the trees, and how many leaves aren't quantized, so that none is so silently."""
        dtypes = [str(x.dtype) for x in jax.tree.leaves(self.codes) if hasattr(x, "dtype")]
        kept = sorted({d for d in dtypes if "float" in d and "float8" not in d})
        counts = "".join(f", {dtypes.count(d)} of {len(dtypes)} leaves kept {d}" for d in kept)
        return f"Quantized(codes={self.codes!r}, scales={self.scales!r}{counts})"


class QuantizedLeaf(NamedTuple):
    """One leaf of a quantized moment."""

    codes: jax.Array
    scales: jax.Array

    @property
    def elements_per_scale(self) -> int:
        """How many elements share a scale: the power of two that the shapes imply."""
        block = 1
        while -(-self.codes.shape[-1] // block) > self.scales.shape[-1]:
            block *= 2
        return block


@dataclasses.dataclass(frozen=True)
class Code:
    """How to quantize the numbers of one block, divided by their largest magnitude.

    Attributes:
      dtype: of the codes; no two codes share one, because it says how a state is read.
      encode: (y, draw) → codes, with y in [-1, 1] ([0, 1] for a code of non-negative numbers) and
        draw uniform in [0, 1) for stochastic rounding; it is 1/2 where the nearest is wanted.
      decode: codes → y in float32. ±1 and 0 must come back exactly.
      block: how many elements along the last axis share a scale, a power of two.
      round_down: y → codes, rounded down, to zero too, for a running maximum; without it, such a
        moment is rounded to nearest.
    """

    dtype: jax.typing.DTypeLike
    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    block: int = 128
    round_down: Callable[[jax.Array], jax.Array] | None = None


def scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Return the shape of the scales of an array that is quantized in blocks."""
    return (*shape[:-1], -(-shape[-1] // block))


def decode(code: Code, stored: QuantizedLeaf) -> jax.Array:
    """Return the moment in float32."""
    y = code.decode(stored.codes)
    return y * _per_element(stored.scales, stored.elements_per_scale, y.shape[-1])


def encode(
    code: Code,
    x: jax.Array,
    draw: jax.Array,
    block: int,
    block_absmax: Callable[[jax.Array], jax.Array] | None = None,
    *,
    down: bool = False,
    saturate: bool = False,
) -> QuantizedLeaf:
    """Encode x, each block's largest magnitude exactly; an Inf or NaN makes its block NaN.

    `block_absmax` finds each block's largest magnitude if x is only a part of the blocks. With
    `down` nothing is rounded up, if the code can round down. With `saturate` a scale is the largest
    finite number in place of Inf: the square of a finite gradient overflows above 1.8e19.
    """
    n = x.shape[-1]
    magnitudes = _magnitudes(x)
    largest = absmax(magnitudes, block) if block_absmax is None else block_absmax(magnitudes)
    if saturate:
        largest = jnp.where(largest == jnp.inf, jnp.finfo(largest.dtype).max, largest)
    round_down = code.round_down if down else None
    # scales that seldom change: with an equal scale, a value rounded down before stays as it is
    scales = _power_of_four(largest) if round_down else largest
    scales = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
    # slightly above 1, so that rounding can't keep the block maximum from mapping to exactly 1; in
    # two factors, because 1/scale leaves float32's range at both of its ends
    halfway = jnp.where(scales > 1, 2.0**-63, 2.0**63).astype(jnp.float32)
    inverse = jnp.where(scales > 0, (1 + 2.0**-22) / (scales * halfway), 0)
    y = x * _per_element(halfway, block, n) * _per_element(inverse, block, n)
    y = at_least(y, jnp.where(x > 0, jnp.finfo(y.dtype).tiny, -1))  # no underflow
    y = at_most(y, 1)
    codes = round_down(y) if round_down else code.encode(y, draw)
    return QuantizedLeaf(codes, scales)


def at_least(x: jax.Array, low: jax.typing.ArrayLike) -> jax.Array:
    """Return maximum(x, low) in one instruction, without its handling of NaN."""
    return jnp.where(x > low, x, low)


def at_most(x: jax.Array, high: jax.typing.ArrayLike) -> jax.Array:
    return jnp.where(x < high, x, high)


def absmax(magnitudes: jax.Array, block: int) -> jax.Array:
    """Return the largest of each block of magnitudes."""
    most = _bits(split_blocks(magnitudes, block))
    # halves against each other: whole vectors, in one loop of XLA:CPU. (Into 16 against the next 16
    # it would fuse what computes x, which codes and scales have to read from one array.)
    while most.shape[-1] > 16:
        half = most.shape[-1] // 2
        most = jnp.maximum(most[..., :half], most[..., half:])
    return jnp.max(_floats(most), axis=-1)


def split_blocks(magnitudes: jax.Array, block: int) -> jax.Array:
    """Return (…, blocks, block) from (…, n), the last block padded with zeros."""
    missing = -magnitudes.shape[-1] % block
    if missing:
        magnitudes = jnp.pad(magnitudes, [(0, 0)] * (magnitudes.ndim - 1) + [(0, missing)])
    return magnitudes.reshape(*magnitudes.shape[:-1], -1, block)


def _power_of_four(x: jax.Array) -> jax.Array:
    """Round x ≥ 0 up to the next of the numbers …, ⅛, ½, 2, 8, …; the largest of them is 2¹²⁷."""
    up = _bits(x) + 0x00FFFFFF & ~0x00FFFFFF
    return _floats(jnp.minimum(up, 0x7F000000))


def _magnitudes(x: jax.Array) -> jax.Array:
    """|x|, and Inf for a NaN, which compiled maxima may skip. Magnitudes order as their bits do."""
    return _floats(jnp.minimum(_bits(x) & 0x7FFFFFFF, 0x7F800000))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _per_element(per_block: jax.Array, block: int, n: int) -> jax.Array:
    """Return (…, n) from one value for each block."""
    spread = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block))
    spread = spread.reshape(*per_block.shape[:-1], -1)
    return spread if spread.shape[-1] == n else spread[..., :n]

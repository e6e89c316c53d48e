"""Blockwise quantization: a code for each element, and a scale for each block of the last axis.

Codes have the leaf's shape. Scales have the same shape except for the last axis, with one scale per
block. So the parameter's PartitionSpec fits both, and shapes and dtypes determine the decoding.
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

    A leaf that isn't quantized has its values as codes, and ones as scales.
    """

    codes: PyTree
    scales: PyTree

    def __repr__(self) -> str:
        """Show the trees, and how many leaves aren't quantized."""
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
        """Return how many elements share a scale: a power of two, inferred from the shapes."""
        block = 1
        while -(-self.codes.shape[-1] // block) > self.scales.shape[-1]:
            block *= 2
        return block


@dataclasses.dataclass(frozen=True)
class Code:
    """A code for the numbers of one block, divided by the block's largest magnitude.

    Attributes:
      dtype: the dtype of the codes. Each code needs its own, because it identifies the code.
      encode: (y, draw) → codes, with y in [-1, 1] ([0, 1] for a code of non-negative numbers) and
        draw uniform in [0, 1) for stochastic rounding, or 1/2 to round to nearest.
      decode: codes → y in float32. It must return ±1 and 0 exactly.
      block: the number of elements along the last axis that share a scale, a power of two.
      round_down: y → codes, rounded down, possibly to zero, for a running maximum. Without it, a
        running maximum is rounded to nearest.
    """

    dtype: jax.typing.DTypeLike
    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    block: int = 128
    round_down: Callable[[jax.Array], jax.Array] | None = None


def scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Return the shape of the scales of an array with this shape."""
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
    """Encode x, keeping block maxima exact; an Inf or NaN makes its block NaN.

    `block_absmax` computes each block's largest magnitude if x has only parts of blocks. `down`
    rounds everything down if the code can. `saturate` replaces an Inf scale by the largest finite
    number, because the square of a finite gradient overflows above 1.8e19.
    """
    n = x.shape[-1]
    magnitudes = _magnitudes(x)
    block_max = absmax(magnitudes, block) if block_absmax is None else block_absmax(magnitudes)
    if saturate:
        block_max = jnp.where(block_max == jnp.inf, jnp.finfo(block_max.dtype).max, block_max)
    round_down = code.round_down if down else None
    # coarse scales seldom change; while they don't, rounding down a second time changes nothing
    scales = _round_up_scale(block_max) if round_down else block_max
    scales = jnp.where(jnp.isfinite(block_max), scales, jnp.nan)
    # slightly above 1/scale, so that block maxima map to exactly 1 despite rounding; in two
    # factors, because 1/scale can underflow or overflow
    factor = jnp.where(scales > 1, 2.0**-63, 2.0**63).astype(jnp.float32)
    inverse = jnp.where(scales > 0, (1 + 2.0**-22) / (scales * factor), 0)
    y = x * _per_element(factor, block, n) * _per_element(inverse, block, n)
    y = at_least(y, jnp.where(x > 0, jnp.finfo(y.dtype).tiny, -1))  # no underflow
    y = at_most(y, 1)
    codes = round_down(y) if round_down else code.encode(y, draw)
    return QuantizedLeaf(codes, scales)


def at_least(x: jax.Array, low: jax.typing.ArrayLike) -> jax.Array:
    """Return maximum(x, low) in one instruction, without propagating NaN."""
    return jnp.where(x > low, x, low)


def at_most(x: jax.Array, high: jax.typing.ArrayLike) -> jax.Array:
    return jnp.where(x < high, x, high)


def absmax(magnitudes: jax.Array, block: int) -> jax.Array:
    """Return the maximum of each block of magnitudes."""
    maxima = _bits(split_blocks(magnitudes, block))
    # compare halves, so that XLA:CPU runs one loop of whole vectors; comparing 16 with the next 16
    # would fuse x into it, but codes and scales must read x from one array
    while maxima.shape[-1] > 16:
        half = maxima.shape[-1] // 2
        maxima = jnp.maximum(maxima[..., :half], maxima[..., half:])
    return jnp.max(_floats(maxima), axis=-1)


def split_blocks(magnitudes: jax.Array, block: int) -> jax.Array:
    """Reshape (…, n) to (…, blocks, block), padding the last block with zeros."""
    missing = -magnitudes.shape[-1] % block
    if missing:
        magnitudes = jnp.pad(magnitudes, [(0, 0)] * (magnitudes.ndim - 1) + [(0, missing)])
    return magnitudes.reshape(*magnitudes.shape[:-1], -1, block)


def _round_up_scale(x: jax.Array) -> jax.Array:
    """Round x ≥ 0 up to the next of …, ⅛, ½, 2, 8, …, but at most to 2¹²⁷."""
    up = _bits(x) + 0x00FFFFFF & ~0x00FFFFFF
    return _floats(jnp.minimum(up, 0x7F000000))


def _magnitudes(x: jax.Array) -> jax.Array:
    """Return |x|, with NaN as Inf, computed on bits: float maxima may ignore NaN."""
    return _floats(jnp.minimum(_bits(x) & 0x7FFFFFFF, 0x7F800000))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _per_element(per_block: jax.Array, block: int, n: int) -> jax.Array:
    """Repeat the value of each block, to shape (…, n)."""
    repeated = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block))
    repeated = repeated.reshape(*per_block.shape[:-1], -1)
    return repeated if repeated.shape[-1] == n else repeated[..., :n]

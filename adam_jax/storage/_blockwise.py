"""Blockwise quantization: a code for each element, and a scale for each block of the last axis.

Codes have the leaf's shape. Scales have the same shape except for the last axis, with one scale per
block. So the parameter's PartitionSpec fits both, and shapes and dtypes determine the decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adam_jax._util.numerics import TINY
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
      encode: (y, draw) → codes, with y in [-largest, largest] ([0, largest] for a code of
        non-negative numbers) and draw uniform in [0, 1) for stochastic rounding, or 1/2 to round to
        nearest.
      decode: codes → y / largest in float32. It must return ±1 and 0 exactly.
      block: the number of elements along the last axis that share a scale, a power of two.
      round_down: y → codes, rounded down, possibly to zero, for a running maximum. Without it, a
        running maximum is rounded to nearest.
      least: the smallest positive y that a non-negative moment is encoded from; smaller positive
        numbers become this one. If its code isn't zero, no positive number becomes zero.
      largest: the y of a block's largest magnitude.
    """

    dtype: jax.typing.DTypeLike
    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    block: int = 128
    round_down: Callable[[jax.Array], jax.Array] | None = None
    least: float = TINY
    largest: float = 1.0


class Options(NamedTuple):
    """How to encode a moment."""

    signed: bool = True
    """Whether x has a sign. If not, positive numbers become at least `Code.least`."""
    round_down: bool = False
    """Whether to use `Code.round_down`, if the code has it."""
    saturate: bool = False
    """Whether to replace an Inf scale by the largest finite number, because the square of a finite
    gradient overflows above 1.8e19."""


def scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Return the shape of the scales of an array with this shape."""
    return (*shape[:-1], -(-shape[-1] // block))


def decode(code: Code, stored: QuantizedLeaf) -> jax.Array:
    """Return the moment in float32."""
    y = code.decode(stored.codes)
    return y * per_element(stored.scales, stored.elements_per_scale, y.shape[-1])


def encode(
    code: Code,
    x: jax.Array,
    draw: jax.Array,
    block: int,
    block_absmax: Callable[[jax.Array], jax.Array] | None,
    options: Options,
) -> QuantizedLeaf:
    """Encode x, keeping block maxima exact; an Inf or NaN makes its block NaN.

    `block_absmax` computes each block's largest magnitude if x is only a part of the leaf.
    """
    n = x.shape[-1]
    block_max = absmax(magnitudes(x), block) if block_absmax is None else block_absmax(x)
    if options.saturate:
        block_max = jnp.where(block_max == jnp.inf, jnp.finfo(block_max.dtype).max, block_max)
    round_down = code.round_down if options.round_down else None
    # coarse scales seldom change; while they don't, rounding down a second time changes nothing
    scales = _round_up_scale(block_max) if round_down else block_max
    scales = jnp.where(jnp.isfinite(block_max), scales, jnp.nan)
    # slightly above 2/scale, so that block maxima map to `largest` exactly. It is a normal
    # number for scales up to 2¹²⁷; above, a block's largest elements share its largest code.
    inverse = at_least(2 * (1 + 2.0**-22) / at_least(scales, TINY), TINY)
    inverse = jnp.where(scales > 0, inverse, 0)
    y = x * per_element(inverse, block, n) * (0.5 * code.largest)
    least = TINY if round_down else code.least
    low = -code.largest if options.signed else jnp.where(x > 0, least, 0)
    y = at_most(at_least(y, low), code.largest)
    codes = round_down(y) if round_down else code.encode(y, draw)
    return QuantizedLeaf(codes, scales)


def at_least(x: jax.Array, low: jax.typing.ArrayLike) -> jax.Array:
    """Return maximum(x, low) in one instruction, without propagating NaN."""
    return jnp.where(x > low, x, low)


def at_most(x: jax.Array, high: jax.typing.ArrayLike) -> jax.Array:
    return jnp.where(x < high, x, high)


def absmax(sizes: jax.Array, block: int) -> jax.Array:
    """Return the maximum of each block of magnitudes."""
    maxima = bits_of(split_blocks(sizes, block))
    # compare halves, so that XLA:CPU runs one vectorized loop. Comparing neighboring groups of 16
    # would make XLA fuse x into the loop, but codes and scales must read the same array x
    while maxima.shape[-1] > 16:
        half = maxima.shape[-1] // 2
        maxima = jnp.maximum(maxima[..., :half], maxima[..., half:])
    return jnp.max(floats_of(maxima), axis=-1)


def split_blocks(magnitudes: jax.Array, block: int) -> jax.Array:
    """Reshape (…, n) to (…, blocks, block), padding the last block with zeros."""
    missing = -magnitudes.shape[-1] % block
    if missing:
        magnitudes = jnp.pad(magnitudes, [(0, 0)] * (magnitudes.ndim - 1) + [(0, missing)])
    return magnitudes.reshape(*magnitudes.shape[:-1], -1, block)


def _round_up_scale(x: jax.Array) -> jax.Array:
    """Round x ≥ 0 up to the next of …, ⅛, ½, 2, 8, …, but at most to 2¹²⁷."""
    up = bits_of(x) + 0x00FFFFFF & ~0x00FFFFFF
    return floats_of(jnp.minimum(up, 0x7F000000))


def magnitudes(x: jax.Array) -> jax.Array:
    """Return |x|, with NaN as Inf, computed on bits: float maxima may ignore NaN."""
    return floats_of(jnp.minimum(bits_of(x) & 0x7FFFFFFF, 0x7F800000))


def bits_of(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def floats_of(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.jit, static_argnames=("block", "n"))  # `stages.py` matches the name
def per_element(per_block: jax.Array, block: int, n: int) -> jax.Array:
    """Repeat the value of each block, to shape (…, n)."""
    repeated = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block))
    repeated = repeated.reshape(*per_block.shape[:-1], -1)
    return repeated if repeated.shape[-1] == n else repeated[..., :n]


@functools.partial(jax.jit, static_argnames="block")  # `stages.py` matches the name
def block_absmax(x: jax.Array, width: jax.Array | None = None, *, block: int) -> jax.Array:
    """Return the largest magnitude of each block, in the first `width` columns if given."""
    sizes = magnitudes(x)
    if width is not None:
        columns = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[-1]), 1)
        sizes = jnp.where(columns < width, sizes, 0)
    return jnp.max(split_blocks(sizes, block), axis=-1)

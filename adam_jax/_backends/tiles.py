"""Tiles of a leaf for kernels: blocks of rows, masked where a tile exceeds the leaf."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adam_jax._backends.step import Extent
from adam_jax.storage._blockwise import block_absmax


class Grid(NamedTuple):
    """A partition of a leaf with two or more axes into tiles along its last two."""

    shape: tuple[int, ...]
    rows: int
    columns: int
    downwards: bool = False
    """Whether the tile's row index varies fastest, for sums that accumulate in one block."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of tiles along each axis."""
        *leading, rows, columns = self.shape
        return *leading, pl.cdiv(rows, self.rows), pl.cdiv(columns, self.columns)

    @property
    def tiles(self) -> int:
        return math.prod(self.counts)

    @property
    def all_axes(self) -> tuple[int, ...]:
        return tuple(range(len(self.shape)))

    def at(self, i: jax.Array) -> tuple[jax.Array, ...]:
        """Return the multi-index of the i-th tile."""
        *leading, rows, columns = enumerate(self.counts)
        fastest = [rows, columns] if self.downwards else [columns, rows]
        indices: dict[int, jax.Array] = {}
        for axis, count in (*fastest, *reversed(leading)):
            indices[axis] = jax.lax.rem(i, jnp.int32(count))
            i = jax.lax.div(i, jnp.int32(count))
        return tuple(indices[axis] for axis in range(len(self.counts)))

    def block(self, extent: Extent) -> tuple[int, int]:
        """Return the shape of a tile of an array."""
        size = self.rows, pl.cdiv(self.columns, extent.span)
        last = len(self.shape) - 2, len(self.shape) - 1
        rows, columns = (1 if k in extent.reduced else n for k, n in zip(last, size, strict=True))
        return rows, columns

    def spec(self, extent: Extent) -> pl.BlockSpec:
        """Return the BlockSpec of an array of a leaf."""
        leading = [None] * (len(self.shape) - 2)
        return pl.BlockSpec((*leading, *self.block(extent)), self._index(extent))

    def _index(self, extent: Extent) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
        def index(i: jax.Array) -> tuple[jax.Array, ...]:
            at = self.at(i)
            return tuple(jnp.int32(0) if k in extent.reduced else x for k, x in enumerate(at))

        return index

    def sums(self, extent: Extent) -> Sums:
        """Return where to write sums over an extent's reduced axes.

        If tiles follow each other downwards, sums over rows accumulate in one block. Otherwise, and
        for sums over columns only, each tile writes its own sum.
        """
        accumulated = self.downwards and len(self.shape) - 2 in extent.reduced
        axes = () if accumulated else extent.reduced
        counts = [self.counts[k] for k in axes]

        def index(i: jax.Array) -> tuple[jax.Array, ...]:
            at, part = self.at(i), jnp.int32(0)
            for axis, count in zip(axes, counts, strict=True):
                part = part * count + at[axis]
            return part, *self._index(extent)(i)

        def is_first(i: jax.Array) -> jax.Array:
            at = self.at(i)
            return functools.reduce(jnp.logical_and, [at[k] == 0 for k in extent.reduced])

        reduced = [1 if k in extent.reduced else n for k, n in enumerate(self.shape)]
        leading = [None] * (len(self.shape) - 2)
        return Sums(
            extent,
            pl.BlockSpec((None, *leading, *self.block(extent)), index),
            jax.ShapeDtypeStruct((math.prod(counts), *reduced), jnp.float32),
            is_first if accumulated else None,
        )

    def view(self, x: jax.Array) -> jax.Array:
        """Reshape an operand to the grid's axes."""
        if x.ndim == len(self.shape):
            return x
        return x.reshape(*self.shape[:-1], x.shape[-1])

    def rows_and_columns(self, i: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Return a tile's rows (raveled over all axes but the last), first column, and width."""
        *leading, row, column = self.at(i)
        first = jnp.int32(0)
        for index, size in zip(leading, self.shape, strict=False):
            first = first * size + index
        return first * self.shape[-2] + self._rows(row), column * self.columns, self.columns

    def mask(self, i: jax.Array, extent: Extent) -> jax.Array | None:
        """Return which elements of a tile are in the leaf, or None if all are."""
        *_, row, column = self.at(i)
        ndim = len(self.shape)
        masks = []
        if self.shape[-2] % self.rows and ndim - 2 not in extent.reduced:
            masks.append(self._rows(row) < self.shape[-2])
        if self.shape[-1] % self.columns and ndim - 1 not in extent.reduced:
            masks.append(self._columns(column, extent.span) < self.shape[-1])
        return functools.reduce(jnp.logical_and, masks) if masks else None

    def owned(self, i: jax.Array, x: jax.Array) -> jax.Array:
        """Zero the elements of x outside the leaf."""
        mask = self.mask(i, Extent())
        return x if mask is None else jnp.where(mask, x, 0)

    def block_absmax(self, i: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
        """Return a function that computes block maxima and ignores elements outside the leaf."""
        is_ragged = self.shape[-1] % self.columns != 0
        width = self.shape[-1] - self.at(i)[-1] * self.columns if is_ragged else None
        return lambda x, block: block_absmax(x, width, block=min(block, self.columns))

    def _rows(self, tile: jax.Array) -> jax.Array:
        return tile * self.rows + jax.lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)

    def _columns(self, tile: jax.Array, span: int) -> jax.Array:
        iota = jax.lax.broadcasted_iota(jnp.int32, (1, pl.cdiv(self.columns, span)), 1)
        return tile * self.columns + iota * span


class Sums(NamedTuple):
    """The destination of a kernel's sums over tiles."""

    extent: Extent
    spec: pl.BlockSpec
    type: jax.ShapeDtypeStruct
    """Partial sums along the first axis."""
    is_first: Callable[[jax.Array], jax.Array] | None
    """Whether the i-th tile is the first of its block, if tiles add to one block."""


def for_registers(shape: tuple[int, ...], block: int, reduced: bool, moved: float) -> Grid:
    """Return small tiles for a GPU. Their row and column counts are powers of two.

    Tiles split no block. Among the widths with the least padding, the widest is used. With
    `reduced`, tiles are tall, because each writes a sum per column.
    """
    del moved
    size, most = (8192, 256) if reduced else (2048, 2048)
    leading = shape[:-2] if reduced else ()
    rows, columns = math.prod(shape[len(leading) : -1]), shape[-1]
    least = max(block, min(128, pl.next_power_of_2(columns)))
    widths = [2**k for k in range(size.bit_length()) if least <= 2**k <= max(most, least)]
    wide = min(reversed(widths), key=lambda width: -columns % width)
    high = min(size // wide, pl.next_power_of_2(rows))
    return Grid((*leading, rows, columns), high, wide)


def for_vectors(shape: tuple[int, ...], block: int, reduced: bool, moved: float) -> Grid:
    """Return tiles for a TPU's vector unit: multiples of (8, 128), or whole axes.

    Tiles span whole rows or a multiple of 128 scales. Merging the leading axes might copy the leaf.
    A TPU runs one tile after the other, so sums over rows can accumulate in one block. Two
    tiles of each array must fit in vector memory, next to scratch memory. `moved` is the number of
    bytes read and written per element.
    """
    size, lanes = 2**18 if moved <= 24 else 2**17, 128
    shape = (*(1 for _ in shape[:-1]), 1, *shape)[-max(2, len(shape)) :]
    rows, columns = shape[-2:]
    most = lanes * max(lanes, block)
    whole = columns if block % lanes else pl.cdiv(columns, block) * block
    wide = most if columns > most else whole
    high = max(8, size // max(wide, lanes) // 8 * 8)
    return Grid(shape, min(rows, high), wide, downwards=reduced)

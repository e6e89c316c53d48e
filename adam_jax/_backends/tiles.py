"""Tiles of a leaf for kernels: blocks of rows, masked where a tile exceeds the leaf."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adam_jax.storage._blockwise import split_blocks


class Grid(NamedTuple):
    """A partition of a leaf with two or more axes into tiles along its last two."""

    shape: tuple[int, ...]
    rows: int
    columns: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of tiles along each axis."""
        *leading, rows, columns = self.shape
        return *leading, pl.cdiv(rows, self.rows), pl.cdiv(columns, self.columns)

    @property
    def tiles(self) -> int:
        return math.prod(self.counts)

    def at(self, i: jax.Array) -> tuple[jax.Array, ...]:
        """Return the multi-index of the i-th tile."""
        indices = []
        for count in reversed(self.counts):
            indices.append(jax.lax.rem(i, jnp.int32(count)))
            i = jax.lax.div(i, jnp.int32(count))
        return tuple(reversed(indices))

    def spec(self, span: int) -> pl.BlockSpec:
        """Return the BlockSpec of an array with one column per `span` columns of the leaf."""
        leading = [None] * (len(self.shape) - 2)
        return pl.BlockSpec((*leading, self.rows, pl.cdiv(self.columns, span)), self.at)

    def view(self, x: jax.Array) -> jax.Array:
        """Reshape an operand to the grid's axes."""
        return x.reshape(*self.shape[:-1], x.shape[-1])

    def rows_and_columns(self, i: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Return a tile's rows, raveled over all axes but the last, its first column, and width."""
        *leading, row, column = self.at(i)
        first = jnp.int32(0)
        for index, size in zip(leading, self.shape, strict=False):
            first = first * size + index
        return first * self.shape[-2] + self._rows(row), column * self.columns, self.columns

    def mask(self, i: jax.Array, span: int) -> jax.Array | None:
        """Return which elements of a tile are in the leaf, or None if all are."""
        *_, row, column = self.at(i)
        masks = []
        if self.shape[-2] % self.rows:
            masks.append(self._rows(row) < self.shape[-2])
        if self.shape[-1] % self.columns:
            masks.append(self._columns(column, span) < self.shape[-1])
        return functools.reduce(jnp.logical_and, masks) if masks else None

    def owned(self, i: jax.Array, x: jax.Array) -> jax.Array:
        """Zero the elements of x outside the leaf."""
        mask = self.mask(i, 1)
        return x if mask is None else jnp.where(mask, x, 0)

    def block_absmax(self, i: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
        """Return a function that computes block maxima and ignores elements outside the leaf."""

        def largest(magnitudes: jax.Array, block: int) -> jax.Array:
            if self.shape[-1] % self.columns:
                inside = self._columns(self.at(i)[-1], 1) < self.shape[-1]
                magnitudes = jnp.where(inside, magnitudes, 0)
            return jnp.max(split_blocks(magnitudes, min(block, self.columns)), axis=-1)

        return largest

    def _rows(self, tile: jax.Array) -> jax.Array:
        return tile * self.rows + jax.lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)

    def _columns(self, tile: jax.Array, span: int) -> jax.Array:
        iota = jax.lax.broadcasted_iota(jnp.int32, (1, pl.cdiv(self.columns, span)), 1)
        return tile * self.columns + iota * span


def for_registers(shape: tuple[int, ...], block: int) -> Grid:
    """Return small tiles for a GPU, whose rows and columns are powers of two.

    Tiles split no block. Among the widths with the least padding, the widest is used.
    """
    size = 2048
    rows, columns = math.prod(shape[:-1]), shape[-1]
    least = max(block, min(128, pl.next_power_of_2(columns)))
    widths = [2**k for k in range(size.bit_length()) if least <= 2**k <= max(size, least)]
    wide = min(reversed(widths), key=lambda width: -columns % width)
    return Grid((rows, columns), min(size // wide, pl.next_power_of_2(rows)), wide)


def for_vectors(shape: tuple[int, ...], block: int) -> Grid:
    """Return tiles for a TPU's vector unit: multiples of (8, 128), or whole axes.

    Tiles span whole rows or a multiple of 128 scales. Merging the leading axes might copy the leaf.
    """
    size, lanes = 2**17, 128
    shape = (*(1 for _ in shape[:-1]), 1, *shape)[-max(2, len(shape)) :]
    rows, columns = shape[-2:]
    most = lanes * max(lanes, block)
    whole = columns if block % lanes else pl.cdiv(columns, block) * block
    wide = most if columns > most else whole
    high = max(8, size // max(wide, lanes) // 8 * 8)
    return Grid(shape, min(rows, high), wide)

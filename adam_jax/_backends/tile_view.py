"""A view of a leaf in the tiles of a TPU's memory: 8 rows and 128 columns.

On TPUs, splitting rows into blocks copies a leaf. This view needs no copy, because its tiles have
the order of the leaf in memory. Its last axis is one block of int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_jax._backends.step import Extent, Operands, Result, Step, extents
from adam_jax.storage._random_bits import Position

ROWS, COLUMNS = 8, 128


def fits(operands: Operands) -> bool:
    """Whether tiles divide the leaf, and a tile's rows are blocks of its quantized moments."""
    shape = operands.update.shape
    spans = {extent.span for extent in extents(operands[:4], shape)}
    divides = len(shape) >= 2 and shape[-2] % ROWS == 0 and shape[-1] % COLUMNS == 0
    return divides and spans == {1, COLUMNS}


def split(operands: Operands) -> Operands:
    """Return views of shape (…, rows / 8, columns / 128, 8, 128)."""
    shape = operands.update.shape
    arrays, tree = jax.tree.flatten(operands[:4])
    u, g, p, moments = tree.unflatten(map(_split, arrays, extents(operands[:4], shape)))
    return operands._replace(update=u, grad=g, param=p, moments=moments)


def _split(x: jax.Array, extent: Extent) -> jax.Array:
    *leading, rows, columns = x.shape
    height = 1 if x.ndim - 2 in extent.reduced else ROWS
    width = 1 if x.ndim - 1 in extent.reduced else COLUMNS // extent.span
    return x.reshape(*leading, rows // height, height, columns // width, width).swapaxes(-3, -2)


def joined(result: Result, step: Step, operands: Operands) -> Result:
    """Convert the results for a leaf's view to results for the leaf."""
    old = Result(step.aliased.of(operands), operands.moments)
    return jax.tree.map(lambda x, like: x.swapaxes(-3, -2).reshape(like.shape), result, old)


def positions(shape: Sequence[int]) -> Position:
    """Return positions in the leaf, with one row and one first column for each row of a tile."""
    *leading, rows, columns = shape
    tiles = (*leading, rows // ROWS, columns // COLUMNS, ROWS, 1)

    def iota(axis: int) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.uint32, tiles, axis)

    n = len(leading)
    row: Any = jnp.uint32(0)
    for axis, size in enumerate(leading):
        row = row * jnp.uint32(size) + iota(axis)
    row = row * jnp.uint32(rows) + iota(n) * jnp.uint32(ROWS) + iota(n + 2)
    column = iota(n + 1) * jnp.uint32(COLUMNS)
    lane = jax.lax.broadcasted_iota(jnp.uint32, (*(1 for _ in tiles[:-1]), COLUMNS), n + 3)
    return Position(row, column, lane)

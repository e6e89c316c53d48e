"""A loop over the tiles of a leaf that updates it in place, with temporary buffers of one tile.

Directions overwrite gradients; new parameters overwrite old ones. Each tile is read and computed
inside a `lax.cond`. Without this boundary, XLA fuses reads of one buffer into writes of another,
and copies a whole buffer in each iteration. The loop carries bfloat16 results as bits, because
XLA:CPU would convert the whole array to float32 and back for every tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from adam_jax._backends import unaligned, xla
from adam_jax._backends.per_shard import Shard, per_shard
from adam_jax._backends.step import (
    Extent,
    Means,
    Operands,
    Part,
    Result,
    Step,
    complete,
    extents,
    known_mean,
    mean_sizes,
    next_averaged,
)
from adam_jax._util.typing import PyTree
from adam_jax.storage._moments import block_size, map_reduced
from adam_jax.storage._random_bits import Position

TILE = {"cpu": 2**17}
"""Elements in a tile, by platform; on CPU, a tile fits a core's cache."""
LARGE_TILE = 2**23
"""Elements in a tile on other platforms, where each tile costs a launch."""


def execute_leaf(step: Step, operands: Operands, sharding: NamedSharding | None) -> Result:
    """Run the step tile by tile, or in one piece if the leaf fits in a tile or is a batch."""
    if step.batch_axes or operands.update.size <= TILE.get(step.platform, LARGE_TILE):
        return xla.execute_leaf(step, operands, sharding)
    return per_shard(functools.partial(_execute_shard, step), step, operands, sharding)


def _execute_shard(step: Step, operands: Operands, shard: Shard) -> Result:
    if shard.unaligned:
        return unaligned.execute_shard(step, operands, shard)
    written = Result(step.aliased.of(operands), map_reduced(_zeros, operands.moments))
    # a row is the largest block, but at least 128, because random bits cost a hash per row
    block = max([128, *(block_size(x) for moments in operands.moments for x in moments)])
    grid = _Grid.of(operands.update.shape, block, TILE.get(step.platform, LARGE_TILE))
    old_bits = _as_bits(written)

    def tile_operands(tile: _Tile, old: Result) -> tuple[Operands, Part]:
        output, moments = _as_given(tile.read(old), written)
        # in `old`, sums over the previous tiles replace reduced moments
        moments = map_reduced(lambda _, x: tile.read(x), moments, operands.moments)
        u, g, p = (
            output if x is written.output else tile.read(x)
            for x in (operands.update, operands.grad, operands.param)
        )

        def position() -> Position:
            return shard.position(*tile.rows_and_columns(), grid.lanes, grid.shape)

        given = Operands(u, g, p, moments, operands.scalars, operands.seeds)
        return given, Part(known_mean(means), position)

    def add(tile: _Tile, sums: Sequence[jax.Array]) -> Sequence[jax.Array]:
        def new() -> Sequence[jax.Array]:
            xs = next_averaged(step, *tile_operands(tile, old_bits), means)
            zeros = jax.tree.map(jnp.zeros_like, xs)
            return [jnp.sum(x) for x in tile.owned(xs, zeros, like=xs)]

        return jax.tree.map(jnp.add, sums, tile.in_cond(new))

    def advance(tile: _Tile, old: Result) -> Result:
        def new() -> Result:
            new = complete(step, *tile_operands(tile, old))
            return tile.owned(_as_bits(new), tile.read(old), like=old)

        return tile.write(old, tile.in_cond(new))

    means: list[Means] = []
    for size in mean_sizes(step, operands):  # one read-only pass per call of `mean`
        zeros = [jnp.zeros([], operands.scalars.dtype)] * size
        means.append(shard.mean_of_sums(grid.loop(add, zeros)))
    return _as_given(grid.loop(advance, old_bits), written)


def _as_bits(tree: Any) -> Any:
    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(bits, tree)


def _as_given(tree: Any, like: Any) -> Any:
    def given(x: jax.Array, as_given: jax.Array) -> jax.Array:
        same = x.dtype == as_given.dtype
        return x if same else jax.lax.bitcast_convert_type(x, as_given.dtype)

    return jax.tree.map(given, tree, like)


class _Grid(NamedTuple):
    """A partition of a leaf along one axis into tiles, each viewed as rows of `lanes` columns.

    Tiles start `step` apart and are `size` long. If the two differ, or `step` doesn't divide the
    axis, neighbors overlap, and an element belongs to the tile whose step contains it.
    """

    shape: tuple[int, ...]
    axis: int
    step: int
    size: int
    block: int

    @classmethod
    def of(cls, shape: tuple[int, ...], block: int, most: int) -> _Grid:
        """Return tiles of about `most` elements that split no block."""
        axis = next(k for k in range(len(shape)) if math.prod(shape[k + 1 :]) <= most)
        if axis < len(shape) - 1:
            step = _divisor(shape[axis], most // math.prod(shape[axis + 1 :]))
            return cls(shape, axis, step, step, block)
        step = min(shape[-1], most) // block * block or shape[-1]
        return cls(shape, axis, step, min(step + shape[-1] % block, shape[-1]), block)

    @property
    def tiles_along(self) -> int:
        """Return the number of tiles along the axis; the last may be longer than a step."""
        return max(1, -(-(self.shape[self.axis] - (self.size - self.step)) // self.step))

    @property
    def lanes(self) -> int:
        """Return the row length: a block if blocks divide the tile's width, else the width."""
        width = self.size if self.axis == len(self.shape) - 1 else self.shape[-1]
        return width if width % self.block else self.block

    def loop(self, advance: Callable[[_Tile, Any], Any], state: Any) -> Any:
        tiles = self.tiles_along * math.prod(self.shape[: self.axis])
        return jax.lax.fori_loop(0, tiles, lambda i, s: advance(_Tile(self, i, tiles), s), state)


def _divisor(n: int, most: int) -> int:
    """Return the largest divisor of n in (most/2, most], or min(n, most) if there is none."""
    most = min(n, most)
    return next((d for d in range(most, most // 2, -1) if n % d == 0), most)


class _Tile(NamedTuple):
    """The i-th tile of a grid, seen as a matrix with `lanes` columns."""

    grid: _Grid
    i: jax.Array
    tiles: int

    def _lead_and_start(self) -> tuple[jax.Array, jax.Array]:
        """Return the raveled index over the leading axes, and the tile's start along the axis."""
        grid = self.grid
        start = jnp.minimum(
            self.i % grid.tiles_along * grid.step, grid.shape[grid.axis] - grid.size
        )
        return self.i // grid.tiles_along, start

    def _slices(self, extent: Extent) -> tuple[list[Any], list[int]]:
        """Return the tile's start and shape in an array of this extent."""
        grid = self.grid
        lead, start = self._lead_and_start()
        starts: list[Any] = [*jnp.unravel_index(lead, grid.shape[: grid.axis])] if grid.axis else []
        starts += [start] + [jnp.zeros_like(start)] * (len(grid.shape) - 1 - grid.axis)
        sizes = [1] * grid.axis + [grid.size, *grid.shape[grid.axis + 1 :]]
        for axis in extent.reduced:
            starts[axis], sizes[axis] = jnp.zeros_like(start), 1
        starts, sizes = [*starts[:-1], starts[-1] // extent.span], sizes
        return starts, [*sizes[:-1], -(-sizes[-1] // extent.span)]

    def in_cond(self, new: Callable[[], Any]) -> Any:
        """Return new(), computed in a `lax.cond` so that XLA doesn't copy buffers."""
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(new))
        return jax.lax.cond(self.i < self.tiles, new, lambda: nothing)

    def read(self, tree: Any) -> Any:
        """Return the tile's part of each array, viewed as rows, with means broadcast."""
        rows = self._rows()

        def part(extent: Extent, x: jax.Array) -> jax.Array:
            x = jax.lax.dynamic_slice(x, *self._slices(extent))
            if extent.reduced:
                x = jnp.broadcast_to(x, self._slices(Extent())[1])
            return x.reshape(rows, -1)

        return self._map(part, tree, tree)

    def write(self, tree: Any, new: Any) -> Any:
        """Write the tile's part of each array, or add it to sums."""

        def put(extent: Extent, x: jax.Array, part: jax.Array) -> jax.Array:
            starts, sizes = self._slices(extent)
            part = part.reshape(sizes)
            if extent.reduced:
                part = part + jax.lax.dynamic_slice(x, starts, sizes)
            return jax.lax.dynamic_update_slice(x, part, starts)

        return self._map(put, tree, tree, new)

    def owned(self, new: Any, old: Any, like: Any) -> Any:
        """Return new where an element belongs to this tile, old where it belongs to a neighbor.

        Reduced moments become sums over the tile's own elements.
        """
        grid = self.grid
        length = grid.shape[grid.axis]
        overlap = grid.size != grid.step or length % grid.step != 0
        first = self.i % grid.tiles_along * grid.step
        is_last = self.i % grid.tiles_along == grid.tiles_along - 1
        last = jnp.where(is_last, length, first + grid.step)

        def is_owned(span: int, shape: tuple[int, ...]) -> jax.Array:
            sizes = self._slices(Extent(span))[1]
            at = jax.lax.broadcasted_iota(jnp.int32, sizes, grid.axis)
            if grid.axis == len(sizes) - 1:
                at = at * span
            at = (self._lead_and_start()[1] + at).reshape(shape)
            return (first <= at) & (at < last)

        def select(extent: Extent, n: jax.Array, o: jax.Array) -> jax.Array:
            if not extent.reduced:
                return jnp.where(is_owned(extent.span, n.shape), n, o) if overlap else n
            n = jnp.where(is_owned(1, n.shape), n, 0) if overlap else n
            return _sum(n.reshape(self._slices(Extent())[1]), extent.reduced)

        return self._map(select, like, new, old)

    def _map(self, f: Callable[..., jax.Array], like: PyTree, *trees: PyTree) -> PyTree:
        """Return the tree of f(the extent of the array in `like`, the arrays in `trees`)."""
        per_tree = map(jax.tree.leaves, trees)
        found = extents(like, self.grid.shape)
        return jax.tree.unflatten(jax.tree.structure(trees[0]), map(f, found, *per_tree))

    def _rows(self) -> int:
        return math.prod(self._slices(Extent())[1]) // self.grid.lanes

    def rows_and_columns(self) -> tuple[jax.Array, jax.Array]:
        """Return where each row of the matrix starts: its raveled row, and its column."""
        grid = self.grid
        lead, start = self._lead_and_start()
        rows_per_tile_row = self._slices(Extent())[1][-1] // grid.lanes
        at = jax.lax.iota(jnp.int32, self._rows())[:, None]
        if grid.axis == len(grid.shape) - 1:
            return jnp.broadcast_to(lead, at.shape), start + at * grid.lanes
        inner = math.prod(grid.shape[grid.axis + 1 : -1])
        row = (lead * grid.shape[grid.axis] + start) * inner + at // rows_per_tile_row
        return row, at % rows_per_tile_row * grid.lanes


def _sum(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Sum over axes, as products with ones: XLA:CPU doesn't vectorize sums of float32."""
    for axis in axes:
        dims = (((axis,), (0,)), ((), ()))
        ones = jnp.ones(x.shape[axis], x.dtype)
        total = jax.lax.dot_general(x, ones, dims, precision=jax.lax.Precision.HIGHEST)
        x = jnp.expand_dims(total, axis)
    return x


def _zeros(stored: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, stored)

"""A loop over tiles of a leaf, everything updated in place: temporaries of a tile, not of a leaf.

The direction is written over the gradient. Each tile is read and computed inside a `lax.cond`:
without that boundary XLA fuses reads of one buffer past writes of another and copies a whole buffer
in each iteration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_jax import storage
from adam_jax.implementations import cut, xla
from adam_jax.implementations.shards import Shard, per_shard
from adam_jax.implementations.steps import Step, asked, finish
from adam_jax.storage import Blocks
from adam_jax.storage.noise import Place

TILE = 2**17
"""Elements in a tile: they fit a core's cache, and the loop over them costs little."""


def where_coded(leaf: Callable[..., Step], asks: Sequence[int], *operands: Any) -> Any:
    """Streams a leaf whose state is coded; XLA fuses the others well."""
    coded = any(storage.is_coded(x) for moments in operands[3] for x in moments)
    return (run if coded else xla.run)(leaf, asks, *operands)


def run(leaf: Callable[..., Step], asks: Sequence[int], u: jax.Array, *operands: Any) -> Any:
    """The step of a leaf tile by tile; of a leaf that is no larger than a tile, at once."""
    if u.size <= TILE:
        return xla.run(leaf, asks, u, *operands)
    return per_shard(functools.partial(_run, leaf, asks), u, *operands)


def _run(
    leaf: Callable[..., Step],
    asks: Sequence[int],
    u: jax.Array,
    g: jax.Array | None,
    p: jax.Array | None,
    stored: Any,
    scalars: jax.Array,
    key: jax.Array | None,
    shard: Shard,
) -> Any:
    """The step of what one device has of a leaf."""
    if shard.cut:
        return cut.run(leaf, u, g, p, stored, scalars, key, shard)
    shape = u.shape
    block = max([1, *(storage.block_of(x) for moments in stored for x in moments)])
    # two axes: a block in each row where blocks fit, else the leaf's own rows
    width = shape[-1] if shape[-1] % block else block
    view = functools.partial(jax.tree.map, lambda x: x.reshape(u.size // width, -1))
    g, p, before = view(g), view(p), view((u, stored))
    means: list[Sequence[jax.Array]] = []

    def step(tile: _Tile, old: Any) -> Step:
        u, stored = tile.read(old)
        place = tile.place(shard, shape)
        return leaf(u, *tile.read((g, p)), stored, scalars, key, place)

    def add(tile: _Tile, sums: Any) -> Any:
        def new() -> Any:
            xs = asked(step(tile, before), means)
            return [jnp.sum(x) for x in tile.where_new(xs, jax.tree.map(jnp.zeros_like, xs))]

        return jax.tree.map(jnp.add, sums, tile.bounded(new))

    def advance(tile: _Tile, old: Any) -> Any:
        def new() -> Any:
            known = iter(means)
            return tile.where_new(finish(step(tile, old), lambda _: next(known)), tile.read(old))

        return tile.write(old, tile.bounded(new))

    regions = _regions(u.size // width, width, block)
    for count in asks:  # each mean takes a pass of its own, in which nothing is written
        sums = [jnp.zeros([], scalars.dtype)] * count
        for region in regions:
            sums = region.loop(add, sums)
        means.append(shard.mean(sums))
    after = before
    for region in regions:
        after = region.loop(advance, after)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), after, (u, stored))


class _Region(NamedTuple):
    """A range of columns, cut into tiles of equal size; the lowest may reach back over others."""

    rows: int
    columns: int
    height: int
    column: int
    width: int
    across: int

    def loop(self, advance: Callable[[_Tile, Any], Any], state: Any) -> Any:
        down = -(-self.rows // self.height)
        tiles = down * self.across
        return jax.lax.fori_loop(0, tiles, lambda i, s: advance(_Tile(self, i, tiles), s), state)


def _regions(rows: int, width: int, block: int) -> list[_Region]:
    """Tiles of at most TILE elements that cut no block."""
    if width <= TILE:
        return [_Region(rows, width, _height(rows, TILE // width), 0, width, 1)]
    wide = TILE // block * block
    across, rest = divmod(width, wide)
    regions = [_Region(rows, width, 1, 0, wide, across)]
    if rest:
        height = _height(rows, TILE // rest)
        regions.append(_Region(rows, width, height, wide * across, rest, 1))
    return regions


def _height(rows: int, most: int) -> int:
    """Rows in a tile: a divisor of all if there is one not much below the most that fits."""
    most = min(rows, most)
    return next((h for h in range(most, most // 2, -1) if rows % h == 0), most)


class _Tile(NamedTuple):
    """The i-th tile of a region."""

    region: _Region
    i: jax.Array
    tiles: int

    def _start(self) -> tuple[jax.Array, jax.Array]:
        region = self.region
        row = self.i // region.across * region.height
        row = jnp.minimum(row, region.rows - region.height)
        return row, region.column + self.i % region.across * region.width

    def bounded(self, new: Callable[[], Any]) -> Any:
        """new(), behind the boundary that keeps XLA from copying buffers."""
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(new))
        return jax.lax.cond(self.i < self.tiles, new, lambda: nothing)

    def read(self, tree: Any) -> Any:
        row, column = self._start()

        def part(x: jax.Array, block: int) -> jax.Array:
            size = (self.region.height, -(-self.region.width // block))
            return jax.lax.dynamic_slice(x, (row, column // block), size)

        return jax.tree.map(part, tree, _spans(tree))

    def write(self, tree: Any, parts: Any) -> Any:
        row, column = self._start()

        def put(x: jax.Array, new: jax.Array, block: int) -> jax.Array:
            return jax.lax.dynamic_update_slice(x, new, (row, column // block))

        return jax.tree.map(put, tree, parts, _spans(tree))

    def where_new(self, new: Any, old: Any) -> Any:
        """new, but for the rows that an earlier tile has done."""
        if self.region.rows % self.region.height == 0:
            return new
        row = self._start()[0] + jax.lax.iota(jnp.int32, self.region.height)[:, None]
        fresh = row >= self.i // self.region.across * self.region.height
        return jax.tree.map(lambda n, o: jnp.where(fresh, n, o), new, old)

    def place(self, shard: Shard, shape: tuple[int, ...]) -> Place:
        """Where the tile's elements lie in the leaf, of which the shard has this shape."""
        row, column = self._start()
        row = (row + jax.lax.iota(jnp.int32, self.region.height))[:, None]
        per_row = shape[-1] // self.region.columns  # more than one where rows are blocks
        column = row % per_row * self.region.columns + column
        return shard.place(row // per_row, column, self.region.width, shape)


def _spans(tree: Any) -> Any:
    """How many of the leaf's columns one column of each array stands for."""

    def span(x: Any) -> Any:
        return Blocks(1, storage.block_of(x)) if isinstance(x, Blocks) else 1

    return jax.tree.map(span, tree, is_leaf=lambda x: isinstance(x, Blocks))

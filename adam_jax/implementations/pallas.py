"""One kernel for any rule and any storage: the step of a leaf, traced on a tile of it.

Each tile is read once and written once, over what was read. Triton compiles the kernel on GPUs and
Mosaic on TPUs; on CPUs it is interpreted, which is slow and for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from adam_jax import storage
from adam_jax.arithmetic import arithmetic_dtype
from adam_jax.implementations import cut, stream, tiles
from adam_jax.implementations.hoist import hoist
from adam_jax.implementations.shards import Shard, per_shard
from adam_jax.implementations.steps import Step, asked, finish
from adam_jax.implementations.tiles import Grid
from adam_jax.storage import Blocks


class Target(NamedTuple):
    """What kernels for one kind of device have of their own."""

    grid: Callable[[tuple[int, ...], int], Grid]
    """(a leaf's shape, the largest of its blocks) → its tiles."""
    parameters: Any
    """The compiler's, which also say which compiler it is."""
    scalars: pl.BlockSpec
    """Where scalars lie."""
    masked: bool = False
    """Whether reading and writing outside of an array has to be prevented."""
    drop: Collection[str] = ("optimization_barrier",)
    """Primitives that are for XLA alone."""
    interpret: bool = False


TRITON = Target(
    tiles.for_registers, triton.CompilerParams(num_warps=4), pl.BlockSpec(), masked=True
)
MOSAIC = Target(tiles.for_vectors, tpu.CompilerParams(), pl.BlockSpec(memory_space=tpu.SMEM))
TARGETS = {
    ("cpu",): TRITON._replace(drop=(), interpret=True),
    ("cuda", "rocm"): TRITON,
    ("tpu",): MOSAIC,
}
"""By the platforms that a program may be lowered for."""


def run(
    leaf: Callable[..., Step], asks: Sequence[int], over: int, u: jax.Array, *operands: Any
) -> Any:
    """The step of a leaf in a kernel; in tiles where its arithmetic is not float32."""
    wide = arithmetic_dtype(*storage.dtypes((u, *operands[:3]))) != jnp.float32
    if wide or u.ndim == 0:
        return stream.run(leaf, asks, over, u, *operands)
    return per_shard(functools.partial(_run, leaf, asks, over), over, u, *operands)


def _run(leaf: Callable[..., Step], asks: Sequence[int], over: int, *operands: Any) -> Any:
    """The step of what one device has of a leaf, on whatever kind of device."""
    *tiled, scalars, key, shard = operands
    if shard.cut:
        return cut.run(leaf, *operands)
    on: dict[str, Callable[..., Any]] = {}
    for platforms, kind in TARGETS.items():
        on |= dict.fromkeys(platforms, functools.partial(_on, kind, leaf, asks, over, shard))
    return jax.lax.platform_dependent(tiled, (scalars, key, shard.origin), **on)


def _on(
    target: Target,
    leaf: Callable[..., Step],
    asks: Sequence[int],
    over: int,
    shard: Shard,
    tiled: Any,
    small: Any,
) -> Any:
    """The step on one kind of device."""
    u, *_, stored = tiled
    arrays, tree = jax.tree.flatten(tiled)
    spans = jax.tree.leaves(_spans(tiled))
    grid = target.grid(u.shape, max(spans))
    call = functools.partial(_call, target, grid, [grid.view(x) for x in arrays], spans)

    def step(i: jax.Array, parts: Sequence[jax.Array], small: Any) -> Step:
        scalars, key, origin = small
        place = shard._replace(origin=origin).place(*grid.rows_and_columns(i), u.shape)
        return leaf(*tree.unflatten(parts), scalars, key, place, grid.share(i))

    def sums(i: jax.Array, parts: Sequence[jax.Array], small: Any, means: Any) -> Any:
        xs = asked(step(i, parts, small), means)
        return [jnp.sum(grid.owned(i, x), keepdims=True) for x in xs]

    def advance(i: jax.Array, parts: Sequence[jax.Array], small: Any, means: Any) -> Any:
        known = iter(means)
        return finish(step(i, parts, small), lambda _: next(known))

    means: list[Sequence[jax.Array]] = []
    for count in asks:  # each mean takes a pass of its own, in which nothing is written
        partial = call(sums, (small, means), partial_sums=count)
        means.append(shard.mean([jnp.sum(x) for x in partial]))
    numbered = tree.unflatten(range(len(arrays)))
    written = jax.tree.leaves((numbered[over], numbered[3]))
    out = call(advance, (small, means), over=written)
    out = [x.reshape(arrays[k].shape) for x, k in zip(out, written, strict=True)]
    return jax.tree.unflatten(jax.tree.structure((tiled[over], stored)), out)


def _call(
    target: Target,
    grid: Grid,
    arrays: Sequence[jax.Array],
    spans: Sequence[int],
    compute: Callable[..., Any],
    small: Any,
    *,
    over: Sequence[int] = (),
    partial_sums: int = 0,
) -> list[jax.Array]:
    """compute(i, the i-th tiles, *small) for all tiles.

    Its results are written over the arrays of these numbers, or are sums of tiles.
    """
    scalars, tree = jax.tree.flatten(small)
    i = jax.ShapeDtypeStruct((), jnp.int32)
    tile_types = [
        jax.ShapeDtypeStruct((grid.rows, pl.cdiv(grid.columns, span)), x.dtype)
        for x, span in zip(arrays, spans, strict=True)
    ]

    def flat(*operands: Any) -> list[jax.Array]:
        given, (i, *parts) = operands[: len(scalars)], operands[len(scalars) :]
        return jax.tree.leaves(compute(i, parts, *tree.unflatten(given)))

    front, rest = hoist(jax.make_jaxpr(flat)(*scalars, i, *tile_types), len(scalars), target.drop)
    handed = front(*scalars)
    vectors = _pack(handed)
    specs = [grid.spec(span) for span in spans]
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    sums = jax.ShapeDtypeStruct((grid.tiles, 1, 1), jnp.float32)
    sums_spec = pl.BlockSpec((None, 1, 1), lambda i: (i, 0, 0))

    def kernel(*refs: Any) -> None:
        refs_in = refs[len(vectors) : len(vectors) + len(arrays)]
        refs_out = refs[len(vectors) + len(arrays) :]
        i = pl.program_id(0)

        def mask(span: int) -> jax.Array | None:
            return grid.mask(i, span) if target.masked else None

        parts = [_read(ref, mask(span)) for ref, span in zip(refs_in, spans, strict=True)]
        results = rest(*_unpack(refs[: len(vectors)], handed), i, *parts)
        masks = [mask(spans[k]) for k in over] + [None] * partial_sums
        for ref, x, inside in zip(refs_out, results, masks, strict=True):
            _write(ref, x, inside)

    return pl.pallas_call(
        kernel,
        grid=(grid.tiles,),
        in_specs=[*[target.scalars] * len(vectors), *specs],
        out_specs=[specs[k] for k in over] + [sums_spec] * partial_sums,
        out_shape=[types[k] for k in over] + [sums] * partial_sums,
        input_output_aliases={len(vectors) + k: j for j, k in enumerate(over)},
        compiler_params=target.parameters,
        interpret=target.interpret,
        name="adam_jax_step",
    )(*vectors, *arrays)


def _read(ref: Any, mask: jax.Array | None) -> jax.Array:
    return ref[...] if mask is None else triton.load(ref, mask=mask)


def _write(ref: Any, x: jax.Array, mask: jax.Array | None) -> None:
    if mask is None:
        ref[...] = x
    else:
        triton.store(ref, x, mask=mask)


def _pack(scalars: Sequence[jax.Array]) -> list[jax.Array]:
    """Scalars as the operands of a kernel: the floating-point ones, and the others as integers."""
    groups = {jnp.float32: [], jnp.int32: []}
    for x in scalars:
        groups[_word(x)].append(x)
    return [
        jnp.stack([x.astype(d) for x in (*xs, jnp.zeros((), d))])[None] for d, xs in groups.items()
    ]


def _unpack(refs: Sequence[Any], like: Sequence[jax.Array]) -> list[jax.Array]:
    """The scalars back, one by one."""
    next_of = {word: iter(range(len(like))) for word in (jnp.float32, jnp.int32)}
    by_word = dict(zip(next_of, refs, strict=True))
    return [by_word[_word(x)][0, next(next_of[_word(x)])].astype(x.dtype) for x in like]


def _word(x: jax.Array) -> Any:
    return jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32


def _spans(tree: Any) -> Any:
    """How many of the leaf's columns one column of each array stands for."""

    def span(x: Any) -> Any:
        return Blocks(1, storage.size(x)) if isinstance(x, Blocks) else 1

    return jax.tree.map(span, tree, is_leaf=lambda x: isinstance(x, Blocks))

"""One kernel for any rule and any storage: the step of a leaf, traced on a tile of it.

Each tile is read once and written once, over what was read. Triton compiles the kernel on GPUs and
Mosaic on TPUs; on CPUs it is interpreted, which is slow and for tests. Only the kernel of the
platform that a program is traced for is traced, and only a GPU's imports Pallas on Triton, which
jax 0.12 deprecates; `triton.py` keeps its warning from users. `import adam_jax` and steps without a
kernel import no part of Pallas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding

from adam_jax import storage
from adam_jax._backends import tiled, tiles, unaligned
from adam_jax._backends.hoist import hoist
from adam_jax._backends.per_shard import per_shard
from adam_jax._backends.platform import target_platform
from adam_jax._backends.steps import Step, asked, finish
from adam_jax._backends.tiles import Grid
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax.storage import Blocks

Mask = Callable[[], jax.Array | None]
"""Makes the mask of a tile, where a target needs one."""


def _load(ref: Any, mask: Mask) -> jax.Array:
    del mask
    return ref[...]


def _store(ref: Any, x: jax.Array, mask: Mask) -> None:
    del mask
    ref[...] = x


class Target(NamedTuple):
    """What kernels for one platform have of their own."""

    grid: Callable[[tuple[int, ...], int], Grid]
    """(a leaf's shape, the size of its largest block) → its tiles."""
    scalars: pl.BlockSpec
    """The memory that scalars are in."""
    compiler: Any = None
    """Parameters of the compiler; their class selects it."""
    load: Callable[[Any, Mask], jax.Array] = _load
    """Reads a tile: (ref, mask) → array. The default leaves masking to the compiler."""
    store: Callable[[Any, jax.Array, Mask], None] = _store
    """Writes a tile: (ref, array, mask)."""
    drop: Collection[str] = ("optimization_barrier",)
    """Primitives that are for XLA alone."""
    interpret: bool = False
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda kernel: kernel
    """Wraps the call of a kernel."""


def interpreted() -> Target:
    """Return the target of a kernel that XLA runs, on CPUs: tiles as for Triton.

    The interpreter pads arrays to whole tiles and drops the padding of results: it needs no masks.
    """
    return Target(tiles.for_registers, pl.BlockSpec(), drop=(), interpret=True)


def triton() -> Target:
    """Return the target of a kernel that Triton compiles, for GPUs."""
    from adam_jax._backends import triton

    return Target(
        tiles.for_registers,
        pl.BlockSpec(),
        triton.COMPILER,
        load=triton.load,
        store=triton.store,
        wrap=triton.without_warning,
    )


def mosaic() -> Target:
    """Return the target of a kernel that Mosaic compiles, for TPUs."""
    from jax.experimental.pallas import tpu

    return Target(tiles.for_vectors, pl.BlockSpec(memory_space=tpu.SMEM), tpu.CompilerParams())


TARGETS = {"cpu": interpreted, "gpu": triton, "tpu": mosaic}
"""Makes the target of kernels, by the platform that a program is traced for."""


def run(
    leaf: Callable[..., Step],
    asks: Sequence[int],
    over: int,
    sharding: NamedSharding | None,
    u: jax.Array,
    *operands: Any,
) -> Any:
    """Run the step in a kernel, or tile by tile if its arithmetic is not float32."""
    wide = arithmetic_dtype(*storage.dtypes((u, *operands[:3]))) != jnp.float32
    if wide or u.ndim == 0:
        return tiled.run(leaf, asks, over, sharding, u, *operands)
    platform = target_platform()
    if platform not in TARGETS:
        raise NotImplementedError(
            f"implementation='pallas': the platform must be one of {', '.join(TARGETS)}, got "
            f"{platform}; use implementation='stream'"
        )
    step = functools.partial(_run, TARGETS[platform](), leaf, asks, over)
    return per_shard(step, over, sharding, u, *operands)


def _run(
    target: Target, leaf: Callable[..., Step], asks: Sequence[int], over: int, *operands: Any
) -> Any:
    """The step of what one device has of a leaf."""
    *tiled, scalars, key, shard = operands
    if shard.cut:
        return unaligned.run(leaf, *operands)
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

    small = scalars, key, shard.origin
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

        masks = [functools.partial(grid.mask, i, span) for span in spans]
        parts = [target.load(*pair) for pair in zip(refs_in, masks, strict=True)]
        results = rest(*_unpack(refs[: len(vectors)], handed), i, *parts)
        out_masks = [masks[k] for k in over] + [lambda: None] * partial_sums
        for written in zip(refs_out, results, out_masks, strict=True):
            target.store(*written)

    call = pl.pallas_call(
        kernel,
        grid=(grid.tiles,),
        in_specs=[*[target.scalars] * len(vectors), *specs],
        out_specs=[specs[k] for k in over] + [sums_spec] * partial_sums,
        out_shape=[types[k] for k in over] + [sums] * partial_sums,
        input_output_aliases={len(vectors) + k: j for j, k in enumerate(over)},
        compiler_params=target.compiler,
        interpret=target.interpret,
        name="adam_jax_step",
    )
    return target.wrap(call)(*vectors, *arrays)


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

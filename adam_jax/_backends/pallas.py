"""Pallas kernels for any rule and storage: the step of a leaf, traced on one tile.

The kernel reads each tile once and updates it in place. Triton compiles it on GPUs, and Mosaic on
TPUs; on CPUs it is interpreted, which is slow and meant for tests. Only the target platform's
kernel is traced. Only GPU kernels import Pallas on Triton, which jax 0.12 deprecates;
`kernel_call.py` hides the warning. `import adam_jax` and steps without a kernel don't import
Pallas.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding

from adam_jax._backends import stages, tiled, tiles, unaligned
from adam_jax._backends.hoist import hoist
from adam_jax._backends.kernel_call import kernel_call, unsupported
from adam_jax._backends.per_shard import Shard, per_shard
from adam_jax._backends.rewrite import SIMPLER, Rewriting, rewrite
from adam_jax._backends.step import (
    Aliased,
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
from adam_jax._backends.tiles import Grid
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax.storage._moments import dtypes
from adam_jax.storage._random_bits import Position
from adam_jax.storage._reduced import sum_to

Mask = Callable[[], jax.Array | None]
"""Returns the mask of a tile, or None if the whole tile is in the leaf."""


def _load(ref: Any, mask: Mask) -> jax.Array:
    del mask
    return ref[...]


def _store(ref: Any, x: jax.Array, mask: Mask, at: Any) -> None:
    del mask
    ref[at] = x


class Target(NamedTuple):
    """The platform-specific settings of a kernel."""

    grid: Callable[[tuple[int, ...], int, bool, float], Grid]
    """(a leaf's shape, its largest block size, whether a moment is reduced, bytes read and written
    per element) → its tiles."""
    scalars: pl.BlockSpec
    """The memory space of scalars."""
    compiler: Callable[[int], Any] = lambda _: None
    """The number of elements in a tile → parameters, whose class selects the compiler."""
    load: Callable[[Any, Mask], jax.Array] = _load
    """Reads a tile: (ref, mask) → array. The default leaves masking to the compiler."""
    store: Callable[[Any, jax.Array, Mask, Any], None] = _store
    """Writes a tile, or a part of it: (ref, array, mask, index)."""
    rewritings: Mapping[str, Rewriting] = SIMPLER
    """Other ways to compute primitives."""
    scratch: Callable[[tuple[int, int]], Any] | None = None
    """The shape of a tile → a float32 array in vector memory, if tiles are computed in slices."""
    interpret: bool = False


def interpreted() -> Target:
    """Return the target of an interpreted kernel, for CPUs, with Triton's tiles.

    It needs no masks, because the interpreter pads arrays to whole tiles and crops results.
    """
    return Target(tiles.for_registers, pl.BlockSpec(), rewritings={}, interpret=True)


def triton() -> Target:
    """Return the target of a kernel that Triton compiles, for GPUs."""
    from adam_jax._backends.triton import FAST, compiler, load, store

    return Target(tiles.for_registers, pl.BlockSpec(), compiler, load, store, FAST)


def mosaic() -> Target:
    """Return the target of a kernel that Mosaic compiles, for TPUs."""
    from jax.experimental.pallas import tpu

    from adam_jax._backends.mosaic import FAST

    memory = pl.BlockSpec(memory_space=tpu.SMEM)

    def scratch(shape: tuple[int, int]) -> Any:
        return tpu.VMEM(shape, jnp.float32)

    return Target(
        tiles.for_vectors,
        memory,
        lambda _: tpu.CompilerParams(),
        rewritings=FAST,
        scratch=scratch,
    )


TARGETS = {"cpu": interpreted, "gpu": triton, "tpu": mosaic}
"""Functions that return the target of kernels, by platform."""


def supports(operands: Operands) -> bool:
    """Whether kernels support a leaf: not a scalar, with float32 arithmetic, and suitable means.

    Means must be over one or both of the last two axes, which tiles split, or over all. Partial
    means over other axes would be as large as the leaf.
    """
    shape = operands.update.shape
    ndim = len(shape)

    def is_supported(extent: Extent) -> bool:
        kept = [n for axis, n in enumerate(shape) if axis not in extent.reduced]
        few = math.prod(kept) == 1 or min(extent.reduced, default=ndim) >= ndim - 2
        return not extent.reduced or (few and ndim >= 2)

    if not shape or not all(map(is_supported, extents(operands.moments, shape))):
        return False
    return arithmetic_dtype(*dtypes(operands[:4])) == jnp.float32


def execute_leaf(step: Step, operands: Operands, sharding: NamedSharding | None) -> Result:
    """Run the step in a kernel, or tile by tile if kernels don't support the leaf."""
    if step.batch_axes or not supports(operands):
        return tiled.execute_leaf(step, operands, sharding)
    if step.platform not in TARGETS:
        raise NotImplementedError(
            f"implementation='pallas': the platform must be one of {', '.join(TARGETS)}, got "
            f"{step.platform}; use implementation='stream'"
        )
    execute_shard = functools.partial(_execute_shard, TARGETS[step.platform](), step)
    return per_shard(execute_shard, step, operands, sharding)


def _execute_shard(target: Target, step: Step, operands: Operands, shard: Shard) -> Result:
    if shard.unaligned:
        return unaligned.execute_shard(step, operands, shard)
    leaf_operands, shape = operands[:4], operands.update.shape
    arrays, tree = jax.tree.flatten(leaf_operands)
    kinds = extents(leaf_operands, shape)
    u, _, p, moments = tree.unflatten(range(len(arrays)))
    written = jax.tree.leaves((p if step.aliased is Aliased.PARAM else u, moments))
    is_reduced = any(extent.reduced for extent in kinds)
    tiled_arrays = [k for k in (*range(len(arrays)), *written) if not kinds[k].reduced]
    moved = sum(arrays[k].dtype.itemsize / kinds[k].span for k in tiled_arrays)
    grid = target.grid(shape, max(extent.span for extent in kinds), is_reduced, moved)
    call = functools.partial(_call, target, grid, [grid.view(x) for x in arrays], kinds)

    def tile(i: jax.Array, parts: Sequence[jax.Array], shared: Shared) -> tuple[Operands, Part]:
        scalars, key, seeds, origin, means = shared
        all_seeds: Any = None if key is None else (key, *seeds)
        tile_shard = shard._replace(origin=origin)

        def position() -> Position:
            return tile_shard.position(*grid.rows_and_columns(i), shape)

        part = Part(known_mean(means), position, grid.block_absmax(i))
        u, g, p, moments = tree.unflatten(
            jnp.broadcast_to(x, (grid.rows, grid.columns)) if extent.reduced else x
            for x, extent in zip(parts, kinds, strict=True)
        )
        return Operands(u, g, p, moments, scalars, all_seeds), part

    def sums(i: jax.Array, parts: Sequence[jax.Array], shared: Shared) -> list[jax.Array]:
        xs = next_averaged(step, *tile(i, parts, shared), shared.means)
        return [jnp.sum(grid.owned(i, x), keepdims=True) for x in xs]

    def advance(i: jax.Array, parts: Sequence[jax.Array], shared: Shared) -> list[jax.Array]:
        new = jax.tree.leaves(complete(step, *tile(i, parts, shared)))
        return [
            sum_to(grid.owned(i, x), grid.block(kinds[k])) if kinds[k].reduced else x
            for x, k in zip(new, written, strict=True)
        ]

    seeds = [] if operands.seeds is None else list(operands.seeds)
    key = seeds[0] if seeds else None
    shared = Shared(operands.scalars, key, seeds[1:], shard.origin, [])
    for size in mean_sizes(step, operands):  # one read-only pass per call of `mean`
        partial = call(sums, shared, [Extent(reduced=grid.all_axes)] * size)
        shared.means.append(shard.mean_of_sums([jnp.sum(x) for x in partial]))
    out = call(advance, shared, [kinds[k] if kinds[k].reduced else k for k in written])
    out = [
        (jnp.sum(x, axis=0) if kinds[k].reduced else x).reshape(arrays[k].shape)
        for x, k in zip(out, written, strict=True)
    ]
    replaced = Result(step.aliased.of(operands), operands.moments)
    return jax.tree.unflatten(jax.tree.structure(replaced), out)


class Shared(NamedTuple):
    """The operands that are the same for all tiles."""

    scalars: jax.Array
    key: jax.Array | None
    """The leaf's own seed."""
    seeds: Sequence[jax.Array]
    """The other seeds."""
    origin: Sequence[jax.Array]
    means: list[Means]


def _call(
    target: Target,
    grid: Grid,
    arrays: Sequence[jax.Array],
    kinds: Sequence[Extent],
    compute: Callable[..., Any],
    shared: Shared,
    outputs: Sequence[int | Extent],
) -> list[jax.Array]:
    """Run a kernel that computes compute(i, the i-th tiles, shared) for all tiles.

    For an index in `outputs`, the result overwrites that array. For an extent, the result is
    partial sums over the extent's reduced axes.
    """
    key = [] if shared.key is None else [shared.key]
    scalars, tree = jax.tree.flatten(shared._replace(key=None))
    i = jax.ShapeDtypeStruct((), jnp.int32)
    tile_types = [
        jax.ShapeDtypeStruct(grid.block(extent), x.dtype)
        for x, extent in zip(arrays, kinds, strict=True)
    ]

    def flat(*operands: Any) -> list[jax.Array]:
        (*own, i), parts = operands[len(scalars) : -len(arrays)], operands[-len(arrays) :]
        tile_shared = tree.unflatten(operands[: len(scalars)])._replace(key=own[0] if own else None)
        return jax.tree.leaves(compute(i, parts, tile_shared))

    operands = (*scalars, *key, i, *tile_types)
    try:
        jaxpr = jax.make_jaxpr(flat)(*operands)
        for rewritings in ({}, target.rewritings):  # the first pass inlines calls
            jaxpr = _retrace(functools.partial(rewrite, jaxpr, rewritings=rewritings), operands)
        front, rest = hoist(jaxpr, len(scalars))
    except NotImplementedError as error:
        raise unsupported(grid.shape, error) from error
    hoisted = front(*scalars)
    # the key is passed apart and not hoisted, so that leaves with equal scalars share vectors
    vectors = [*_pack(hoisted), *([x.astype(jnp.int32).reshape(1, 1) for x in key])]
    specs = [grid.spec(extent) for extent in kinds]
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    sums = {j: grid.sums(x) for j, x in enumerate(outputs) if isinstance(x, Extent)}
    replaced = {j: k for j, k in enumerate(outputs) if not isinstance(k, Extent)}
    plan, scratch = None, []
    if target.scratch is not None and stages.fits(kinds, grid.columns):
        plan = stages.plan(rest.jaxpr, grid.columns)
        scratch = [target.scratch((grid.rows, grid.columns)) for _ in plan.kept]

    def kernel(*refs: Any) -> None:
        counts = itertools.accumulate([len(vectors), len(arrays), len(outputs)])
        a, b, c = counts
        i = pl.program_id(0)
        masks = [functools.partial(grid.mask, i, extent) for extent in kinds]

        def read(k: int) -> jax.Array:
            return target.load(refs[a + k], masks[k])

        def write(j: int, x: jax.Array, at: Any = ...) -> None:
            ref = refs[b + j]
            if j in replaced:
                target.store(ref, x, masks[replaced[j]], at)
                return
            is_first = sums[j].is_first
            if is_first is not None:
                x = jnp.where(is_first(i), x, ref[at] + x)
            target.store(ref, x, functools.partial(grid.mask, i, sums[j].extent), at)

        own = [ref[0, 0].astype(x.dtype) for ref, x in zip(refs[2:a], key, strict=True)]
        given = [*_unpack(refs[:2], hoisted), *own, i]
        if plan:
            stages.run(plan, given, refs[a:b], write, refs[c:])
            return
        results = jaxpr_as_fun(rest)(*given, *map(read, range(len(arrays))))
        for j, x in enumerate(results):
            write(j, x)

    call = pl.pallas_call(
        kernel,
        grid=(grid.tiles,),
        in_specs=[*[target.scalars] * len(vectors), *specs],
        out_specs=[sums[j].spec if j in sums else specs[replaced[j]] for j in range(len(outputs))],
        out_shape=[sums[j].type if j in sums else types[replaced[j]] for j in range(len(outputs))],
        input_output_aliases={len(vectors) + k: j for j, k in replaced.items()},
        scratch_shapes=scratch,
        compiler_params=target.compiler(grid.rows * grid.columns),
        interpret=target.interpret,
        name="adam_jax_step",
    )
    return kernel_call(call, grid.shape)(*vectors, *arrays)


def _retrace(function: Callable[..., Any], operands: Sequence[Any]) -> Any:
    return jax.make_jaxpr(lambda *xs: function(operands=xs))(*operands)


def _pack(scalars: Sequence[jax.Array]) -> list[jax.Array]:
    """Pack scalars into two operands, one of float32 and one of int32."""
    groups = {jnp.float32: [], jnp.int32: []}
    for x in scalars:
        groups[_packed_dtype(x)].append(x)
    return [
        jnp.stack([x.astype(d) for x in (*xs, jnp.zeros((), d))])[None] for d, xs in groups.items()
    ]


def _unpack(refs: Sequence[Any], like: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the scalars that `_pack` packed."""
    next_of = {dtype: iter(range(len(like))) for dtype in (jnp.float32, jnp.int32)}
    by_dtype = dict(zip(next_of, refs, strict=True))
    return [
        by_dtype[_packed_dtype(x)][0, next(next_of[_packed_dtype(x)])].astype(x.dtype) for x in like
    ]


def _packed_dtype(x: jax.Array) -> Any:
    return jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32

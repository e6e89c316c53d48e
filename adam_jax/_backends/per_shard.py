"""Run the step of a leaf on each device's shard, so that loops over tiles don't gather the leaf.

If the leaf's sharding is known, `shard_map` runs the step. On explicit mesh axes the sharding is
part of the leaf's type; on automatic axes `zero1` provides it. Otherwise `custom_partitioning`
runs the step, except on TPUs, which don't support it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from adam_jax._backends.step import Extent, Operands, Result, Step, extents
from adam_jax._util import errors
from adam_jax._util.partition_specs import drop_indivisible, names, parts
from adam_jax.storage._moments import block_size
from adam_jax.storage._random_bits import Position


class Shard(NamedTuple):
    """The part of the leaf that a device has."""

    leaf_shape: tuple[int, ...]
    origin: Sequence[jax.Array]
    """The index in the leaf of the shard's first element."""
    axes: tuple[tuple[str, ...], ...] = ()
    """The mesh axes that shard each axis of the leaf; () for a whole leaf."""
    unaligned: tuple[str, ...] = ()
    """The mesh axes that shard the leaf's last axis, if shard edges split blocks."""

    def position(
        self, row: jax.Array, column: jax.Array, width: int, shape: Sequence[int]
    ) -> Position:
        """Return the leaf positions of a part's elements [row, column : column + width]."""
        *leading, last = (jnp.asarray(x, jnp.uint32) for x in self.origin)
        row, column = row.astype(jnp.uint32), column.astype(jnp.uint32)
        if tuple(shape[:-1]) != self.leaf_shape[:-1]:
            indices, row = jnp.unravel_index(row, shape[:-1]), jnp.zeros_like(row)
            for index, first, size in zip(indices, leading, self.leaf_shape, strict=False):
                row = row * jnp.uint32(size) + index + first
        lane = jax.lax.broadcasted_iota(
            jnp.uint32, (*(1 for _ in row.shape[:-1]), width), row.ndim - 1
        )
        return Position(row, column + last, lane)

    def positions(self, shape: Sequence[int]) -> Position:
        """Return the leaf positions of all elements of a part of this shape."""
        row = jnp.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1)
        return self.position(row, jnp.zeros_like(row), shape[-1], shape)

    def mean(self, xs: Sequence[jax.Array], batch_axes: int) -> list[jax.Array]:
        """Return whole-leaf means, or means of each entry, given this shard's arrays."""
        if not batch_axes:
            return self.mean_of_sums([jnp.sum(x) for x in xs])
        sums = [jnp.sum(x, tuple(range(batch_axes, x.ndim)), keepdims=True) for x in xs]
        return self.mean_of_sums(sums, batch_axes)

    def mean_of_sums(self, sums: Sequence[jax.Array], batch_axes: int = 0) -> list[jax.Array]:
        """Return means over the leaf, or over each entry, from sums over this shard."""
        size = math.prod(self.leaf_shape[batch_axes:])
        axes = tuple(name for entry in self.axes[batch_axes:] for name in entry)
        return [(jax.lax.psum(x, axes) if axes else x) / size for x in sums]


def is_unknown(u: jax.Array, sharding: NamedSharding | None) -> bool:
    """Whether a leaf may have a sharding that isn't available until XLA partitions the program."""
    kinds = jax.typeof(u).sharding.mesh.axis_types
    if sharding is not None or AxisType.Explicit in kinds or AxisType.Manual in kinds:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    in_context = mesh.axis_names or mesh.abstract_device is not None
    return (mesh.size if in_context else jax.device_count()) > 1


def per_shard(
    execute_shard: Callable[[Operands, Shard], Result],
    step: Step,
    operands: Operands,
    sharding: NamedSharding | None,
) -> Result:
    """Run the step of each shard; each result has the sharding of the operand it replaces.

    `sharding` is the leaf's sharding on automatic axes, if known.
    """
    u = operands.update
    replaced = Result(step.aliased.of(operands), operands.moments)
    arrays, tree = jax.tree.flatten(operands)
    written = extents(replaced, u.shape)
    sharded: list[Extent | None] = [*extents(operands[:4], u.shape)]
    given = sharded + [None] * (len(arrays) - len(sharded))  # scalars and seeds are replicated
    blocks = [block_size(x) for moments in operands.moments for x in moments]
    indices = [jnp.arange(n, dtype=jnp.uint32) for n in u.shape]

    def local(shard: Shard, *arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(execute_shard(tree.unflatten(arrays), shard))

    def whole(*arrays: jax.Array) -> list[jax.Array]:
        return local(Shard(u.shape, [jnp.uint32(0)] * u.ndim), *arrays)

    def split(mesh: Any, spec: P) -> tuple[Callable[..., Any], list[P], list[P]]:
        """Return the function for each device, and the specs of its operands and results."""
        spec = drop_indivisible(mesh, spec, u.shape)
        axes = tuple(names(entry) for entry in spec)
        last = names(spec[-1])
        columns = u.shape[-1] // parts(mesh, last)
        unaligned = last if any(columns % block for block in blocks) else ()

        def part(*arrays: jax.Array) -> list[jax.Array]:
            origin = [index[0] for index in arrays[-u.ndim :]]
            shard = Shard(u.shape, origin, axes, tuple(unaligned))
            out = local(shard, *arrays[: -u.ndim])
            return [across_shards(x, extent) for x, extent in zip(out, written, strict=True)]

        def across_shards(x: jax.Array, extent: Extent) -> jax.Array:
            summed = tuple(name for k in extent.reduced for name in names(spec[k]))
            return jax.lax.psum(x, summed) if summed else x

        def spec_of(extent: Extent) -> P:
            last = None if unaligned and extent.span > 1 else spec[-1]
            entries = enumerate((*spec[:-1], last))
            return P(*(None if k in extent.reduced else entry for k, entry in entries))

        inputs = [P() if extent is None else spec_of(extent) for extent in given]
        return part, inputs + [P(entry) for entry in spec], [*map(spec_of, written)]

    def mapped(mesh: Any, inputs: Any, outputs: Any, part: Any) -> Callable[..., Any]:
        ins = tuple(inputs)
        shard = jax.shard_map(part, mesh=mesh, in_specs=ins, out_specs=outputs, check_vma=False)
        return _without_derivative(shard)

    typed = jax.typeof(u).sharding
    if AxisType.Manual in typed.mesh.axis_types:
        out = whole(*arrays)
    elif AxisType.Explicit in typed.mesh.axis_types:
        mesh = typed.mesh
        part, inputs, outputs = split(mesh, typed.spec)
        operand_extents = [*given, *[None] * u.ndim]
        placed = [
            x if extent == Extent() else jax.reshard(x, NamedSharding(mesh, spec))
            for x, extent, spec in zip([*arrays, *indices], operand_extents, inputs, strict=True)
        ]
        kept = jax.tree.leaves(replaced)  # in a scan, results must have the types of `replaced`
        out = [
            jax.reshard(x, jax.typeof(k).sharding)
            for x, k in zip(mapped(mesh, inputs, outputs, part)(*placed), kept, strict=True)
        ]
    elif sharding is not None:
        part, inputs, outputs = split(sharding.mesh, sharding.spec)
        out = mapped(sharding.mesh, inputs, outputs, part)(*arrays, *indices)
    elif step.platform == "tpu":  # on several devices JAX raises and recommends shard_map
        out = _without_derivative(whole)(*arrays)
    else:
        out = _partitioned(whole, split, u.ndim, given, written)(*arrays, *indices)
    return jax.tree.unflatten(jax.tree.structure(replaced), out)


def _partitioned(
    whole: Callable[..., Any],
    split: Callable[..., Any],
    ndim: int,
    given: Sequence[Extent | None],
    written: Sequence[Extent],
) -> Callable[..., Any]:
    """Return `whole`, partitioned as `split` specifies, except under vmap."""

    def unsplit(*arrays: jax.Array) -> Any:
        return whole(*arrays[:-ndim])

    def partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
        del result
        part, inputs, outputs = split(mesh, arguments[0].sharding.spec)
        inputs, outputs = ([NamedSharding(mesh, s) for s in specs] for specs in (inputs, outputs))
        return mesh, part, outputs, tuple(inputs)

    partitioned = custom_partitioning(unsplit)
    partitioned.def_partition(partition, sharding_rule=_rule(ndim, given, written))

    @custom_vmap
    def batched(*arrays: jax.Array) -> Any:
        return partitioned(*arrays)

    @batched.def_vmap
    def _(size: int, mapped: Sequence[bool], *arrays: jax.Array) -> Any:
        del size
        out = jax.vmap(unsplit, [0 if m else None for m in mapped])(*arrays)
        return out, [True] * len(out)

    return _without_derivative(batched)


def _without_derivative(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a derivative that raises an error."""

    @jax.custom_jvp
    def underived(*arrays: jax.Array) -> Any:
        return function(*arrays)

    @underived.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise errors.no_derivative("is updated in tiles or shards")

    return underived


def _rule(ndim: int, given: Sequence[Extent | None], written: Sequence[Extent]) -> str:
    """Return the sharding rule for `custom_partitioning`: equal names for equal axes."""
    axes = [f"i{k}" for k in range(ndim)]

    def factors(k: int, extent: Extent | None) -> str:
        if extent is None:
            return f"o{k}"
        own = {ndim - 1} if extent.span > 1 else set(extent.reduced)
        return " ".join(f"s{k}_{axis}" if axis in own else axes[axis] for axis in range(ndim))

    operands = [factors(k, extent) for k, extent in enumerate(given)]
    # operands and results have scales and means in the same order
    at = iter([k for k, extent in enumerate(given) if extent not in (None, Extent())])
    results = [factors(0 if extent == Extent() else next(at), extent) for extent in written]
    return f"{', '.join([*operands, *axes])} -> {', '.join(results)}"

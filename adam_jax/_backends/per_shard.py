"""Run the step of a leaf on each device's shard, so that loops over tiles don't gather the leaf.

If the leaf's sharding is known, `shard_map` runs the step. On explicit mesh axes the sharding is
part of the leaf's type; on automatic axes `zero1` provides it. Otherwise `custom_partitioning`
runs the step, except on TPUs, which don't support it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from adam_jax._backends.step import Operands, Result, Step
from adam_jax._util import errors
from adam_jax._util.partition_specs import drop_indivisible, names, parts
from adam_jax._util.typing import PyTree
from adam_jax.storage._moments import block_size, is_quantized
from adam_jax.storage._random_bits import Position


class Role(enum.Enum):
    """How an array of a step is sharded."""

    LEAF = "like the leaf"
    SCALES = "like the leaf, with the last axis in blocks"
    REPLICATED = "replicated"


class Shard(NamedTuple):
    """The part of the leaf that a device has."""

    leaf_shape: tuple[int, ...]
    origin: Sequence[jax.Array]
    """The index in the leaf of the shard's first element."""
    axes: tuple[str, ...] = ()
    """The mesh axes that shard the leaf."""
    unaligned: tuple[str, ...] = ()
    """The mesh axes that shard the leaf's last axis, if shard edges split blocks."""

    def position(
        self, row: jax.Array, column: jax.Array, width: int, shape: Sequence[int]
    ) -> Position:
        """Return the leaf position of [row, column : column + width] in a part of this shape."""
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

    def mean(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """Return means over the leaf of arrays of this shard."""
        return self.mean_of_sums([jnp.sum(x) for x in xs])

    def mean_of_sums(self, sums: Sequence[jax.Array]) -> list[jax.Array]:
        """Return means over the leaf from sums over this shard."""
        size = math.prod(self.leaf_shape)
        return [(jax.lax.psum(x, self.axes) if self.axes else x) / size for x in sums]


def is_unknown(u: jax.Array, sharding: NamedSharding | None) -> bool:
    """Whether a leaf may have a sharding that only XLA's partitioner knows."""
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
    written = _roles(replaced)
    roles = _roles(operands[:4])
    roles += [Role.REPLICATED] * (len(arrays) - len(roles))
    blocks = [block_size(x) for moments in operands.moments for x in moments]
    indices = [jnp.arange(n, dtype=jnp.uint32) for n in u.shape]

    def local(shard: Shard, *arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(execute_shard(tree.unflatten(arrays), shard))

    def whole(*arrays: jax.Array) -> list[jax.Array]:
        return local(Shard(u.shape, [jnp.uint32(0)] * u.ndim), *arrays)

    def split(mesh: Any, spec: P) -> tuple[Callable[..., Any], list[P], list[P]]:
        """Return the function for each device, and the specs of its operands and results."""
        spec = drop_indivisible(mesh, spec, u.shape)
        axes = [name for entry in spec for name in names(entry)]
        last = names(spec[-1])
        columns = u.shape[-1] // parts(mesh, last)
        unaligned = last if any(columns % block for block in blocks) else ()

        def part(*arrays: jax.Array) -> list[jax.Array]:
            origin = [index[0] for index in arrays[-u.ndim :]]
            shard = Shard(u.shape, origin, tuple(axes), tuple(unaligned))
            return local(shard, *arrays[: -u.ndim])

        scales = P(*spec[:-1], None if unaligned else spec[-1])
        specs = {Role.LEAF: spec, Role.SCALES: scales, Role.REPLICATED: P()}
        inputs = [specs[role] for role in roles] + [P(entry) for entry in spec]
        return part, inputs, [specs[role] for role in written]

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
        given = [
            x if role is Role.LEAF else jax.reshard(x, NamedSharding(mesh, spec))
            for x, role, spec in zip([*arrays, *indices], [*roles, *u.shape], inputs, strict=True)
        ]
        kept = jax.tree.leaves(replaced)  # a scan needs results of the same types
        out = [
            jax.reshard(x, jax.typeof(k).sharding)
            for x, k in zip(mapped(mesh, inputs, outputs, part)(*given), kept, strict=True)
        ]
    elif sharding is not None:
        part, inputs, outputs = split(sharding.mesh, sharding.spec)
        out = mapped(sharding.mesh, inputs, outputs, part)(*arrays, *indices)
    elif step.platform == "tpu":  # on several devices JAX raises and recommends shard_map
        out = _without_derivative(whole)(*arrays)
    else:
        out = _partitioned(whole, split, u.ndim, roles, written)(*arrays, *indices)
    return jax.tree.unflatten(jax.tree.structure(replaced), out)


def _partitioned(
    whole: Callable[..., Any],
    split: Callable[..., Any],
    ndim: int,
    roles: Sequence[Role],
    written: Sequence[Role],
) -> Callable[..., Any]:
    """Return `whole`, which the partitioner splits by `split`, except under vmap."""

    def unsplit(*arrays: jax.Array) -> Any:
        return whole(*arrays[:-ndim])

    def partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
        del result
        part, inputs, outputs = split(mesh, arguments[0].sharding.spec)
        inputs, outputs = ([NamedSharding(mesh, s) for s in specs] for specs in (inputs, outputs))
        return mesh, part, outputs, tuple(inputs)

    partitioned = custom_partitioning(unsplit)
    partitioned.def_partition(partition, sharding_rule=_rule(ndim, roles, written))

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
        raise errors.no_derivative("is stepped in tiles")

    return underived


def _rule(ndim: int, roles: Sequence[Role], written: Sequence[Role]) -> str:
    """Return the sharding rule for `custom_partitioning`: equal names for equal axes."""
    axes = [f"i{k}" for k in range(ndim)]

    def factors(k: int, role: Role) -> str:
        scales = [*axes[:-1], f"s{k}"] if role is Role.SCALES else []
        return " ".join({Role.LEAF: axes, Role.SCALES: scales, Role.REPLICATED: [f"o{k}"]}[role])

    given = [factors(k, role) for k, role in enumerate(roles)]
    # operands and results have their scales in the same order
    at = iter([k for k, role in enumerate(roles) if role is Role.SCALES])
    results = [factors(next(at) if role is Role.SCALES else 0, role) for role in written]
    return f"{', '.join([*given, *axes])} -> {', '.join(results)}"


def _roles(tree: PyTree) -> list[Role]:
    """Return the role of each array of a tree."""
    stored = jax.tree.leaves(tree, is_leaf=is_quantized)
    per_leaf = [(Role.LEAF, Role.SCALES) if is_quantized(x) else (Role.LEAF,) for x in stored]
    return [role for each in per_leaf for role in each]

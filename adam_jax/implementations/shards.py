"""Runs the step of a leaf on each device's shard of it, so that a loop over tiles gathers nothing.

On explicit mesh axes a leaf's type tells how it is sharded, and `shard_map` runs the step. On
automatic axes only the partitioner knows: it asks `custom_partitioning`.
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

from adam_jax import checks, storage
from adam_jax.layouts import fitting, names, parts
from adam_jax.storage import Blocks
from adam_jax.storage.noise import Place


class Shard(NamedTuple):
    """Which part of its leaf an array is."""

    whole: tuple[int, ...]
    """The leaf's shape."""
    origin: Sequence[jax.Array]
    """The index in the leaf of the part's first element."""
    axes: tuple[str, ...] = ()
    """The mesh axes over which the leaf is spread."""
    cut: tuple[str, ...] = ()
    """Those among them over which its last axis is, if that cuts blocks in two."""

    def place(self, row: jax.Array, column: jax.Array, width: int, shape: Sequence[int]) -> Place:
        """Where elements [row, column : column + width] of a part of this shape lie in the leaf."""
        *leading, last = (jnp.asarray(x, jnp.uint32) for x in self.origin)
        row, column = row.astype(jnp.uint32), column.astype(jnp.uint32)
        if tuple(shape[:-1]) != self.whole[:-1]:
            indices, row = jnp.unravel_index(row, shape[:-1]), jnp.zeros_like(row)
            for index, first, size in zip(indices, leading, self.whole, strict=False):
                row = row * jnp.uint32(size) + index + first
        lane = jax.lax.broadcasted_iota(
            jnp.uint32, (*(1 for _ in row.shape[:-1]), width), row.ndim - 1
        )
        return Place(row, column + last, lane)

    def mean(self, sums: Sequence[jax.Array]) -> list[jax.Array]:
        """Means over the leaf from sums over its parts."""
        size = math.prod(self.whole)
        return [(jax.lax.psum(x, self.axes) if self.axes else x) / size for x in sums]


def per_shard(run: Callable[..., Any], over: int, *operands: Any) -> Any:
    """run(*operands, shard) on each shard of the leaf; the first operand is the leaf's update.

    What it returns is laid out as the operand `over`, and as what is stored.
    """
    u = operands[0]
    replaced = (operands[over], operands[3])
    arrays, tree = jax.tree.flatten(operands)
    roles = jax.tree.leaves(_roles(operands))
    written = jax.tree.leaves(_roles((u, *replaced))[1:])
    blocks = [storage.block_of(x) for moments in operands[3] for x in moments]
    indices = [jnp.arange(n, dtype=jnp.uint32) for n in u.shape]

    def local(shard: Shard, *arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(run(*tree.unflatten(arrays), shard))

    def whole(*arrays: jax.Array) -> list[jax.Array]:
        return local(Shard(u.shape, [jnp.uint32(0)] * u.ndim), *arrays)

    def split(mesh: Any, spec: P) -> tuple[Callable[..., Any], list[P], list[P]]:
        """What each device runs, and how its operands and results are laid out."""
        spec = fitting(mesh, spec, u.shape)
        axes = [name for entry in spec for name in names(entry)]
        last = names(spec[-1])
        columns = u.shape[-1] // parts(mesh, last)
        cut = last if any(columns % block for block in blocks) else ()

        def part(*arrays: jax.Array) -> list[jax.Array]:
            origin = [index[0] for index in arrays[-u.ndim :]]
            shard = Shard(u.shape, origin, tuple(axes), tuple(cut))
            return local(shard, *arrays[: -u.ndim])

        layout = {"leaf": spec, "scales": P(*spec[:-1], None if cut else spec[-1]), "other": P()}
        inputs = [layout[role] for role in roles] + [P(entry) for entry in spec]
        return part, inputs, [layout[role] for role in written]

    sharding = jax.typeof(u).sharding
    kinds = set(sharding.mesh.axis_types) if sharding.mesh.axis_names else set()
    if AxisType.Manual in kinds:
        out = whole(*arrays)
    elif AxisType.Explicit in kinds:
        part, inputs, outputs = split(sharding.mesh, sharding.spec)
        mesh = sharding.mesh
        mapped = jax.shard_map(
            part, mesh=mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False
        )
        given = [
            x if role == "leaf" else jax.reshard(x, NamedSharding(mesh, spec))
            for x, role, spec in zip([*arrays, *indices], [*roles, *u.shape], inputs, strict=True)
        ]
        kept = jax.tree.leaves(replaced)  # whose types the results must have, for a scan
        out = [
            jax.reshard(x, jax.typeof(k).sharding)
            for x, k in zip(mapped(*given), kept, strict=True)
        ]
    else:
        out = _partitioned(whole, split, u.ndim, roles, written)(*arrays, *indices)
    return jax.tree.unflatten(jax.tree.structure(replaced), out)


def _partitioned(
    whole: Callable[..., Any], split: Callable[..., Any], ndim: int, roles: Any, written: Any
) -> Callable[..., Any]:
    """`whole`, for which the partitioner puts what `split` says. Under vmap it is `whole`."""

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

    @jax.custom_jvp
    def underived(*arrays: jax.Array) -> Any:
        return batched(*arrays)

    @underived.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise checks.no_derivative("is stepped in tiles")

    return underived


def _rule(ndim: int, roles: Sequence[str], written: Sequence[str]) -> str:
    """Which axes of the operands are one, in the notation of custom_partitioning."""
    axes = [f"i{k}" for k in range(ndim)]

    def factors(k: int, role: str) -> str:
        scales = [*axes[:-1], f"s{k}"] if role == "scales" else []
        return " ".join({"leaf": axes, "scales": scales, "other": [f"o{k}"]}[role])

    given = [factors(k, role) for k, role in enumerate(roles)]
    # scales are operands and results in the same order
    at = iter([k for k, role in enumerate(roles) if role == "scales"])
    results = [factors(next(at) if role == "scales" else 0, role) for role in written]
    return f"{', '.join([*given, *axes])} -> {', '.join(results)}"


def _roles(operands: Any) -> Any:
    """For each array whether it lies as the leaf, as scales, or whole on each device."""
    u, *rest = operands

    def role(x: Any) -> Any:
        if isinstance(x, Blocks):
            return Blocks("leaf", "scales")
        return "leaf" if x.shape == u.shape else "other"

    return jax.tree.map(role, (u, *rest), is_leaf=lambda x: isinstance(x, Blocks))

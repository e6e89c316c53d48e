"""What an optimizer will cost, before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from adam_jax import storage
from adam_jax._engine.state import named_tuples, stored_moments
from adam_jax._util import errors
from adam_jax._util.paths import leaves_with_path, path_string
from adam_jax.transforms.master_weights import MasterWeightsState
from adam_jax.transforms.zero import state_sharding


class Row(NamedTuple):
    """One part of what a training step keeps in memory."""

    part: str
    kept_in: str
    bytes: int
    per_device: int
    """What the device that holds most of it holds; all of it where nothing is sharded."""


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What `memory_report` found; print it for the table.

    Attributes:
      rows: parameters, gradients, each moment, the bits below bfloat16 parameters, and the rest of
        the state, in bytes.
      parameters: how many numbers are trained.
      uncoded: how many leaves of a coded moment stay uncoded, and of how many; None without codes.
      whole: the paths of leaves of the state that lie whole on each device, where others are
        spread, with their bytes, the largest first.
    """

    rows: Sequence[Row]
    parameters: int
    uncoded: tuple[int, int] | None
    whole: Sequence[tuple[str, int]]

    @property
    def state_bytes(self) -> int:
        """Of the optimizer's state."""
        return sum(row.bytes for row in self.rows[2:])

    @property
    def total_bytes(self) -> int:
        """Of parameters, gradients and state together."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """The same on one device."""
        return sum(row.per_device for row in self.rows)

    def __str__(self) -> str:
        count = max(self.parameters, 1)
        rows = [*self.rows, Row("total", "", self.total_bytes, self.bytes_per_device)]
        spread = self.bytes_per_device < self.total_bytes
        lines = [f"{'part':<12} {'kept in':<20} {'MB':>12} {'bytes/parameter':>16}"]
        lines += [
            f"{r.part:<12} {r.kept_in:<20} {r.bytes / 1e6:>12,.3f} {r.bytes / count:>16.3f}"
            for r in rows
        ]
        if spread:
            on_device = ["MB per device", *(f"{r.per_device / 1e6:,.3f}" for r in rows)]
            lines = [f"{x} {y:>14}" for x, y in zip(lines, on_device, strict=True)]
        float32 = 16 * count
        lines.append(
            f"float32 parameters, gradients and AdamW: {float32 / 1e6:,.3f} MB; "
            f"this is {self.total_bytes / float32:.0%} of it"
        )
        if self.uncoded:
            lines.append("{} of {} leaves kept float32".format(*self.uncoded))
        if self.whole:
            size, most = sum(n for _, n in self.whole), ", ".join(p for p, _ in self.whole[:3])
            lines.append(
                f"whole on each device: {len(self.whole)} leaves of the state, "
                f"{size / 1e6:,.3f} MB (largest: {most})"
            )
        return "\n".join(lines)


def memory_report(tx: optax.GradientTransformation, params: chex.ArrayTree) -> MemoryReport:
    """The bytes that parameters, gradients and the state of `tx` take; nothing is allocated.

    What a step needs beside them while it runs, `compiled.memory_analysis()` tells.

    Args:
      tx: an Optax transformation, ours or another.
      params: arrays or `jax.ShapeDtypeStruct`s. Gradients are taken to have their dtypes and
        shardings, and the state to lie as `state_sharding` says.

    Returns:
      a `MemoryReport`: `.state_bytes`, `.total_bytes`, `.bytes_per_device`, `.rows`; it prints as a
      table, with a column per device where parameters are sharded.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> params = {"w": jax.ShapeDtypeStruct((50257, 768), jnp.float32)}
    >>> report = memory_report(adam_jax.adamw(1e-3, storage="int8"), params)
    >>> round(report.state_bytes / report.parameters, 2)
    2.06
    """
    with errors.naming("memory_report"):
        errors.transformation("tx", tx, "memory_report(tx, params)")
    state = jax.eval_shape(tx.init, jax.tree.map(_shape, params))
    if any(map(_is_sharded, jax.tree.leaves(params))):
        state = jax.tree.map(_laid_out, state, state_sharding(tx, params))
    kept = list(stored_moments(state))
    of_moments = [Row(name, _formats(m), *_bytes(m)) for name, m in kept]
    coded = [
        (sum(not storage.is_coded(x) for x in leaves), len(leaves))
        for leaves in (storage.leaves(m).values() for _, m in kept if isinstance(m, storage.Blocks))
    ]
    below = [s.rest for _, s in named_tuples(state) if isinstance(s, MasterWeightsState)]
    of_state = of_moments + [Row("bits below", _formats(tree), *_bytes(tree)) for tree in below]
    whole, local = _bytes(state)
    rest = whole - sum(r.bytes for r in of_state), local - sum(r.per_device for r in of_state)
    rows = [
        Row("parameters", _formats(params), *_bytes(params)),
        Row("gradients", _formats(params), *_bytes(params)),
        *of_state,
        Row("other state", "", *rest),
    ]
    count = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(params))
    return MemoryReport(rows, count, max(coded, default=None), _whole(state))


def _whole(state: Any) -> list[tuple[str, int]]:
    """The paths and bytes of arrays that are not spread, where there are any that are."""
    sizes = [(path_string(path), *_bytes(x)) for path, x in leaves_with_path(state)]
    if all(size == local for _, size, local in sizes):
        return []
    unspread = [(path, size) for path, size, local in sizes if size == local]
    return sorted(unspread, key=lambda leaf: -leaf[1])


def _formats(tree: Any) -> str:
    """The dtypes in a tree, those of a moment's scales left out."""
    codes = tree.codes if isinstance(tree, storage.Blocks) else tree
    dtypes = {str(jnp.result_type(x)) for x in jax.tree.leaves(codes)}
    return ", ".join(sorted(dtypes, key=len))


def _bytes(tree: Any) -> tuple[int, int]:
    """Those of all leaves, and those of their largest shards."""
    leaves = [(x, jnp.shape(x), jnp.result_type(x).itemsize) for x in jax.tree.leaves(tree)]
    return (
        sum(math.prod(shape) * size for _, shape, size in leaves),
        sum(math.prod(_shard_shape(x, shape)) * size for x, shape, size in leaves),
    )


def _shard_shape(x: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return x.sharding.shard_shape(shape) if _is_sharded(x) else shape


def _is_sharded(x: Any) -> bool:
    return isinstance(getattr(x, "sharding", None), NamedSharding)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _laid_out(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

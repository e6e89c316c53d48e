"""The memory of an optimizer, computed before anything is allocated."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from adam_jax._engine.state import named_tuples, stored_moments
from adam_jax._util import errors
from adam_jax._util.paths import leaves_with_path, path_string
from adam_jax._util.typing import PyTree
from adam_jax.analysis._table import text_table
from adam_jax.storage import _moments
from adam_jax.transforms.gradient_release import init_layerwise
from adam_jax.transforms.master_weights import MasterWeightsState
from adam_jax.transforms.zero import state_sharding


class Row(NamedTuple):
    """One part of the memory of a training step."""

    part: str
    kept_in: str
    bytes: int
    per_device: int
    """The largest number of bytes on a device; all bytes if nothing is sharded."""


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The result of `memory_report`; print it for the table.

    Attributes:
      rows: parameters, gradients, each moment, bfloat16 parameters' residuals, and the rest of the
        state, in bytes.
      parameters: the number of trained parameters.
      uncoded: (leaves neither quantized nor reduced, all leaves) of a moment with a quantized or
        reduced format; None if no moment has one.
      whole: the paths and bytes of replicated leaves of the state, the largest first; empty if
        nothing is sharded.
      uncoded_in: the dtypes of the leaves neither quantized nor reduced, e.g. "float32".
    """

    rows: Sequence[Row]
    parameters: int
    uncoded: tuple[int, int] | None
    whole: Sequence[tuple[str, int]]
    uncoded_in: str = "float32"

    @property
    def state_bytes(self) -> int:
        """Return the bytes of the state."""
        return sum(row.bytes for row in self.rows[2:])

    @property
    def total_bytes(self) -> int:
        """Return the bytes of parameters, gradients, and state."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Return the bytes of parameters, gradients, and state per device."""
        return sum(row.per_device for row in self.rows)

    def __str__(self) -> str:
        count = max(self.parameters, 1)
        table = [("part", "kept in", "MB", "bytes/parameter", "MB per device")]
        for r in (*self.rows, Row("total", "", self.total_bytes, self.bytes_per_device)):
            sizes = f"{r.bytes / 1e6:,.3f}", f"{r.bytes / count:.3f}", f"{r.per_device / 1e6:,.3f}"
            table.append((r.part, r.kept_in, *sizes))
        columns = "<12 <20 >12 >16 >14"
        if self.bytes_per_device == self.total_bytes:
            table, columns = [row[:-1] for row in table], "<12 <20 >12 >16"
        float32 = 16 * count
        lines = [
            text_table(table, columns),
            f"{self.total_bytes / float32:.0%} of the {float32 / 1e6:,.3f} MB for float32 "
            f"parameters, gradients, and AdamW",
        ]
        if self.uncoded:
            lines.append("{} of {} leaves kept {}".format(*self.uncoded, self.uncoded_in))
        if self.whole:
            size, most = sum(n for _, n in self.whole), ", ".join(p for p, _ in self.whole[:3])
            lines.append(
                f"whole on each device: {len(self.whole)} leaves of the state, "
                f"{size / 1e6:,.3f} MB (largest: {most})"
            )
        return "\n".join(lines)


def memory_report(
    tx: optax.GradientTransformation, params: PyTree, *, gradient_release: bool = False
) -> MemoryReport:
    """Return the bytes of parameters, gradients, and the state of `tx`, without allocating them.

    A step's temporary buffers aren't included; for them, see `compiled.memory_analysis()`.

    Args:
      tx: any Optax transformation.
      params: arrays or `jax.ShapeDtypeStruct`s. The report assumes gradients of the same dtypes and
        shardings, and a state sharded by `state_sharding`.
      gradient_release: whether to report on a `gradient_release` step, for parameters {"outer":
        ..., "layers": ...}. It holds the gradients of one layer and of the outer parameters, and
        also the inputs of all layers, which the report doesn't count.

    Returns:
      a `MemoryReport` with `.state_bytes`, `.total_bytes`, `.bytes_per_device`, and `.rows`. It
      prints as a table, with a column "MB per device" if sharding makes a difference.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> params = {"w": jax.ShapeDtypeStruct((50257, 768), jnp.float32)}
    >>> report = memory_report(adam_jax.adamw(1e-3, storage="int8"), params)
    >>> round(report.state_bytes / report.parameters, 2)
    2.06
    """
    with errors.error_context("memory_report"):
        errors.transformation("tx", tx, "memory_report(tx, params)")
        if gradient_release:
            errors.layered(params)
            tx = optax.GradientTransformation(functools.partial(init_layerwise, tx), tx.update)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    state = jax.eval_shape(tx.init, shapes)
    if any(map(_is_sharded, jax.tree.leaves(params))):
        shardings = state_sharding(tx, params)
        state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings)
    moments = list(stored_moments(state))
    coded = [_moments.leaves(m, shapes).values() for _, m in moments if _moments.is_in_trees(m)]
    exact = ([x for x in leaves if not _moments.is_lossy(x)] for leaves in coded)
    uncoded, stored = max(zip(exact, coded, strict=True), key=lambda m: len(m[0]), default=([], []))
    residuals = [s.rest for _, s in named_tuples(state) if isinstance(s, MasterWeightsState)]
    of_state = [_row(*moment, shapes) for moment in moments] + [
        _row("residuals", x) for x in residuals
    ]
    whole, local = _bytes(state)
    rest = whole - sum(r.bytes for r in of_state), local - sum(r.per_device for r in of_state)
    gradients = _row("gradients", params)
    rows = [
        _row("parameters", params),
        _of_one_layer(gradients, params["layers"]) if gradient_release else gradients,
        *of_state,
        Row("other state", "", *rest),
    ]
    return MemoryReport(
        rows=rows,
        parameters=sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(params)),
        uncoded=(len(uncoded), len(stored)) if stored else None,
        whole=_replicated(state) if local < whole else [],
        uncoded_in=_formats(uncoded) or "float32",
    )


def _replicated(state: PyTree) -> list[tuple[str, int]]:
    """Return the paths and bytes of replicated leaves, the largest first."""
    sizes = [(path_string(path), *_bytes(x)) for path, x in leaves_with_path(state)]
    replicated = [(path, size) for path, size, local in sizes if size == local]
    return sorted(replicated, key=lambda leaf: -leaf[1])


def _row(part: str, tree: PyTree, params: PyTree = None) -> Row:
    """Return a row with the formats of a tree (without scales) and its bytes."""
    return Row(part, _formats(_moments.leaves(tree, params).values()), *_bytes(tree))


def _of_one_layer(row: Row, layers: PyTree) -> Row:
    """Return a row without the bytes of all layers but one."""
    count = jnp.shape(jax.tree.leaves(layers)[0])[0]
    whole, local = (size - size // count for size in _bytes(layers))
    return row._replace(bytes=row.bytes - whole, per_device=row.per_device - local)


def _formats(leaves: Iterable[_moments.Stored]) -> str:
    """Return the formats of leaves, the shortest name first."""
    return ", ".join(sorted(set(map(_format, leaves)), key=len))


def _format(stored: _moments.Stored) -> str:
    """Return the dtype of a leaf of a moment or of parameters, or how it is reduced."""
    if _moments.is_reduced(stored):
        return "factored" if len(stored) == 2 else "mean"
    return str(jnp.result_type(stored[0] if _moments.is_quantized(stored) else stored))


def _bytes(tree: PyTree) -> tuple[int, int]:
    """Return the bytes of all leaves, and of one shard of each."""
    whole = local = 0
    for x in jax.tree.leaves(tree):
        shape, size = jnp.shape(x), jnp.result_type(x).itemsize
        whole += math.prod(shape) * size
        local += math.prod(x.sharding.shard_shape(shape) if _is_sharded(x) else shape) * size
    return whole, local


def _is_sharded(x: PyTree) -> bool:
    return isinstance(getattr(x, "sharding", None), NamedSharding)

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

from adam_jax import storage
from adam_jax.states import stored_moments


class Row(NamedTuple):
    """One part of what a training step keeps in memory."""

    part: str
    kept_in: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What `memory_report` found; print it for the table.

    Attributes:
      rows: parameters, gradients, each moment and the rest of the state, in bytes.
      parameters: how many numbers are trained.
      uncoded: how many leaves of a coded moment stay uncoded, and of how many; None without codes.
    """

    rows: Sequence[Row]
    parameters: int
    uncoded: tuple[int, int] | None

    @property
    def state_bytes(self) -> int:
        """Of the optimizer's state."""
        return sum(row.bytes for row in self.rows[2:])

    @property
    def total_bytes(self) -> int:
        """Of parameters, gradients and state together."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        count = max(self.parameters, 1)
        rows = [*self.rows, Row("total", "", self.total_bytes)]
        lines = [f"{'part':<12} {'kept in':<20} {'MB':>12} {'bytes/parameter':>16}"]
        lines += [
            f"{r.part:<12} {r.kept_in:<20} {r.bytes / 1e6:>12,.3f} {r.bytes / count:>16.3f}"
            for r in rows
        ]
        lines.append(f"float32 parameters, gradients and AdamW: {16 * count / 1e6:,.3f} MB")
        if self.uncoded:
            lines.append("{} of {} leaves kept float32".format(*self.uncoded))
        return "\n".join(lines)


def memory_report(tx: optax.GradientTransformation, params: chex.ArrayTree) -> MemoryReport:
    """The bytes that parameters, gradients and the state of `tx` take; nothing is allocated.

    What a step needs beside them while it runs, `compiled.memory_analysis()` tells.

    Args:
      tx: an Optax transformation, ours or another.
      params: arrays or `jax.ShapeDtypeStruct`s. Gradients are taken to have their dtypes.

    Returns:
      a `MemoryReport`: `.state_bytes`, `.total_bytes`, `.rows`; it prints as a table.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> params = {"w": jax.ShapeDtypeStruct((50257, 768), jnp.float32)}
    >>> report = memory_report(adam_jax.adamw(1e-3, storage="int8"), params)
    >>> round(report.state_bytes / report.parameters, 2)
    2.06
    """
    state = jax.eval_shape(tx.init, params)
    kept = list(stored_moments(state))
    of_moments = [Row(name, _formats(m), _bytes(m)) for name, m in kept]
    coded = [
        (sum(not storage.is_coded(x) for x in leaves), len(leaves))
        for leaves in (storage.leaves(m).values() for _, m in kept if isinstance(m, storage.Blocks))
    ]
    rest = _bytes(state) - sum(row.bytes for row in of_moments)
    rows = [
        Row("parameters", _formats(params), _bytes(params)),
        Row("gradients", _formats(params), _bytes(params)),
        *of_moments,
        Row("other state", "", rest),
    ]
    count = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(params))
    return MemoryReport(rows, count, max(coded, default=None))


def _formats(tree: Any) -> str:
    """The dtypes in a tree, those of a moment's scales left out."""
    codes = tree.codes if isinstance(tree, storage.Blocks) else tree
    dtypes = {str(jnp.result_type(x)) for x in jax.tree.leaves(codes)}
    return ", ".join(sorted(dtypes, key=len))


def _bytes(tree: Any) -> int:
    return sum(math.prod(jnp.shape(x)) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))

"""PartitionSpecs: entries for every axis, and only those that fit a shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec as P


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def parts(mesh: Any, entry: Any) -> int:
    """Into how many parts an entry cuts an axis."""
    return math.prod(mesh.shape[name] for name in names(entry))


def fitting(mesh: Any, spec: P, shape: Sequence[int]) -> P:
    """The spec with an entry for each axis; None where the devices do not divide it."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    divided = [n % parts(mesh, e) == 0 for n, e in zip(shape, entries, strict=True)]
    return P(*(e if d else None for e, d in zip(entries, divided, strict=True)))

"""PartitionSpecs: entries for every axis, only those that fit a shape, and those that are known."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from adam_jax._util.paths import Key


def is_explicit(x: Any) -> bool:
    """Whether the type of an array has its sharding."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


_known: contextvars.ContextVar[Mapping[Key, NamedSharding] | None]
_known = contextvars.ContextVar("known", default=None)


@contextlib.contextmanager
def known_shardings(shardings: Mapping[Key, NamedSharding]) -> Iterator[None]:
    """Make the shardings of leaves known to the steps inside.

    On automatic mesh axes a traced array doesn't have its sharding, and a transformation between
    may be anybody's. So the wrapper that decides the shardings passes them by the leaves' keys.
    """
    token = _known.set(shardings)
    try:
        yield
    finally:
        _known.reset(token)


def known_sharding(leaf: Key) -> NamedSharding | None:
    """Return the sharding of a leaf on automatic axes; None if nobody has made it known."""
    return (_known.get() or {}).get(leaf)


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

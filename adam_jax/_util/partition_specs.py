"""Helpers for PartitionSpecs, and known shardings of leaves."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Generator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from adam_jax._util.paths import Key
from adam_jax._util.typing import PyTree


def is_explicit(x: jax.Array) -> bool:
    """Whether the mesh of an array has explicit axes."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


known_shardings: contextvars.ContextVar[Mapping[Key, NamedSharding]]
known_shardings = contextvars.ContextVar("known_shardings", default={})  # noqa: B039  # never mutated
"""The shardings of leaves on automatic mesh axes, if an outer wrapper has set them."""


@contextlib.contextmanager
def making_known(shardings: Mapping[Key, NamedSharding]) -> Generator[None, None, None]:
    """Set `known_shardings` for the steps in this context.

    On automatic mesh axes, a traced array has no sharding, and the transformations in between can't
    pass one. So the wrapper that chooses the shardings passes them by the leaves' keys.
    """
    token = known_shardings.set(shardings)
    try:
        yield
    finally:
        known_shardings.reset(token)


def known_mesh(tree: PyTree) -> contextlib.AbstractContextManager[object]:
    """Return a context with the explicit mesh of a tree's types, if they have one.

    Without it, `jnp.zeros_like(x)` and similar calls don't keep the sharding of x.
    """
    meshes = [x.sharding.mesh for x in jax.tree.leaves(tree) if x.sharding is not None]
    explicit = [mesh.abstract_mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
    return jax.sharding.use_abstract_mesh(explicit[0]) if explicit else contextlib.nullcontext()


def names(entry: PyTree) -> tuple[str, ...]:
    """Return the mesh axes in a PartitionSpec entry."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def parts(mesh: Mesh | AbstractMesh, entry: PyTree) -> int:
    """Return how many parts an entry splits an axis into."""
    return math.prod(mesh.shape[name] for name in names(entry))


def drop_indivisible(mesh: Mesh | AbstractMesh, spec: P, shape: Sequence[int]) -> P:
    """Return the spec with one entry per axis: None for axes that the devices don't divide."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    divided = [n % parts(mesh, e) == 0 for n, e in zip(shape, entries, strict=True)]
    return P(*(e if d else None for e, d in zip(entries, divided, strict=True)))

"""The part of the parameters that a step receives, if the step runs part by part.

Gradient release steps one layer after the other, and then the remaining parameters. Random bits
depend on the layer's index, and sums over all parameters, such as a recorded norm, need the parts'
sums. Optax's interface can pass neither, so a context variable does.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._util.paths import Key
from adam_jax._util.typing import PyTree
from adam_jax.storage._random_bits import mix

T = TypeVar("T")


def _unchanged(sums: PyTree) -> PyTree:
    return sums


class Part(NamedTuple):
    """A part of the parameters; by default, all of them."""

    layer: jax.Array | None = None
    """The index of the layer, if the part is one."""
    total: Callable[[PyTree], PyTree] = _unchanged
    """(sums over this part) → sums over all parts, which are only complete in the last part."""
    carrier: Key | None = None
    """A leaf added from another part; its dummy gradient has the norm of all other gradients."""


_part: contextvars.ContextVar[Part] = contextvars.ContextVar("part", default=Part())  # noqa: B039


@contextlib.contextmanager
def stepping(part: Part) -> Generator[None, None, None]:
    """Set the part that transformations step inside this context."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def seed_of_layer(seed: np.uint32) -> np.uint32 | jax.Array:
    """Return a leaf's seed, mixed with the layer's index; layer 0 keeps the seed."""
    layer = _part.get().layer
    return seed if layer is None else mix(layer.astype(jnp.uint32)) ^ seed


def total(sums: PyTree) -> PyTree:
    """Return sums over all parts of the parameters, from sums over this part.

    Only the last part's result is complete; earlier parts' results are discarded.
    """
    return _part.get().total(sums)


def own(leaves: Mapping[Key, T]) -> dict[Key, T]:
    """Return the leaves to sum over: all except `Part.carrier`."""
    return {key: x for key, x in leaves.items() if key != _part.get().carrier}

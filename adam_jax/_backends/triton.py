"""Masked access to the tiles of a kernel that Triton compiles, for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import triton


def compiler(elements: int) -> triton.CompilerParams:
    """Return the compiler's parameters for tiles of this many elements: 16 for each thread."""
    return triton.CompilerParams(num_warps=max(4, elements // 512))


def load(ref: Any, mask: Callable[[], jax.Array | None]) -> jax.Array:
    """Read the elements of a tile that the mask selects; the rest is undefined."""
    inside = mask()
    return ref[...] if inside is None else triton.load(ref, mask=inside)


def store(ref: Any, x: jax.Array, mask: Callable[[], jax.Array | None], at: Any) -> None:
    """Write the elements of a tile that the mask selects."""
    inside = mask()
    if inside is None:
        ref[at] = x
    else:
        triton.store(ref, x, mask=inside)

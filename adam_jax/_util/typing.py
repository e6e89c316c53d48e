"""The type aliases that signatures use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

PyTree: TypeAlias = Any
"""Any nesting of containers around arrays, such as parameters or a state."""

KeyPath: TypeAlias = tuple[Any, ...]
"""A leaf's path, as `jax.tree_util.tree_flatten_with_path` returns it."""

Numeric: TypeAlias = jax.typing.ArrayLike
"""A number or a scalar array."""

ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule
"""A number, a scalar array, or a function of the step count."""

DType: TypeAlias = jax.typing.DTypeLike | None

Mask: TypeAlias = PyTree | Callable[[optax.Params], PyTree] | None
"""A tree of bools, a prefix of one, or a function of the parameters that returns one."""

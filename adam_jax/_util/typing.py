"""Type aliases for signatures, and the ranges that they declare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

PyTree: TypeAlias = Any
"""Any nesting of containers around arrays, such as parameters or a state."""

KeyPath: TypeAlias = tuple[Any, ...]
"""A leaf's path, as `jax.tree_util.tree_flatten_with_path` returns it."""

DType: TypeAlias = jax.typing.DTypeLike | None

Mask: TypeAlias = PyTree | Callable[[optax.Params], PyTree] | None
"""A tree of bools, a prefix of one, or a function from parameters to one."""


class Range(NamedTuple):
    """The allowed range of an argument: low ≤ x < high."""

    text: str
    low: float
    high: float = math.inf


UNIT = Range("in [0, 1)", 0.0, 1.0)
UP_TO_ONE = Range("in [0, 1]", 0.0, math.nextafter(1, 2))
FROM_ZERO = Range(">= 0 and finite", 0.0)

Numeric: TypeAlias = jax.typing.ArrayLike
"""A number or a scalar array."""

Scalar: TypeAlias = jax.Array | np.floating | float
"""A number in a formula."""

DecayRate: TypeAlias = Annotated[Numeric, UNIT]
Momentum: TypeAlias = Annotated[Numeric, UP_TO_ONE]
"""A decay rate that may be 1, which gives a sum."""
NonNegative: TypeAlias = Annotated[Numeric, FROM_ZERO]

Schedule: TypeAlias = Callable[..., PyTree]
"""A function of the step count."""

ScalarOrSchedule: TypeAlias = Annotated[optax.ScalarOrSchedule, FROM_ZERO]
DecayRateOrSchedule: TypeAlias = Annotated[Numeric | Schedule, UNIT]

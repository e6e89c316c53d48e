"""From what a user gave (a number, an array, a tracer, a schedule) to what a step computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._util import errors
from adam_jax._util.numerics import Decay, decay_rate


def operands(hyperparams: Mapping[str, Any], count: jax.Array | None) -> dict[str, Any]:
    """The values for one step: schedules are evaluated at the count of steps already made."""
    return {
        name: _operand(name, _scheduled(name, value, count) if callable(value) else value)
        for name, value in hyperparams.items()
    }


def _scheduled(name: str, schedule: Callable[..., Any], count: jax.Array | None) -> Any:
    value = schedule(count)
    if not isinstance(value, Decay):  # which our own schedules of a rate return, with its digits
        errors.scheduled(name, value)
    return value


def _operand(name: str, value: Any) -> Any:
    if errors.is_decay_rate(name):
        return decay_rate(value)
    # double on the host: a float64 leaf gets all digits, and jit takes it as float32 elsewhere
    return np.float64(value) if isinstance(value, (int, float)) else jnp.asarray(value)


def has_schedule(hyperparams: Mapping[str, Any]) -> bool:
    return any(callable(value) for value in hyperparams.values())


def pack(operands: Any) -> tuple[jax.Array, Any]:
    """All scalars of a step in one vector, with their layout: one operand per leaf, not ten."""
    scalars, layout = jax.tree.flatten(operands)
    dtype = jnp.result_type(float)
    return jnp.stack([jnp.asarray(x, dtype) for x in (*scalars, 0)]), layout


def unpack(scalars: jax.Array, layout: Any) -> Any:
    parts = jax.lax.split(scalars, (1,) * scalars.size)[: layout.num_leaves]
    return layout.unflatten([jax.lax.squeeze(x, (0,)) for x in parts])

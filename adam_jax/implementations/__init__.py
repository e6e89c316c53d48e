"""How one leaf's step is executed. The step itself, `leaf`, is the same function in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adam_jax.implementations import auto, pallas, stream, xla
from adam_jax.implementations.steps import Step
from adam_jax.implementations.xla import orders

__all__ = ["IMPLEMENTATIONS", "Step", "orders"]

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "auto": auto.run,
    "xla": xla.run,
    "stream": stream.run,
    "pallas": pallas.run,
}
"""Each takes the step of one leaf and its operands and returns the step's result."""

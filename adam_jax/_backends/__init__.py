"""How one leaf's step is executed. The step itself, `leaf`, is the same function in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adam_jax._backends import auto, tiled, xla
from adam_jax._backends.steps import Step
from adam_jax._backends.xla import orders

__all__ = ["IMPLEMENTATIONS", "Step", "orders"]


def run_pallas(*operands: Any) -> Any:
    """Run the step of a leaf in a kernel."""
    # Imported at the first kernel: Pallas takes a while, and float32 state needs none.
    from adam_jax._backends import pallas

    return pallas.run(*operands)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "auto": auto.run,
    "xla": xla.run,
    "stream": tiled.run,
    "pallas": run_pallas,
}
"""Each takes the step of one leaf and its operands and returns the step's result."""

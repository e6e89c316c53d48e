"""How one leaf's step is executed. The step itself, `leaf`, is the same function in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adam_jax.implementations import xla

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"auto": xla.run, "xla": xla.run}
"""Each takes the step of one leaf and its operands and returns the step's result."""

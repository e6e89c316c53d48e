"""Plain XLA: the step is traced as it is, and XLA fuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_jax.implementations.steps import Step, finish
from adam_jax.storage.noise import whole


def run(
    leaf: Callable[..., Step], asks: Sequence[int], over: int, u: jax.Array, *operands: Any
) -> Any:
    """The step of the whole leaf at once."""
    del asks, over
    place = None if operands[-1] is None else whole(u.shape)  # for random bits alone
    step = leaf(u, *operands, place, ordered=orders())
    return finish(step, lambda xs: [jnp.mean(x) for x in xs])


def orders() -> bool:
    """Whether what is stored waits for the new parameter, so that XLA:CPU writes it in place.

    One of its elements is at hand only where leaves are not spread over devices.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1

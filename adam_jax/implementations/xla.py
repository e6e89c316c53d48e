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
    del asks
    # a new parameter is in memory when it is made, an update may be fused into what follows; and
    # one of its elements is at hand where the leaf is not spread over devices
    ordered = over == 2 and jax.default_backend() == "cpu" and jax.device_count() == 1
    place = None if operands[-1] is None else whole(u.shape)  # for random bits alone
    step = leaf(u, *operands, place, ordered=ordered)
    return finish(step, lambda xs: [jnp.mean(x) for x in xs])

"""The values of hyperparameters in one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._util import errors
from adam_jax._util.declare import call_by_name
from adam_jax._util.numerics import Decay, decay_rate
from adam_jax._util.typing import PyTree

Value: TypeAlias = np.float64 | jax.Array | Decay
"""The value of a hyperparameter in one step."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """A hyperparameter computed in each step from another link's scalars and hyperparameters.

    The arguments of `function` are named after those scalars and hyperparameters.
    """

    function: Callable[..., jax.Array]

    def __call__(self, values: Mapping[str, PyTree]) -> jax.Array:
        return call_by_name(self.function, values)


def is_schedule(value: PyTree) -> bool:
    """Whether a hyperparameter is a function of the step count."""
    return callable(value) and not isinstance(value, Computed)


def evaluate(hyperparams: Mapping[str, PyTree], count: jax.Array | None) -> dict[str, Value]:
    """Return the hyperparameters' values, with schedules evaluated at `count`."""
    values: dict[str, PyTree] = {k: v(count) if callable(v) else v for k, v in hyperparams.items()}
    for name, value in values.items():
        if callable(hyperparams[name]) and not isinstance(value, Decay):
            errors.scheduled(name, value)
    return {name: as_value(name, value) for name, value in values.items()}


def as_value(name: str, value: jax.typing.ArrayLike | Decay) -> Value:
    if errors.is_decay_rate(name):
        return decay_rate(value)
    # float64 keeps all digits for float64 leaves; unless x64 is enabled, JAX casts it to float32
    return np.float64(value) if isinstance(value, (int, float)) else jnp.asarray(value)

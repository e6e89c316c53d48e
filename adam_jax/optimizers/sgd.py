"""Gradient descent with momentum."""

from __future__ import annotations

from typing import Unpack

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util import errors
from adam_jax._util.typing import DType, Momentum, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, optimizer
from adam_jax.storage import Storage
from adam_jax.storage._policy import with_dtype

__all__ = ["sgd", "trace"]


@direction
def trace(
    decay: Momentum,
    nesterov: bool = False,
    accumulator_dtype: DType = None,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `sgd` with momentum: trace ← g + decay·trace.

    >>> tx = trace(0.9, nesterov=True)
    """
    storage = with_dtype(options.get("storage"), "trace", "accumulator_dtype", accumulator_dtype)
    return _trace(decay, nesterov, storage)


@optimizer(
    paper="Polyak, USSR Comp. Math. 4(5)",
    year=1964,
    formula="g, or b = β·b + g",
    purpose="no state; with momentum, for CNNs",
    learning_rate="20–40",
)
def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Momentum | None = None,
    nesterov: bool = False,
    accumulator_dtype: DType = None,
    **options: Unpack[DecayOptions],
) -> Chain:
    """Gradient descent, with heavy-ball or Nesterov momentum.

    Source: Polyak (1964); Sutskever et al. (2013) for Nesterov's form.

    Args:
      momentum: decay rate, in [0, 1]; None for none.
      nesterov: whether the momentum is Nesterov's.
      accumulator_dtype: the dtype of the trace; equivalent to storage={"trace": dtype}.

    >>> tx = sgd(0.1, momentum=0.9, nesterov=True)
    """
    storage = with_dtype(options.get("storage"), "trace", "accumulator_dtype", accumulator_dtype)
    return descend(momentum_link(momentum, nesterov, storage), learning_rate, **options)


def momentum_link(momentum: Momentum | None, nesterov: bool, storage: Storage) -> Link:
    """Return a momentum link, or an identity link if `momentum` is None."""
    if callable(momentum):
        errors.no_step_count("momentum", optax.TraceState)
    return link(rules.identity, {}) if momentum is None else _trace(momentum, nesterov, storage)


def _trace(decay: Momentum, nesterov: bool, storage: Storage) -> Link:
    given = {"decay": decay, "nesterov": nesterov}
    return link(rules.trace, given, storage=storage, state=optax.TraceState)

"""Schedules and scalings of hyperparameters; for learning-rate schedules, use Optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adam_jax._util import errors
from adam_jax._util.numerics import Decay, decay_rate
from adam_jax._util.typing import (
    UNIT,
    DecayRate,
    DecayRateOrSchedule,
    Numeric,
    PyTree,
    ScalarOrSchedule,
)


def ademamix_warmup(
    b1: DecayRate, b3: DecayRateOrSchedule, alpha: ScalarOrSchedule, steps: int | None
) -> tuple[DecayRateOrSchedule, ScalarOrSchedule]:
    """Return AdEMAMix's warmups: alpha from 0, and b3 from b1 with a linearly growing half-life.

    Source: Pagliardini et al. (2024), section 3 and appendix A.1.

    Args:
      b1: the initial b3, in (0, 1).
      b3: the final b3, in [b1, 1).
      alpha: ≥ 0, the final alpha.
      steps: the warmup's length; if None, b3 and alpha are returned unchanged.

    Returns:
      (b3, alpha), schedules of the step count, for `scale_by_ademamix`.

    >>> b3, alpha = ademamix_warmup(0.9, 0.9999, 8.0, 1000)
    >>> float(alpha(250))
    2.0
    """
    if steps is None:
        return b3, alpha
    with errors.error_context("ademamix_warmup"):
        errors.above_zero("b1", b1)
        errors.at_least(1, "steps", steps)
        errors.not_a_schedule("b3", b3)
        errors.not_a_schedule("alpha", alpha)
    dtype = jnp.result_type(float)
    rates: tuple[PyTree, PyTree] = (b1, b3)
    start, end = (jnp.asarray(decay_rate(b).log, dtype) for b in rates)
    final: PyTree = alpha

    def progress(count: Numeric) -> jax.Array:
        return jnp.minimum(jnp.asarray(count, dtype) / steps, 1)

    def slow_rate(count: Numeric) -> Decay:
        # interpolate the averaging length, -1 / log b, linearly
        s = progress(count)
        log = start * end / ((1 - s) * end + s * start)
        return Decay(jnp.exp(log), log, -jnp.expm1(log))

    return slow_rate, lambda count: progress(count) * final


def rescale_b2(b2: float, *, batch_size: float, new_batch_size: float) -> float:
    """Return b2 for another batch size: b2^(new_batch_size/batch_size).

    This keeps the half-life of the average squared gradient constant in examples.
    Source: Marek et al. (2025), Small Batch Size Training for Language Models, arXiv:2507.07101.

    Args:
      b2: the decay rate at `batch_size`, in [0, 1).
      batch_size: > 0, in any unit, such as sequences or tokens.
      new_batch_size: > 0, in the same unit.

    Raises:
      ValueError: a number is out of range.

    >>> round(rescale_b2(0.95, batch_size=512, new_batch_size=8), 6)
    0.999199
    """
    with errors.error_context("rescale_b2"):
        errors.in_range("b2", b2, UNIT)
        errors.above_zero("batch_size", batch_size)
        errors.above_zero("new_batch_size", new_batch_size)
    return b2 ** (new_batch_size / batch_size)

"""LaProp."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, DType, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, link_of, optimizer
from adam_jax.storage._policy import with_dtype

__all__ = ["laprop", "scale_by_laprop"]


@direction
def scale_by_laprop(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    mu_dtype: DType = None,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `laprop`.

    >>> tx = scale_by_laprop()
    """
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    return link(rules.laprop, {"b1": b1, "b2": b2, "eps": eps}, storage=storage)


@optimizer(
    paper="Ziyin et al., arXiv:2002.04839",
    year=2020,
    formula="m̂, m = ema g / (√v̂ + ε)",
    purpose="β₁ and β₂ chosen freely",
    learning_rate="1",
)
def laprop(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    mu_dtype: DType = None,
    **options: Unpack[DecayOptions],
) -> Chain:
    """LaProp: Adam that normalizes the gradient before averaging it.

    Source: Ziyin, Wang & Ueda (2020), LaProp: Separating Momentum and Adaptivity in Adam.

    >>> tx = laprop(4e-4, weight_decay=0.1)
    """
    along = link_of(scale_by_laprop)(b1, b2, eps, mu_dtype, storage=options.get("storage"))
    return descend(along, learning_rate, **options)

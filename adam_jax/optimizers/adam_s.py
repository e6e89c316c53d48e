"""AdamS."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, Options, direction, link_of, optimizer

__all__ = ["adam_s", "scale_by_adam_s"]


@direction
def scale_by_adam_s(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.95,
    eps: NonNegative = 1e-8,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `adam_s`.

    >>> tx = scale_by_adam_s()
    """
    given = {"b1": b1, "b2": b2, "eps": eps}
    return link(rules.adam_s, given, storage=options.get("storage"))


@optimizer(
    paper="Zhang et al., arXiv:2505.16363",
    year=2025,
    formula="m / (√(β₂·mₜ₋₁² + (1−β₂)·g²) + ε) + λ·p",
    purpose="half the state, with AdamW's settings",
    learning_rate="0.2",
)
def adam_s(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.95,
    eps: NonNegative = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    **options: Unpack[MaskOptions],
) -> Chain:
    """AdamS: AdamW whose second moment is computed from the previous momentum, not stored.

    It has one moment, and AdamW's hyperparameters. There is no bias correction, so the first step
    is (1 - b1)/√(1 - b2) times as long as AdamW's, 0.45 by default.
    Source: Zhang et al. (2025), AdamS: Momentum Itself Can Be A Normalizer for LLM Pretraining and
    Post-training.

    Args:
      b2: the weight of the squared momentum in the denominator, in [0, 1).

    >>> tx = adam_s(1e-3, weight_decay=0.1)
    """
    along = link_of(scale_by_adam_s)(b1, b2, eps, storage=options.get("storage"))
    return descend(along, learning_rate, weight_decay=weight_decay, **options)

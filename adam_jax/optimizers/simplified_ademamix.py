"""Simplified AdEMAMix."""

from __future__ import annotations

from typing import Unpack

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, Options, direction, link_of, optimizer

__all__ = ["scale_by_simplified_ademamix", "simplified_ademamix"]


@direction
def scale_by_simplified_ademamix(
    b1: DecayRate = 0.99,
    b2: DecayRate = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `simplified_ademamix`.

    >>> tx = scale_by_simplified_ademamix(alpha=10.0)
    """
    given = {"b1": b1, "b2": b2, "alpha": alpha, "eps": eps, "eps_root": eps_root}
    state = optax.contrib.ScaleBySimplifiedAdEMAMixState
    return link(rules.simplified_ademamix, given, storage=options.get("storage"), state=state)


@optimizer(
    paper="Morwani et al., arXiv:2502.02431",
    year=2025,
    formula="(m + α·g) / (√v̂ + ε), m = β₁·m + g",
    purpose="AdEMAMix with Adam's state",
    learning_rate="1 − β₁",
)
def simplified_ademamix(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.99,
    b2: DecayRate = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    **options: Unpack[MaskOptions],
) -> Chain:
    """Simplified AdEMAMix: a decaying gradient sum plus alpha·g, divided by Adam's root.

    The direction is up to 1/(1 - b1) times as long as Adam's: lower the learning rate accordingly.
    Source: Morwani et al. (2025), Connections between Schedule-Free Optimizers, AdEMAMix, and
    Accelerated SGD Variants, Algorithm 1.

    Args:
      b1: decay rate of the sum of gradients, in [0, 1).
      alpha: ≥ 0, the weight of the current gradient, or a schedule.

    >>> tx = simplified_ademamix(1e-5, alpha=100.0)
    """
    along = link_of(scale_by_simplified_ademamix)(
        b1, b2, alpha, eps, eps_root, storage=options.get("storage")
    )
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)

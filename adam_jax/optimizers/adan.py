"""Adan."""

from __future__ import annotations

from typing import Literal, Unpack

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util import errors
from adam_jax._util.typing import DecayRate, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, Options, direction, link_of, optimizer

__all__ = ["adan", "scale_by_adan"]


@direction
def scale_by_adan(
    b1: DecayRate = 0.98,
    b2: DecayRate = 0.92,
    b3: DecayRate = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    *,
    difference_weight: Literal["b2", "1-b2"] = "b2",
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `adan`.

    >>> tx = scale_by_adan(difference_weight="1-b2")  # Optax's
    """
    errors.choice("difference_weight", difference_weight, ("b2", "1-b2"))
    given = {"b1": b1, "b2": b2, "b3": b3, "eps": eps, "eps_root": eps_root}
    given |= {"difference_weight": difference_weight}
    return link(rules.adan, given, storage=options.get("storage"), state=optax.ScaleByAdanState)


@optimizer(
    paper="Xie et al., arXiv:2208.06677",
    year=2022,
    formula="(m̂ + β₂·d̂) / √(n̂ + ε), d = ema Δg",
    purpose="large steps, for twice the state",
    learning_rate="2",
)
def adan(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.98,
    b2: DecayRate = 0.92,
    b3: DecayRate = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    difference_weight: Literal["b2", "1-b2"] = "b2",
    **options: Unpack[MaskOptions],
) -> Chain:
    """Adan: Nesterov momentum estimated from differences of gradients.

    Source: Xie et al. (2022), Adan: Adaptive Nesterov Momentum Algorithm, Algorithm 1. The
    authors' weight decay is weight_decay_form="proximal"; Optax's is "decoupled".

    Args:
      b1: decay rate of the average gradient, in [0, 1); the paper's 1 - β1.
      b2: decay rate of the average gradient difference, in [0, 1).
      b3: decay rate of the average square, in [0, 1).
      eps_root: ≥ 0, added inside the root; 0 in the authors' code, 1e-8 in Optax.
      difference_weight: the weight of the difference in the step: b2 in the paper and the
        authors' code, 1 - b2 in Optax, whose adan is therefore a different method.

    >>> tx = adan(1e-3, weight_decay=0.02, weight_decay_form="proximal")  # the authors'
    """
    along = link_of(scale_by_adan)(
        b1,
        b2,
        b3,
        eps,
        eps_root,
        difference_weight=difference_weight,
        storage=options.get("storage"),
    )
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)

"""AdaMax and AdaMaxW."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import (
    DecayOptions,
    MaskOptions,
    Options,
    direction,
    link_of,
    optimizer,
)

__all__ = ["adamax", "adamaxw", "scale_by_adamax"]


@direction
def scale_by_adamax(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `adamax`.

    >>> tx = scale_by_adamax(b2=0.99)
    """
    return link(rules.adamax, {"b1": b1, "b2": b2, "eps": eps}, storage=options.get("storage"))


@optimizer(
    paper="Kingma & Ba, arXiv:1412.6980",
    year=2015,
    formula="m̂ / n, n = max(β₂·n, |g| + ε)",
    purpose="bounded steps, rare large gradients",
    learning_rate="3–4",
)
def adamax(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    **options: Unpack[DecayOptions],
) -> Chain:
    """AdaMax: the average gradient divided by a decaying maximum of |g|.

    Source: Kingma & Ba (2015), Algorithm 2.

    Args:
      b2: decay rate of the maximum, in [0, 1).
      eps: ≥ 0, added to |g|.

    >>> tx = adamax(2e-3)
    """
    along = link_of(scale_by_adamax)(b1, b2, eps, storage=options.get("storage"))
    return descend(along, learning_rate, **options)


@optimizer(
    paper="Kingma & Ba, arXiv:1412.6980",
    year=2015,
    formula="m̂ / n + λ·p, n as in adamax",
    purpose="AdaMax with decoupled weight decay",
    learning_rate="3–4",
)
def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    **options: Unpack[MaskOptions],
) -> Chain:
    """AdaMaxW: `adamax` with decoupled weight decay.

    Source: Kingma & Ba (2015), Algorithm 2, and Loshchilov & Hutter (2019).

    Args:
      b2: decay rate of the maximum, in [0, 1).
      eps: ≥ 0, added to |g|.

    >>> tx = adamaxw(2e-3, weight_decay=0.01)
    """
    along = link_of(scale_by_adamax)(b1, b2, eps, storage=options.get("storage"))
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)

"""AdEMAMix."""

from __future__ import annotations

from typing import Unpack

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util import errors
from adam_jax._util.typing import (
    DecayRate,
    DecayRateOrSchedule,
    DType,
    Mask,
    NonNegative,
    ScalarOrSchedule,
)
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, Options, direction, link_of, optimizer
from adam_jax.schedules import ademamix_warmup
from adam_jax.storage._policy import with_dtype

__all__ = ["ademamix", "scale_by_ademamix"]


@direction
def scale_by_ademamix(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    b3: DecayRateOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 6.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `ademamix`.

    >>> tx = scale_by_ademamix(alpha=8.0)
    """
    storage = options.get("storage")
    for moment in rules.ademamix.moments:
        storage = with_dtype(storage, moment, "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "b3": b3, "alpha": alpha, "eps": eps, "eps_root": eps_root}
    state = optax.contrib.ScaleByAdemamixState
    return link(rules.ademamix, given, storage=storage, state=state)


@optimizer(
    paper="Pagliardini et al., arXiv:2409.03137",
    year=2024,
    formula="(m̂₁ + α·m₂) / (√v̂ + ε)",
    purpose="runs of 10⁴ steps and more",
    learning_rate="1",
)
def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    b3: DecayRateOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    warmup_steps: int | None = None,
    **options: Unpack[MaskOptions],
) -> Chain:
    """AdEMAMix: a fast and a slow average gradient, summed and divided by Adam's root.

    Source: Pagliardini, Ablin & Grangier (2024), The AdEMAMix Optimizer: Better, Faster, Older,
    Algorithm 1.

    Args:
      b1: decay rate of the fast average gradient, in [0, 1).
      b3: decay rate of the slow average gradient, in [0, 1), or a schedule.
      alpha: ≥ 0, the weight of the slow average, or a schedule.
      mu_dtype: the dtype of all three moments, as in Optax.
      warmup_steps: the number of steps over which alpha rises from 0 and b3 from b1 (in the
        paper, the whole run); None for no warmup. See `schedules.ademamix_warmup`.

    >>> tx = ademamix(1e-3, b3=0.9999, alpha=8.0, warmup_steps=100_000, weight_decay=0.1)
    """
    errors.at_least(1, "warmup_steps", warmup_steps)
    errors.not_a_schedule("warmup_steps", warmup_steps)
    along = link_of(scale_by_ademamix)(
        b1,
        b2,
        *ademamix_warmup(b1, b3, alpha, warmup_steps),
        eps,
        eps_root,
        mu_dtype,
        storage=options.get("storage"),
    )
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)

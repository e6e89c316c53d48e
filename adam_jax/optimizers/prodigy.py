"""Prodigy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, link
from adam_jax._engine.hyperparams import Computed
from adam_jax._util import errors
from adam_jax._util.numerics import decay_rate
from adam_jax._util.typing import DecayRate, NonNegative, Numeric, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, optimizer

__all__ = ["prodigy"]


@optimizer(
    paper="Mishchenko & Defazio, arXiv:2306.06101",
    year=2023,
    formula="d·(m / (√v + d·ε) + λ·p)",
    purpose="estimates the learning rate d",
    learning_rate="η = 1",
)
def prodigy(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999),
    beta3: DecayRate | None = None,
    eps: NonNegative = 1e-8,
    estim_lr0: Numeric = 1e-6,
    estim_lr_coef: NonNegative = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    safeguard_warmup: bool = False,
    **options: Unpack[MaskOptions],
) -> Chain:
    """Prodigy: AdamW that estimates its learning rate.

    The estimate d is a lower bound on the distance to the solution. It grows from estim_lr0 while
    -g points along the displacement from the initial parameters. All leaves that the optimizer acts
    on share it. The state has four arrays per parameter; the initial parameters keep their dtype in
    every storage format. After a NaN gradient, d stays NaN, so use `optax.apply_if_finite`.
    Source: Mishchenko & Defazio (2023), Prodigy: An Expeditiously Adaptive Parameter-Free Learner,
    Algorithm 4, with Adam's bias correction as in Optax. In Optax, ε is multiplied by the next
    step's d.

    Args:
      learning_rate: η ≥ 0, which multiplies d, or a schedule of the step count.
      betas: the decay rates (b1, b2) of both moments, in [0, 1).
      beta3: in [0, 1), the decay rate of the sums that estimate d; by default √b2.
      estim_lr0: > 0, the initial d, smaller than any plausible estimate.
      estim_lr_coef: ≥ 0, which multiplies the estimate.
      safeguard_warmup: whether to omit η from the estimate's denominator, for a long warmup.

    >>> tx = prodigy(1.0, weight_decay=0.01)
    """
    errors.above_zero("estim_lr0", estim_lr0)
    errors.hyperparam("learning_rate", learning_rate)
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise errors.type_error(f"betas must be a pair of decay rates (b1, b2), got {betas!r}")
    b1, b2 = betas
    errors.hyperparam("betas[0]", b1)
    errors.hyperparam("betas[1]", b2)
    errors.not_a_schedule("betas[1]", b2)
    given = {
        "gamma": learning_rate,
        "b1": b1,
        "b2": b2,
        "b3": decay_rate(b2) ** 0.5 if beta3 is None else beta3,
        "eps": eps,
        "estim_lr0": estim_lr0,
        "estim_lr_coef": estim_lr_coef,
        "safeguard_warmup": safeguard_warmup,
    }
    along = link(
        rules.prodigy, given, storage=options.get("storage"), state=optax.contrib.ProdigyState
    )
    rate = Computed(rules.prodigy_step_size)
    chain = descend(along, rate, weight_decay=weight_decay, **options)
    return dataclasses.replace(chain, bare=True)

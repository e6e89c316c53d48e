"""AdaBelief."""

from __future__ import annotations

from typing import Unpack

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import FormOptions, Options, direction, link_of, optimizer

__all__ = ["adabelief", "scale_by_belief"]


@direction
def scale_by_belief(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-16,
    eps_root: NonNegative = 1e-16,
    *,
    nesterov: bool = False,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `adabelief`.

    >>> tx = scale_by_belief()
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "nesterov": nesterov}
    return link(
        rules.adabelief, given, storage=options.get("storage"), state=optax.ScaleByBeliefState
    )


@optimizer(
    paper="Zhuang et al., arXiv:2010.07468",
    year=2020,
    formula="m̂ / (√ŝ + ε), s = ema (g − m)²",
    purpose="long steps where g is predictable",
    learning_rate="0.8",
)
def adabelief(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-16,
    eps_root: NonNegative = 1e-16,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    *,
    nesterov: bool = False,
    **options: Unpack[FormOptions],
) -> Chain:
    """AdaBelief: Adam with larger steps where the gradient is near its average.

    Source: Zhuang et al. (2020), AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients, Algorithm 2.

    Args:
      b2: decay rate of the average squared deviation, in [0, 1).
      eps_root: ≥ 0, added to the second moment at each step, as in the paper.
      nesterov: look ahead as `nadam` does.

    >>> tx = adabelief(1e-3)
    """
    along = link_of(scale_by_belief)(
        b1, b2, eps, eps_root, nesterov=nesterov, storage=options.get("storage")
    )
    return descend(
        along,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        **options,
    )

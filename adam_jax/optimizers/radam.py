"""RAdam."""

from __future__ import annotations

from typing import Annotated, TypeAlias, Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, NonNegative, Numeric, Range, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, link_of, optimizer

__all__ = ["radam", "scale_by_radam"]


Threshold: TypeAlias = Annotated[Numeric, Range(">= 4 and finite", 4.0)]
"""RAdam's rectification has no real value below 4."""


@direction
def scale_by_radam(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    threshold: Threshold = 5.0,
    *,
    nesterov: bool = False,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `radam`.

    >>> tx = scale_by_radam(threshold=4.0)
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given |= {"threshold": threshold, "nesterov": nesterov}
    return link(rules.radam, given, storage=options.get("storage"))


@optimizer(
    paper="Liu et al., arXiv:1908.03265",
    year=2020,
    formula="r·m̂ / (√v̂ + ε), m̂ while ρ < 5",
    purpose="training without a warmup",
    learning_rate="1–8",
)
def radam(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    threshold: Threshold = 5.0,
    *,
    nesterov: bool = False,
    **options: Unpack[DecayOptions],
) -> Chain:
    """RAdam: Adam that steps by momentum alone until its second moment is reliable.

    Source: Liu et al. (2020), On the Variance of the Adaptive Learning Rate and Beyond.

    Args:
      threshold: ≥ 4, the averaging length ρ_t at which steps become adaptive: 5 in PyTorch and
        Optax, 4 in the paper.
      nesterov: look ahead as `nadam` does.

    >>> tx = radam(1e-3)
    """
    along = link_of(scale_by_radam)(
        b1, b2, eps, eps_root, threshold, nesterov=nesterov, storage=options.get("storage")
    )
    return descend(along, learning_rate, **options)

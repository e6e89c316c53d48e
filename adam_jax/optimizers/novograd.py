"""NovoGrad."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._engine.state import NovogradState
from adam_jax._util import errors
from adam_jax._util.typing import DecayRate, DType, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import Options, direction, link_of, optimizer
from adam_jax.storage._policy import with_dtype

__all__ = ["novograd", "scale_by_novograd"]


@direction
def scale_by_novograd(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.25,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mu_dtype: DType = None,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `novograd`, which includes weight decay.

    >>> tx = scale_by_novograd(weight_decay=1e-3)
    """
    errors.hyperparam("weight_decay", weight_decay)
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "decay_in_mu": weight_decay}
    return link(rules.novograd, given, storage=storage, state=NovogradState)


@optimizer(
    paper="Ginsburg et al., arXiv:1905.11286",
    year=2019,
    formula="m = β₁·m + g / (√v + ε) + λ·p, v = ema ‖g‖²",
    purpose="half the state; a step size per leaf",
    learning_rate="4–7",
)
def novograd(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.25,
    eps: NonNegative = 1e-6,
    eps_root: NonNegative = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Unpack[Options],
) -> Chain:
    """NovoGrad: momentum of gradients, each divided by its leaf's norm.

    nu is one float32 number per leaf, whatever the storage: an average of ‖g‖² that starts at the
    first ‖g‖². mu is a sum, so the direction is up to 1/(1 - b1) times as long as a term.
    Weight decay is inside mu; to exclude leaves, use `groups`.
    Source: Ginsburg et al. (2019), Stochastic Gradient Methods with Layer-wise Adaptive Moments for
    Training of Deep Networks, Algorithm 1.

    Args:
      b1: decay rate of the sum of normalized gradients, in [0, 1).
      b2: decay rate of the average squared norm, in [0, 1).

    >>> tx = novograd(0.01, weight_decay=1e-3)
    """
    along = link_of(scale_by_novograd)(
        b1, b2, eps, eps_root, weight_decay, storage=options.get("storage")
    )
    return descend(along, learning_rate, **options)

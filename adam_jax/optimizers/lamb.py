"""LAMB."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, link
from adam_jax._util.typing import DecayRate, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, link_of, optimizer
from adam_jax.optimizers.adam import scale_by_adam

__all__ = ["lamb"]


@optimizer(
    paper="You et al., arXiv:1904.00962",
    year=2020,
    formula="‖p‖/‖u‖·u, u = m̂ / (√v̂ + ε) + λ·p",
    purpose="very large batches",
    learning_rate="0.8–2",
)
def lamb(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-6,
    eps_root: NonNegative = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    **options: Unpack[MaskOptions],
) -> Chain:
    """LAMB: AdamW's step, including weight decay, scaled to the norm of each parameter.

    Every leaf has a trust ratio; to exclude biases and norms, as the authors' code does, use
    `optax.partition`. Source: You et al. (2020), Large Batch Optimization for Deep Learning,
    Algorithm 2 with φ the identity.

    >>> tx = lamb(1e-3, weight_decay=0.01)
    """
    along = link_of(scale_by_adam)(b1, b2, eps, eps_root, storage=options.get("storage"))
    return descend(
        along,
        learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        scale=(link(rules.trust_ratio, {}),),
        **options,
    )

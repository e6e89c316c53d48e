"""StableAdamW."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, DType, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, Options, direction, link_of, optimizer
from adam_jax.storage._policy import with_dtype

__all__ = ["scale_by_stable_adamw", "stable_adamw"]


@direction
def scale_by_stable_adamw(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    mu_dtype: DType = None,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `stable_adamw`.

    >>> tx = scale_by_stable_adamw()
    """
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    return link(rules.stable_adamw, {"b1": b1, "b2": b2, "eps": eps}, storage=storage)


@optimizer(
    paper="Wortsman et al., arXiv:2304.13013",
    year=2023,
    formula="m̂ / (√v̂ + ε) / max(1, rms(g/√v̂)) + λ·p",
    purpose="against loss spikes; replaces clipping",
    learning_rate="1",
)
def stable_adamw(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    **options: Unpack[MaskOptions],
) -> Chain:
    """StableAdamW: AdamW with smaller steps for leaves whose g² outgrows its average.

    It makes clipping by the global norm unnecessary. The weight decay is not scaled.
    Source: Wortsman et al. (2023), Stable and Low-Precision Training for Large-Scale
    Vision-Language Models, Algorithm 2.

    >>> tx = stable_adamw(1e-3, weight_decay=0.1)
    """
    along = link_of(scale_by_stable_adamw)(b1, b2, eps, mu_dtype, storage=options.get("storage"))
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)

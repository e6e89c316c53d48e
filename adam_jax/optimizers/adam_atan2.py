"""Adam-atan2."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, DType, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, link_of, optimizer
from adam_jax.storage._policy import with_dtype

__all__ = ["adam_atan2", "scale_by_adam_atan2"]


@direction
def scale_by_adam_atan2(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    a: NonNegative = 1.27,
    b: NonNegative = 1.0,
    mu_dtype: DType = None,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `adam_atan2`.

    >>> tx = scale_by_adam_atan2()
    """
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "a": a, "b": b}
    return link(rules.adam_atan2, given, storage=storage)


@optimizer(
    paper="Everett et al., arXiv:2407.05872",
    year=2024,
    formula="a·atan2(m̂, b·√v̂)",
    purpose="no ε to tune; gradients of any scale",
    learning_rate="0.8",
)
def adam_atan2(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    a: NonNegative = 1.27,
    b: NonNegative = 1.0,
    mu_dtype: DType = None,
    **options: Unpack[DecayOptions],
) -> Chain:
    """Adam-atan2: Adam with an arctangent instead of a division, so that it needs no epsilon.

    Real parameters only. Source: Everett et al. (2024), Scaling Exponents Across Parameterizations
    and Optimizers, section 4.

    Args:
      a: ≥ 0, the scale of the direction; with 4/π ≈ 1.27, a·atan2(1, 1) = 1.
      b: ≥ 0, the scale of the denominator.

    >>> tx = adam_atan2(1e-3)
    """
    along = link_of(scale_by_adam_atan2)(b1, b2, a, b, mu_dtype, storage=options.get("storage"))
    return descend(along, learning_rate, **options)

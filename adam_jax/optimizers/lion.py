"""Lion."""

from __future__ import annotations

from typing import Literal, Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util import errors
from adam_jax._util.typing import DecayRate, DType, Mask, Numeric, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import MaskOptions, Options, direction, link_of, optimizer
from adam_jax.storage._policy import with_dtype

__all__ = ["lion", "scale_by_lion"]


@direction
def scale_by_lion(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.99,
    mu_dtype: DType = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: Numeric = 1.0,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `lion`; other modes use tanh(smooth_beta·x) or clip(x, ±1).

    >>> tx = scale_by_lion(mode="smooth", smooth_beta=100.0)
    """
    errors.choice("mode", mode, ("hard", "smooth", "refined"))
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "mode": mode, "smooth_beta": smooth_beta}
    return link(rules.lion, given, storage=storage)


@optimizer(
    paper="Chen et al., arXiv:2302.06675",
    year=2023,
    formula="sign(β₁·m + (1−β₁)·g) + λ·p",
    purpose="half the state; needs 3–10 times the λ",
    learning_rate="0.2–0.3",
)
def lion(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.99,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    **options: Unpack[MaskOptions],
) -> Chain:
    """Lion: the sign of a momentum; it stores one moment.

    Every element moves by the learning rate. Use a learning rate 3 to 10 times smaller than AdamW's
    and a weight decay 3 to 10 times larger.
    Source: Chen et al. (2023), Symbolic Discovery of Optimization Algorithms, Algorithm 2.

    Args:
      b1: weight of the momentum in the step, in [0, 1).
      b2: decay rate of the momentum, in [0, 1).

    >>> tx = lion(1e-4, weight_decay=1.0)
    """
    along = link_of(scale_by_lion)(b1, b2, mu_dtype, storage=options.get("storage"))
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)

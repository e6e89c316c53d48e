"""Yogi."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, link_of, optimizer

__all__ = ["scale_by_yogi", "yogi"]


@direction
def scale_by_yogi(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-3,
    eps_root: NonNegative = 0.0,
    initial_accumulator_value: NonNegative = 1e-6,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `yogi`.

    >>> tx = scale_by_yogi(initial_accumulator_value=0.0)
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given["initial_accumulator_value"] = initial_accumulator_value
    return link(rules.yogi, given, storage=options.get("storage"))


@optimizer(
    paper="Zaheer et al., NeurIPS",
    year=2018,
    formula="m̂ / (√v̂ + ε), v −= (1−β₂)·sign(v − g²)·g²",
    purpose="sparse gradients; v falls slowly",
    learning_rate="2",
)
def yogi(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-3,
    **options: Unpack[DecayOptions],
) -> Chain:
    """Yogi: Adam whose nu moves toward g² by (1 - b2)·g².

    Source: Zaheer et al. (2018), Adaptive Methods for Nonconvex Optimization, Algorithm 2.

    >>> tx = yogi(1e-2)
    """
    along = link_of(scale_by_yogi)(b1, b2, eps, storage=options.get("storage"))
    return descend(along, learning_rate, **options)

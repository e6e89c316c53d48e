"""ADOPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import jax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util.typing import DecayRate, DType, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, link_of, optimizer
from adam_jax.storage._policy import with_dtype

__all__ = ["adopt", "scale_by_adopt"]


@direction
def scale_by_adopt(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.9999,
    eps: NonNegative = 1e-6,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[jax.Array], jax.Array] | None = None,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `adopt`.

    >>> tx = scale_by_adopt(use_clipping=False)
    """
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps, "nesterov": nesterov}
    given |= {"use_clipping": use_clipping, "clip_value_fn": clip_value_fn or rules.quartic_root}
    return link(rules.adopt, given, storage=storage)


@optimizer(
    paper="Taniguchi et al., arXiv:2411.02853",
    year=2024,
    formula="m = ema clip(g / max(√vₜ₋₁, ε))",
    purpose="converges with any β₂",
    learning_rate="0.3–1",
)
def adopt(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.9999,
    eps: NonNegative = 1e-6,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[jax.Array], jax.Array] | None = None,
    **options: Unpack[DecayOptions],
) -> Chain:
    """ADOPT: Adam that converges with any b2, because nu excludes the gradient that it divides.

    The first step only sets nu. Source: Taniguchi et al. (2024), ADOPT: Modified Adam Can Converge
    with Any β2 with the Optimal Rate, Algorithm 2.

    Args:
      eps: ≥ 0, a lower bound on the denominator.
      nesterov: average the normalized gradient into the momentum once more.
      use_clipping: whether to clip the normalized gradient to ±clip_value_fn(t - 1). Must be
        False for complex parameters.
      clip_value_fn: the bound; None for a fourth root, as in the paper.

    >>> tx = adopt(1e-3)
    """
    along = link_of(scale_by_adopt)(
        b1,
        b2,
        eps,
        mu_dtype,
        nesterov=nesterov,
        use_clipping=use_clipping,
        clip_value_fn=clip_value_fn,
        storage=options.get("storage"),
    )
    return descend(along, learning_rate, **options)

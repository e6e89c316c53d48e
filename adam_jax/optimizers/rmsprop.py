"""RMSprop."""

from __future__ import annotations

from typing import Unpack

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._engine.state import RmsCounted, RStdDevCounted
from adam_jax._util.typing import Momentum, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, link_of, optimizer
from adam_jax.optimizers.sgd import momentum_link
from adam_jax.storage._policy import may_round, renamed, split

__all__ = ["rmsprop", "scale_by_rms", "scale_by_stddev"]


@direction
def scale_by_rms(
    decay: Momentum = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `rmsprop`: g / √(nu + eps).

    >>> tx = scale_by_rms(decay=0.99, eps_in_sqrt=False)  # torch.optim.RMSprop
    """
    given = {"decay": decay, "eps": eps, "initial_scale": initial_scale}
    given |= {"eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    state = RmsCounted if bias_correction else optax.ScaleByRmsState
    return link(rules.rms, given, storage=options.get("storage"), state=state)


@direction
def scale_by_stddev(
    decay: Momentum = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `rmsprop` with centered=True: g / √(nu - mu² + eps).

    If `storage` is a function, or names a format other than float32, float64, or a complex dtype,
    the state has `variance`, nu - mu², in place of nu.

    >>> tx = scale_by_stddev(decay=0.99)
    """
    given = {"decay": decay, "eps": eps, "initial_scale": initial_scale}
    given |= {"eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    storage = options.get("storage")
    if may_round(storage, ("mu", "nu")):
        renamed_storage = renamed(storage, "nu", "variance")
        return link(rules.rms_variance, given, storage=renamed_storage)
    state = RStdDevCounted if bias_correction else optax.ScaleByRStdDevState
    return link(rules.rms_centered, given, storage=storage, state=state)


@optimizer(
    paper="Tieleman & Hinton, lecture 6.5",
    year=2012,
    formula="g / √(v + ε)",
    purpose="half the state; common in RL",
    learning_rate="0.6",
)
def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: Momentum = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Momentum | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    **options: Unpack[DecayOptions],
) -> Chain:
    """RMSprop: the gradient divided by the root of its average square.

    Source: Tieleman & Hinton (2012), lecture 6.5; Graves (2013) for the centered form.

    Args:
      decay: decay rate of the average squared gradient, in [0, 1].
      eps: ≥ 0, added inside the root or, if not `eps_in_sqrt`, to the root.
      initial_scale: ≥ 0, the initial nu: 0 in PyTorch, 1 in TensorFlow 1.
      eps_in_sqrt: whether eps is inside the root; PyTorch adds it to the root.
      centered: divide by the standard deviation instead.
      momentum: decay rate, in [0, 1], of heavy-ball momentum on the scaled update; None for none.
      nesterov: whether the momentum is Nesterov's.
      bias_correction: whether to bias-correct the averages.

    >>> tx = rmsprop(1e-3, decay=0.99, momentum=0.9)
    """
    direction_storage, trace_storage = split(options.get("storage"), ("mu", "nu"), ("trace",))
    along = link_of(scale_by_stddev if centered else scale_by_rms)(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, storage=direction_storage
    )
    after = (momentum_link(momentum, nesterov, trace_storage),)
    return descend(along, learning_rate, momentum=after, **options)

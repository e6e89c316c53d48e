"""Adam and AdamW."""

from __future__ import annotations

from typing import Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util import errors
from adam_jax._util.typing import DecayRate, DType, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import (
    DecayOptions,
    MaskOptions,
    Options,
    direction,
    link_of,
    optimizer,
)
from adam_jax.storage._policy import with_dtype

__all__ = ["adam", "adamw", "scale_by_adam"]


@direction
def scale_by_adam(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `adam`: m̂ / (√(v̂ + eps_root) + eps).

    >>> scale_by_adam(b2=0.99)
    scale_by_adam(b1=0.9, b2=0.99, eps=1e-08, eps_root=0.0)
    """
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps}
    if eps_hat:
        errors.only_eps(eps_root, nesterov)
        return link(rules.adam_eps_hat, given, storage=storage)
    rule = rules.nadam if nesterov else rules.adam
    return link(rule, {**given, "eps_root": eps_root}, storage=storage)


@optimizer(
    paper="Kingma & Ba, arXiv:1412.6980",
    year=2015,
    formula="m̂ / (√v̂ + ε)",
    purpose="the classic, without weight decay",
    learning_rate="1",
)
def adam(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    **options: Unpack[DecayOptions],
) -> Chain:
    """Adam: the average gradient divided by the root of the average squared gradient.

    u = m̂ / (√(v̂ + eps_root) + eps), where m̂ and v̂ are bias-corrected averages.
    Source: Kingma & Ba (2015), Adam: A Method for Stochastic Optimization, Algorithm 1.

    Args:
      nesterov: use NAdam's direction; see `nadam`.
      eps_hat: add eps to the uncorrected root, as Keras and TensorFlow do.

    >>> import jax.numpy as jnp, optax
    >>> tx = adam(0.125)
    >>> params = {"w": jnp.array([3.0])}
    >>> updates, state = tx.update({"w": jnp.array([0.5])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'w': Array([2.875], dtype=float32)}
    """
    storage = options.get("storage")
    along = link_of(scale_by_adam)(
        b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, eps_hat=eps_hat, storage=storage
    )
    return descend(along, learning_rate, **options)


@optimizer(
    paper="Loshchilov & Hutter, arXiv:1711.05101",
    year=2019,
    formula="m̂ / (√v̂ + ε) + λ·p",
    purpose="the default; hard to beat if tuned",
    learning_rate="1",
)
def adamw(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    **options: Unpack[MaskOptions],
) -> Chain:
    """AdamW: `adam` with decoupled weight decay, p ← p - η·(u + λ·p).

    Source: Loshchilov & Hutter (2019), Decoupled Weight Decay Regularization. λ is multiplied by
    the learning rate, as in PyTorch and Optax; the paper's form is
    weight_decay_form="independent".

    Args:
      weight_decay: λ ≥ 0, or a schedule. The default is Optax's; PyTorch's is 1e-2.
      nesterov: use NAdam's direction; see `nadam`.
      eps_hat: add eps to the uncorrected root, as Keras and TensorFlow do.

    >>> adamw(1e-3, weight_decay=0.1, weight_decay_form="cautious")
    adamw(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, weight_decay=0.1, \
weight_decay_form=cautious)
    """
    storage = options.get("storage")
    along = link_of(scale_by_adam)(
        b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, eps_hat=eps_hat, storage=storage
    )
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)

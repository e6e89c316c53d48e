"""The public constructors: a signature, a docstring, one chain each.

Where Optax has the name, a call that it accepts means the same here, positional order included.
What is ours comes after, by keyword, and is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import chex
import jax
import optax

from adam_jax import checks, rules
from adam_jax.declare import Rule
from adam_jax.engine import Link, lift, link
from adam_jax.states import RmsCounted, RStdDevCounted, WeightDecaySchedule
from adam_jax.storage import Storage, with_dtype
from adam_jax.transformation import Transformation, constructor

ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule
DType: TypeAlias = jax.typing.DTypeLike | None
Mask: TypeAlias = Any | Callable[[optax.Params], Any] | None
Form: TypeAlias = Literal["decoupled", "independent", "cautious", "l2"]

_DECAYS: dict[str, Rule] = {
    "decoupled": rules.decay_decoupled,
    "independent": rules.decay_independent,
    "cautious": rules.decay_cautious,
    "l2": rules.decay_decoupled,
}


def scale_by_rule(
    rule: Rule, *, storage: Storage = None, implementation: str = "auto", **hyperparams: Any
) -> Transformation:
    """The direction of a rule, lifted to pytrees: no weight decay, no learning rate.

    Args:
      rule: a declared variant; see `rule`.
      storage: what the moments are kept in: "float32", "bfloat16", a dtype, a mapping from moments
        to these, or a function (path, leaf) of these. By default a moment has its parameter's
        dtype (float32 for float16 parameters); bfloat16 is rounded stochastically.
      implementation: how a leaf's step is executed: "auto" or "xla".
      **hyperparams: the rule's, each a number, a scalar array or a schedule of the step count;
        those with a default may be left out.

    Returns:
      an Optax transformation whose updates are the direction, in the gradients' dtype.

    Raises:
      TypeError: a hyperparameter is unknown or missing.
      ValueError: a value is out of range, or storage or implementation is not one of those above.

    >>> import adam_jax
    >>> tx = scale_by_rule(adam_jax.rules.adam, b1=0.9, b2=0.95, eps=1e-8, eps_root=0.0)
    """
    with checks.naming(rule.name):
        return lift(
            [link(rule, hyperparams, formats=storage)], implementation, rule.name, bare=True
        )


def from_rule(
    rule: Rule,
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
    **hyperparams: Any,
) -> Transformation:
    """An optimizer from a declared rule: yours gets everything that the built-in ones get.

    Args:
      rule: a declared variant; see `rule`.
      learning_rate: η ≥ 0, or a schedule of the step count.
      **hyperparams: the rule's; those with a default may be left out.

    >>> import adam_jax
    >>> @adam_jax.rule(mu=adam_jax.signed)
    ... def sign_momentum(g, mu, *, b1=0.9):
    ...     mu = adam_jax.ema(b1, mu, g)
    ...     return jax.numpy.sign(mu), mu
    >>> from_rule(sign_momentum, 1e-3, b1=0.95)
    sign_momentum(learning_rate=0.001, b1=0.95)
    """
    direction = scale_by_rule(rule, storage=storage, **hyperparams)
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    with checks.naming(rule.name):
        tx = _optimizer(direction, learning_rate, decay, cautious, implementation)
    return tx.named(rule.name, {"learning_rate": learning_rate, **hyperparams})


@constructor
def scale_by_adam(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `adam`: m̂ / (√(v̂ + eps_root) + eps).

    >>> scale_by_adam(b2=0.99)
    scale_by_adam(b1=0.9, b2=0.99, eps=1e-08, eps_root=0.0)
    """
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps}
    if eps_hat:
        checks.only_eps(eps_root, nesterov)
        return _direction(rules.adam_eps_hat, given, storage, implementation)
    rule = rules.nadam if nesterov else rules.adam
    return _direction(rule, {**given, "eps_root": eps_root}, storage, implementation)


@constructor
def adam(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Adam: the average gradient over the root of the average squared gradient.

    u = m̂ / (√(v̂ + eps_root) + eps), where m̂ and v̂ are corrected for their start at zero.
    Source: Kingma & Ba (2015), Adam: A Method for Stochastic Optimization, Algorithm 1.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      nesterov: NAdam's direction instead; see `nadam`.
      eps_hat: put eps where Keras and TensorFlow do, beside the uncorrected root.

    >>> import jax.numpy as jnp, optax
    >>> tx = adam(0.125)
    >>> params = {"w": jnp.array([3.0])}
    >>> updates, state = tx.update({"w": jnp.array([0.5])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'w': Array([2.875], dtype=float32)}
    """
    direction = scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, eps_hat=eps_hat, storage=storage
    )
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def adamw(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """AdamW: `adam` with decoupled weight decay, p ← p - η·(u + λ·p).

    Source: Loshchilov & Hutter (2019), Decoupled Weight Decay Regularization; λ is multiplied by
    the learning rate, as in PyTorch and Optax (the paper's own form is
    weight_decay_form="independent").

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      weight_decay: λ ≥ 0, or a schedule. 1e-4 as in Optax; PyTorch's default is 1e-2.
      mask: Optax's name for weight_decay_mask.
      nesterov: NAdam's direction instead; see `nadam`.
      eps_hat: put eps where Keras and TensorFlow do, beside the uncorrected root.

    >>> adamw(1e-3, weight_decay=0.1, weight_decay_form="cautious")
    adamw(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, weight_decay=0.1, \
weight_decay_form=cautious)
    """
    direction = scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, eps_hat=eps_hat, storage=storage
    )
    decay = (weight_decay, checks.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def scale_by_nadam(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    *,
    momentum_decay: chex.Numeric | None = None,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `nadam`.

    >>> scale_by_nadam(momentum_decay=0.004)
    scale_by_nadam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, momentum_decay=0.004)
    """
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    if momentum_decay is None:
        return _direction(rules.nadam, given, storage, implementation)
    given["momentum_decay"] = momentum_decay
    return _direction(rules.nadam_scheduled, given, storage, implementation)


@constructor
def nadam(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    *,
    nesterov: bool = True,
    momentum_decay: chex.Numeric | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """NAdam: Adam with Nesterov's look ahead.

    The numerator of `adam` is replaced by the momentum that the next step would have.
    Source: Dozat (2016), Incorporating Nesterov Momentum into Adam.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      nesterov: False gives `adam` (Optax's argument).
      momentum_decay: None for a constant momentum, as in Optax; d ≥ 0 for
        b1·(1 - ½·0.96^(t·d)), which is 0.004 in PyTorch and 1.0 in Keras.

    >>> nadam(1e-3, momentum_decay=0.004)  # torch.optim.NAdam
    nadam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, nesterov=True, \
momentum_decay=0.004)
    """
    direction = (
        scale_by_nadam(
            b1, b2, eps, eps_root, mu_dtype, momentum_decay=momentum_decay, storage=storage
        )
        if nesterov
        else scale_by_adam(b1, b2, eps, eps_root, mu_dtype, storage=storage)
    )
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = True,
    momentum_decay: chex.Numeric | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """NAdamW: `nadam` with decoupled weight decay.

    Source: Dozat (2016) and Loshchilov & Hutter (2019); AlgoPerf's baseline.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.
      nesterov: False gives `adam` (Optax's argument).
      momentum_decay: None for a constant momentum, as in Optax; d ≥ 0 for
        b1·(1 - ½·0.96^(t·d)), which is 0.004 in PyTorch and 1.0 in Keras.

    >>> tx = nadamw(1e-3, weight_decay=0.05)
    """
    direction = (
        scale_by_nadam(
            b1, b2, eps, eps_root, mu_dtype, momentum_decay=momentum_decay, storage=storage
        )
        if nesterov
        else scale_by_adam(b1, b2, eps, eps_root, mu_dtype, storage=storage)
    )
    decay = (weight_decay, checks.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def scale_by_amsgrad(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_of: Literal["corrected", "raw"] = "corrected",
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `amsgrad`.

    >>> tx = scale_by_amsgrad(max_of="raw")
    """
    checks.choice("max_of", max_of, ("corrected", "raw"))
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given |= {"bias_correction_mu": bias_correction_mu, "bias_correction_nu": bias_correction_nu}
    rule = rules.amsgrad if max_of == "corrected" else rules.amsgrad_raw
    return _direction(rule, given, storage, implementation)


@constructor
def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_of: Literal["corrected", "raw"] = "corrected",
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """AMSGrad: Adam whose second moment never falls, so that it converges where Adam need not.

    Source: Reddi, Kale & Kumar (2018), On the Convergence of Adam and Beyond, Algorithm 2.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      bias_correction_mu: whether mu is corrected for its start at zero.
      bias_correction_nu: whether nu is.
      max_of: take the maximum of the corrected nu (Optax), or of the raw nu and correct that
        (PyTorch, Keras; with both corrections off, Reddi et al.).

    >>> tx = amsgrad(1e-3, max_of="raw")  # torch.optim.Adam(amsgrad=True)
    """
    direction = scale_by_amsgrad(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        bias_correction_mu,
        bias_correction_nu,
        max_of=max_of,
        storage=storage,
    )
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def scale_by_adamax(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `adamax`.

    >>> tx = scale_by_adamax(b2=0.99)
    """
    return _direction(rules.adamax, {"b1": b1, "b2": b2, "eps": eps}, storage, implementation)


@constructor
def adamax(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """AdaMax: the average gradient over its decaying largest magnitude.

    Source: Kingma & Ba (2015), Algorithm 2.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the largest gradient, in [0, 1).
      eps: ≥ 0, added to the gradient's magnitude.

    >>> tx = adamax(2e-3)
    """
    direction = scale_by_adamax(b1, b2, eps, storage=storage)
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """AdaMaxW: `adamax` with decoupled weight decay.

    Source: Kingma & Ba (2015), Algorithm 2, and Loshchilov & Hutter (2019).

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the largest gradient, in [0, 1).
      eps: ≥ 0, added to the gradient's magnitude.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.

    >>> tx = adamaxw(2e-3, weight_decay=0.01)
    """
    direction = scale_by_adamax(b1, b2, eps, storage=storage)
    decay = (weight_decay, checks.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def scale_by_radam(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    threshold: chex.Numeric = 5.0,
    *,
    nesterov: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `radam`.

    >>> tx = scale_by_radam(threshold=4.0)
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given |= {"threshold": threshold, "nesterov": nesterov}
    return _direction(rules.radam, given, storage, implementation)


@constructor
def radam(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    threshold: chex.Numeric = 5.0,
    *,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """RAdam: Adam that moves by momentum alone until its second moment can be trusted.

    Source: Liu et al. (2020), On the Variance of the Adaptive Learning Rate and Beyond.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root.
      threshold: ≥ 4, the averaging length ρ_t from which the step is adaptive: 5 in PyTorch and
        Optax, 4 in the paper.
      nesterov: look ahead as `nadam` does.

    >>> tx = radam(1e-3)
    """
    direction = scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov, storage=storage)
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


@constructor
def scale_by_rms(
    decay: chex.Numeric = 0.9,
    eps: chex.Numeric = 1e-8,
    initial_scale: chex.Numeric = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `rmsprop`: g / √(nu + eps).

    >>> tx = scale_by_rms(decay=0.99, eps_in_sqrt=False)  # torch.optim.RMSprop
    """
    given = {"decay": decay, "eps": eps, "initial_scale": initial_scale}
    given |= {"eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    state = RmsCounted if bias_correction else optax.ScaleByRmsState
    return _direction(rules.rms, given, storage, implementation, state)


@constructor
def scale_by_stddev(
    decay: chex.Numeric = 0.9,
    eps: chex.Numeric = 1e-8,
    initial_scale: chex.Numeric = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `rmsprop` with centered=True: g / √(nu - mu² + eps).

    >>> tx = scale_by_stddev(decay=0.99)
    """
    given = {"decay": decay, "eps": eps, "initial_scale": initial_scale}
    given |= {"eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    state = RStdDevCounted if bias_correction else optax.ScaleByRStdDevState
    return _direction(rules.rms_centered, given, storage, implementation, state)


@constructor
def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: chex.Numeric = 0.9,
    eps: chex.Numeric = 1e-8,
    initial_scale: chex.Numeric = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """RMSprop: the gradient over the root of its average square.

    Source: Tieleman & Hinton (2012), lecture 6.5; Graves (2013) for the centered form.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      decay: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added under the root, or to it.
      initial_scale: ≥ 0, where nu starts: 0 in PyTorch, 1 in TensorFlow 1.
      eps_in_sqrt: whether eps is under the root; PyTorch adds it to the root.
      centered: divide by the standard deviation instead.
      momentum: decay rate, in [0, 1), of heavy-ball momentum on the scaled update; None for none.
      nesterov: whether that momentum is Nesterov's.
      bias_correction: whether the averages are corrected for their start at zero.

    >>> tx = rmsprop(1e-3, decay=0.99, momentum=0.9)
    """
    direction = (scale_by_stddev if centered else scale_by_rms)(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, storage=storage
    )
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(
        direction,
        learning_rate,
        decay,
        cautious,
        implementation,
        [_momentum(momentum, nesterov, storage)],
    )


@constructor
def trace(
    decay: chex.Numeric,
    nesterov: bool = False,
    accumulator_dtype: DType = None,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `sgd` with momentum: trace ← g + decay·trace.

    >>> tx = trace(0.9, nesterov=True)
    """
    storage = with_dtype(storage, "trace", "accumulator_dtype", accumulator_dtype)
    return lift([_momentum(decay, nesterov, storage)], implementation, "trace", bare=True)


@constructor
def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
    accumulator_dtype: DType = None,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Gradient descent, with heavy-ball or Nesterov momentum.

    Source: Polyak (1964); Sutskever et al. (2013) for Nesterov's form.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      momentum: decay rate, in [0, 1); None for none.
      nesterov: whether the momentum is Nesterov's.
      accumulator_dtype: the dtype of the trace; the same as storage={"trace": dtype}.

    >>> tx = sgd(0.1, momentum=0.9, nesterov=True)
    """
    direction = lift(
        [
            _momentum(
                momentum,
                nesterov,
                with_dtype(storage, "trace", "accumulator_dtype", accumulator_dtype),
            )
        ],
        implementation,
        "sgd",
        bare=True,
    )
    decay = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, decay, cautious, implementation)


def _direction(
    rule: Rule,
    hyperparams: Mapping[str, Any],
    storage: Storage,
    implementation: str,
    state: type[Any] | None = None,
) -> Transformation:
    links = [link(rule, hyperparams, formats=storage, state=state)]
    return lift(links, implementation, rule.name, bare=True)


def _optimizer(
    direction: Transformation,
    learning_rate: ScalarOrSchedule | None,
    decay: tuple[ScalarOrSchedule | None, Mask, str],
    cautious: bool,
    implementation: str,
    after: Sequence[Link] = (),
) -> Transformation:
    """A direction with its weight decay and learning rate, executed leaf by leaf in one pass."""
    weight_decay, mask, form = decay
    checks.choice("weight_decay_form", form, _DECAYS)
    decays = [] if weight_decay is None else [_decay(weight_decay, mask, form)]
    links = [
        *(decays if form == "l2" else ()),
        *direction.source.links,
        *([link(rules.cautious, {})] if cautious else ()),
        *(decays if form in ("decoupled", "cautious") else ()),
        _descend(learning_rate),
        *(decays if form == "independent" else ()),
        *after,
    ]
    return lift(links, implementation, direction.source.name, bare=False)


def _decay(weight_decay: ScalarOrSchedule, mask: Mask, form: str) -> Link:
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return link(rules.identity, {}, mask=mask)  # which does without the parameters
    state = WeightDecaySchedule if callable(weight_decay) else None
    return link(_DECAYS[form], {"weight_decay": weight_decay}, state=state, mask=mask)


def _descend(learning_rate: ScalarOrSchedule | None) -> Link:
    if learning_rate is None:
        return link(rules.identity, {})
    state = optax.ScaleByScheduleState if callable(learning_rate) else None
    return link(rules.descend, {"learning_rate": learning_rate}, state=state)


def _momentum(momentum: chex.Numeric | None, nesterov: bool, storage: Storage) -> Link:
    if momentum is None:
        return link(rules.identity, {})
    return link(
        rules.trace,
        {"decay": momentum, "nesterov": nesterov},
        formats=storage,
        state=optax.TraceState,
    )

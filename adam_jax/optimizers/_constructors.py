"""The public constructors: a signature, a docstring, one chain each.

Where Optax has the name, a call that it accepts means the same here, positional order included.
What is ours comes after, by keyword, and is the same for all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import chex
import optax

from adam_jax import rules
from adam_jax._engine.chain import Link, lift, link
from adam_jax._engine.state import WeightDecaySchedule
from adam_jax._engine.transformation import Transformation, constructor, source_of, with_name
from adam_jax._util import errors
from adam_jax._util.declare import Rule
from adam_jax.optimizers._directions import (
    DType,
    ScalarOrSchedule,
    momentum_link,
    scale_by_adam,
    scale_by_adam_atan2,
    scale_by_adamax,
    scale_by_adan,
    scale_by_ademamix,
    scale_by_adopt,
    scale_by_amsgrad,
    scale_by_belief,
    scale_by_laprop,
    scale_by_lion,
    scale_by_nadam,
    scale_by_radam,
    scale_by_rms,
    scale_by_rule,
    scale_by_simplified_ademamix,
    scale_by_stable_adamw,
    scale_by_stddev,
    scale_by_yogi,
)
from adam_jax.schedules import ademamix_warmup
from adam_jax.storage import Storage, split, with_dtype

Mask: TypeAlias = Any | Callable[[optax.Params], Any] | None
Form: TypeAlias = Literal["decoupled", "independent", "cautious", "proximal", "l2"]

_DECAYS: dict[str, Rule] = {
    "decoupled": rules.decay_decoupled,
    "independent": rules.decay_independent,
    "cautious": rules.decay_cautious,
    "proximal": rules.decay_proximal,
    "l2": rules.decay_decoupled,
}


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
    ...     return mu / abs(mu), mu
    >>> from_rule(sign_momentum, 1e-3, b1=0.95)
    sign_momentum(learning_rate=0.001, b1=0.95)
    """
    errors.a_rule("from_rule", rule, Rule)
    direction = scale_by_rule(rule, storage=storage, **hyperparams)
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    with errors.naming(rule.name):
        tx = _optimizer(direction, learning_rate, wd, cautious, implementation)
    told = {"weight_decay": weight_decay, "storage": storage, "cautious": cautious or None}
    told = {k: v for k, v in told.items() if v is not None}
    return with_name(tx, rule.name, {"learning_rate": learning_rate, **hyperparams, **told})


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
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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
    nadam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, \
momentum_decay=0.004)
    """
    direction = (
        scale_by_nadam(
            b1, b2, eps, eps_root, mu_dtype, momentum_decay=momentum_decay, storage=storage
        )
        if nesterov
        else scale_by_adam(b1, b2, eps, eps_root, mu_dtype, storage=storage)
    )
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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

    Source: Dozat (2016) and Loshchilov & Hutter (2019). AlgoPerf's NAdamW is a variant of this one:
    it divides the looked-ahead momentum by 1 - b1^t alone.

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
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


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
      momentum: decay rate, in [0, 1], of heavy-ball momentum on the scaled update; None for none.
      nesterov: whether that momentum is Nesterov's.
      bias_correction: whether the averages are corrected for their start at zero.

    >>> tx = rmsprop(1e-3, decay=0.99, momentum=0.9)
    """
    of_direction, of_trace = split(storage, ("mu", "nu"), ("trace",))
    direction = (scale_by_stddev if centered else scale_by_rms)(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, storage=of_direction
    )
    after = [momentum_link(momentum, nesterov, of_trace)]
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation, after)


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
      momentum: decay rate, in [0, 1]; None for none.
      nesterov: whether the momentum is Nesterov's.
      accumulator_dtype: the dtype of the trace; the same as storage={"trace": dtype}.

    >>> tx = sgd(0.1, momentum=0.9, nesterov=True)
    """
    direction = lift(
        [
            momentum_link(
                momentum,
                nesterov,
                with_dtype(storage, "trace", "accumulator_dtype", accumulator_dtype),
            )
        ],
        implementation,
        "sgd",
        bare=True,
    )
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def adabelief(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-16,
    eps_root: chex.Numeric = 1e-16,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    *,
    nesterov: bool = False,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """AdaBelief: steps are long where the gradient comes as its average predicted.

    Source: Zhuang et al. (2020), AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients, Algorithm 2.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared surprise, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added to the second moment at each step, as in the paper.
      nesterov: look ahead as `nadam` does.

    >>> tx = adabelief(1e-3)
    """
    direction = scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov, storage=storage)
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def yogi(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-3,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Yogi: Adam whose second moment forgets no faster than it learns.

    Source: Zaheer et al. (2018), Adaptive Methods for Nonconvex Optimization, Algorithm 2.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.

    >>> tx = yogi(1e-2)
    """
    direction = scale_by_yogi(b1, b2, eps, storage=storage)
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def adan(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.98,
    b2: chex.Numeric = 0.92,
    b3: chex.Numeric = 0.99,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    difference_weight: Literal["b2", "1-b2"] = "b2",
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Adan: Nesterov momentum estimated from differences of gradients.

    Source: Xie et al. (2022), Adan: Adaptive Nesterov Momentum Algorithm, Algorithm 1. The
    authors' weight decay is weight_decay_form="proximal"; Optax adds it ("decoupled").

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1); the paper's 1 - β1.
      b2: decay rate of the average difference of gradients, in [0, 1).
      b3: decay rate of the average square, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root; 0 in the authors' code, 1e-8 in Optax.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.
      difference_weight: the weight of the difference in the step: b2 in the paper and in the
        authors' code, 1 - b2 in Optax, whose adan is therefore another method.

    >>> tx = adan(1e-3, weight_decay=0.02, weight_decay_form="proximal")  # the authors'
    """
    direction = scale_by_adan(
        b1, b2, b3, eps, eps_root, difference_weight=difference_weight, storage=storage
    )
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def laprop(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    mu_dtype: DType = None,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """LaProp: the gradient is normalised first and averaged then.

    Source: Ziyin, Wang & Ueda (2020), LaProp: Separating Momentum and Adaptivity in Adam.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.

    >>> tx = laprop(4e-4, weight_decay=0.1)
    """
    direction = scale_by_laprop(b1, b2, eps, mu_dtype, storage=storage)
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def adopt(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.9999,
    eps: chex.Numeric = 1e-6,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[chex.Array], chex.Array] | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """ADOPT: Adam that converges with any b2, as nu never contains the gradient that it divides.

    The first step only sets nu. Source: Taniguchi et al. (2024), ADOPT: Modified Adam Can Converge
    with Any β2 with the Optimal Rate, Algorithm 2.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, the least root that is divided by.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      nesterov: average the normalised gradient into the momentum once more.
      use_clipping: whether the normalised gradient is clipped to ±clip_value_fn(steps made).
      clip_value_fn: the bound; None for steps**0.25, as in the paper.

    >>> tx = adopt(1e-3)
    """
    direction = scale_by_adopt(
        b1,
        b2,
        eps,
        mu_dtype,
        nesterov=nesterov,
        use_clipping=use_clipping,
        clip_value_fn=clip_value_fn,
        storage=storage,
    )
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    warmup_steps: int | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """AdEMAMix: a fast and a slow average of the gradient, together over Adam's root.

    Source: Pagliardini, Ablin & Grangier (2024), The AdEMAMix Optimizer: Better, Faster, Older,
    Algorithm 1.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the fast average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      b3: decay rate of the slow average gradient, in [0, 1), or a schedule.
      alpha: ≥ 0, the weight of the slow average, or a schedule.
      eps_root: ≥ 0, added under the root.
      mu_dtype: the dtype of all three moments, as in Optax.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.
      warmup_steps: over how many steps alpha rises from 0 and b3 from b1, as in the paper (which
        takes the length of the run); None for no warmup. See `schedules.ademamix_warmup`.

    >>> tx = ademamix(1e-3, b3=0.9999, alpha=8.0, warmup_steps=100_000, weight_decay=0.1)
    """
    direction = scale_by_ademamix(
        b1,
        b2,
        *ademamix_warmup(b1, b3, alpha, warmup_steps),
        eps,
        eps_root,
        mu_dtype,
        storage=storage,
    )
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def simplified_ademamix(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.99,
    b2: chex.Numeric = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Simplified AdEMAMix: a sum of old gradients plus alpha times the new one, over Adam's root.

    The direction is up to 1/(1 - b1) times as long as Adam's: lower the learning rate accordingly.
    Source: Morwani et al. (2025), Connections between Schedule-Free Optimizers, AdEMAMix, and
    Accelerated SGD Variants, Algorithm 1.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the sum of gradients, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      alpha: ≥ 0, the weight of the current gradient, or a schedule.
      eps_root: ≥ 0, added under the root.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.

    >>> tx = simplified_ademamix(1e-5, alpha=100.0)
    """
    direction = scale_by_simplified_ademamix(b1, b2, alpha, eps, eps_root, storage=storage)
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def adam_atan2(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    a: chex.Numeric = 1.27,
    b: chex.Numeric = 1.0,
    mu_dtype: DType = None,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Adam-atan2: Adam's quotient inside an arc tangent, so that there is no epsilon to choose.

    Real parameters only. Source: Everett et al. (2024), Scaling Exponents Across Parameterizations
    and Optimizers, section 4.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      a: ≥ 0, the length of the direction; 4/π = 1.27 makes atan2(1, 1) one.
      b: ≥ 0, the scale of the denominator.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.

    >>> tx = adam_atan2(1e-3)
    """
    direction = scale_by_adam_atan2(b1, b2, a, b, mu_dtype, storage=storage)
    wd = (weight_decay, weight_decay_mask, weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def stable_adamw(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """StableAdamW: AdamW whose step shrinks, leaf by leaf, when gradients outgrow their average.

    It makes clipping by the global norm unnecessary. The weight decay is not shrunk.
    Source: Wortsman et al. (2023), Stable and Low-Precision Training for Large-Scale
    Vision-Language Models, Algorithm 2.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.

    >>> tx = stable_adamw(1e-3, weight_decay=0.1)
    """
    direction = scale_by_stable_adamw(b1, b2, eps, mu_dtype, storage=storage)
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def lion(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Lion: the sign of a momentum; one moment, and steps of one size.

    Learning rates are 3 to 10 times smaller than AdamW's, weight decay as much larger.
    Source: Chen et al. (2023), Symbolic Discovery of Optimization Algorithms, Algorithm 2.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: weight of the momentum in the step, in [0, 1).
      b2: decay rate of the momentum, in [0, 1).
      mu_dtype: the dtype of mu; the same as storage={"mu": dtype}.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.

    >>> tx = lion(1e-4, weight_decay=1.0)
    """
    direction = scale_by_lion(b1, b2, mu_dtype, storage=storage)
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation)


@constructor
def lamb(
    learning_rate: ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-6,
    eps_root: chex.Numeric = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """LAMB: AdamW's step, decay included, made as long as the weights it moves, leaf by leaf.

    The trust ratio is on for every leaf (the authors' code leaves out biases and norms: use
    `optax.partition`). Source: You et al. (2020), Large Batch Optimization for Deep Learning,
    Algorithm 2 with φ the identity.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.
      b1: decay rate of the average gradient, in [0, 1).
      b2: decay rate of the average squared gradient, in [0, 1).
      eps: ≥ 0, added to the root.
      eps_root: ≥ 0, added under the root.
      weight_decay: λ ≥ 0, or a schedule.
      mask: Optax's name for weight_decay_mask.

    >>> tx = lamb(1e-3, weight_decay=0.01)
    """
    direction = scale_by_adam(b1, b2, eps, eps_root, storage=storage)
    wd = (weight_decay, errors.one_mask(mask, weight_decay_mask), weight_decay_form)
    return _optimizer(direction, learning_rate, wd, cautious, implementation, trust=True)


def _optimizer(
    direction: Transformation,
    learning_rate: ScalarOrSchedule | None,
    wd: tuple[ScalarOrSchedule | None, Mask, str],
    cautious: bool,
    implementation: str,
    after: Sequence[Link] = (),
    trust: bool = False,
) -> Transformation:
    """A direction with its weight decay and learning rate, executed leaf by leaf in one pass."""
    weight_decay, mask, form = wd
    errors.choice("weight_decay_form", form, _DECAYS)
    errors.mask_without_decay(weight_decay, mask)
    decays = [] if weight_decay is None else [_decay(weight_decay, learning_rate, mask, form)]
    if decays or cautious:  # which would otherwise go through the momentum that comes after
        directions, after = [*source_of(direction).links, *after], ()
    else:
        directions = source_of(direction).links
    links = [
        *(decays if form == "l2" else ()),
        *directions,
        *([link(rules.cautious, {})] if cautious else ()),
        *(decays if form in ("decoupled", "cautious", "proximal") else ()),
        *([link(rules.trust_ratio, {})] if trust else ()),
        _descend(learning_rate),
        *(decays if form == "independent" else ()),
        *after,
    ]
    return lift(links, implementation, source_of(direction).name, bare=False)


def _decay(
    weight_decay: ScalarOrSchedule, learning_rate: ScalarOrSchedule | None, mask: Mask, form: str
) -> Link:
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return link(rules.identity, {}, mask=mask)  # which does without the parameters
    given = {"weight_decay": weight_decay}
    if form == "proximal":
        given |= {"learning_rate": learning_rate}
    state = WeightDecaySchedule if any(map(callable, given.values())) else None
    return link(_DECAYS[form], given, state=state, mask=mask)


def _descend(learning_rate: ScalarOrSchedule | None) -> Link:
    if learning_rate is None:
        return link(rules.identity, {})
    state = optax.ScaleByScheduleState if callable(learning_rate) else None
    return link(rules.descend, {"learning_rate": learning_rate}, state=state)

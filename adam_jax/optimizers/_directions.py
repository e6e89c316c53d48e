"""Directions: a rule lifted to pytrees, without weight decay and learning rate.

Optax's names and signatures where it has them; ours follow by keyword.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import chex
import jax
import optax

from adam_jax import rules
from adam_jax._engine.chain import Link, lift, link
from adam_jax._engine.state import RmsCounted, RStdDevCounted
from adam_jax._engine.transformation import Transformation, constructor
from adam_jax._util import errors
from adam_jax._util.declare import Rule
from adam_jax.storage import Storage, may_round, renamed, with_dtype

ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule
DType: TypeAlias = jax.typing.DTypeLike | None


def scale_by_rule(
    rule: Rule, *, storage: Storage = None, implementation: str = "auto", **hyperparams: Any
) -> Transformation:
    """The direction of a rule, lifted to pytrees: no weight decay, no learning rate.

    Args:
      rule: a declared variant; see `rule`.
      storage: what the moments are kept in: "float32", "bfloat16", "int8", "float64", a mapping
        from moments to these, or a function (path, leaf) of these. By default a moment has its
        parameter's dtype (float32 for float16 parameters); bfloat16 and int8 are rounded
        stochastically, and leaves under 4096 elements stay float32 where a name asks for int8.
      implementation: how a leaf's step is executed: "xla", "stream", "pallas" or "auto".
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
    errors.a_rule("scale_by_rule", rule, Rule)
    with errors.naming(rule.name):
        return lift(
            [link(rule, hyperparams, formats=storage)], implementation, rule.name, bare=True
        )


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
        errors.only_eps(eps_root, nesterov)
        return _direction(rules.adam_eps_hat, given, storage, implementation)
    rule = rules.nadam if nesterov else rules.adam
    return _direction(rule, {**given, "eps_root": eps_root}, storage, implementation)


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
    errors.choice("max_of", max_of, ("corrected", "raw"))
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given |= {"bias_correction_mu": bias_correction_mu, "bias_correction_nu": bias_correction_nu}
    rule = rules.amsgrad if max_of == "corrected" else rules.amsgrad_raw
    return _direction(rule, given, storage, implementation)


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

    With storage="bfloat16" or "int8" the state keeps nu - mu², as `variance`, in place of nu.

    >>> tx = scale_by_stddev(decay=0.99)
    """
    given = {"decay": decay, "eps": eps, "initial_scale": initial_scale}
    given |= {"eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    if may_round(storage, ("mu", "nu")):
        return _direction(
            rules.rms_variance, given, renamed(storage, "nu", "variance"), implementation
        )
    state = RStdDevCounted if bias_correction else optax.ScaleByRStdDevState
    return _direction(rules.rms_centered, given, storage, implementation, state)


@constructor
def scale_by_belief(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-16,
    eps_root: chex.Numeric = 1e-16,
    *,
    nesterov: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `adabelief`.

    >>> tx = scale_by_belief()
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "nesterov": nesterov}
    return _direction(rules.adabelief, given, storage, implementation, optax.ScaleByBeliefState)


@constructor
def scale_by_yogi(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-3,
    eps_root: chex.Numeric = 0.0,
    initial_accumulator_value: chex.Numeric = 1e-6,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `yogi`.

    >>> tx = scale_by_yogi(initial_accumulator_value=0.0)
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given["initial_accumulator_value"] = initial_accumulator_value
    return _direction(rules.yogi, given, storage, implementation)


@constructor
def scale_by_adan(
    b1: chex.Numeric = 0.98,
    b2: chex.Numeric = 0.92,
    b3: chex.Numeric = 0.99,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    *,
    difference_weight: Literal["b2", "1-b2"] = "b2",
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `adan`.

    >>> tx = scale_by_adan(difference_weight="1-b2")  # Optax's
    """
    errors.choice("difference_weight", difference_weight, ("b2", "1-b2"))
    given = {"b1": b1, "b2": b2, "b3": b3, "eps": eps, "eps_root": eps_root}
    given |= {"difference_weight": difference_weight}
    return _direction(rules.adan, given, storage, implementation, optax.ScaleByAdanState)


@constructor
def scale_by_laprop(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    mu_dtype: DType = None,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `laprop`.

    >>> tx = scale_by_laprop()
    """
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    return _direction(rules.laprop, {"b1": b1, "b2": b2, "eps": eps}, storage, implementation)


@constructor
def scale_by_adopt(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.9999,
    eps: chex.Numeric = 1e-6,
    mu_dtype: DType = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[chex.Array], chex.Array] | None = None,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `adopt`.

    >>> tx = scale_by_adopt(use_clipping=False)
    """
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps, "nesterov": nesterov}
    given |= {"use_clipping": use_clipping, "clip_value_fn": clip_value_fn or rules.quartic_root}
    return _direction(rules.adopt, given, storage, implementation)


@constructor
def scale_by_ademamix(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 6.0,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    mu_dtype: DType = None,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `ademamix`.

    >>> tx = scale_by_ademamix(alpha=8.0)
    """
    for moment in rules.ademamix.moments:
        storage = with_dtype(storage, moment, "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "b3": b3, "alpha": alpha, "eps": eps, "eps_root": eps_root}
    state = optax.contrib.ScaleByAdemamixState
    return _direction(rules.ademamix, given, storage, implementation, state)


@constructor
def scale_by_simplified_ademamix(
    b1: chex.Numeric = 0.99,
    b2: chex.Numeric = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: chex.Numeric = 1e-8,
    eps_root: chex.Numeric = 0.0,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `simplified_ademamix`.

    >>> tx = scale_by_simplified_ademamix(alpha=10.0)
    """
    given = {"b1": b1, "b2": b2, "alpha": alpha, "eps": eps, "eps_root": eps_root}
    state = optax.contrib.ScaleBySimplifiedAdEMAMixState
    return _direction(rules.simplified_ademamix, given, storage, implementation, state)


@constructor
def scale_by_adam_atan2(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    a: chex.Numeric = 1.27,
    b: chex.Numeric = 1.0,
    mu_dtype: DType = None,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `adam_atan2`.

    >>> tx = scale_by_adam_atan2()
    """
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "a": a, "b": b}
    return _direction(rules.adam_atan2, given, storage, implementation)


@constructor
def scale_by_stable_adamw(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    mu_dtype: DType = None,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `stable_adamw`.

    >>> tx = scale_by_stable_adamw()
    """
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    return _direction(rules.stable_adamw, {"b1": b1, "b2": b2, "eps": eps}, storage, implementation)


@constructor
def scale_by_lion(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    mu_dtype: DType = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: chex.Numeric = 1.0,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """The direction of `lion`; Optax's other modes have tanh(smooth_beta·x) or clip(x, ±1).

    >>> tx = scale_by_lion(mode="smooth", smooth_beta=100.0)
    """
    errors.choice("mode", mode, ("hard", "smooth", "refined"))
    storage = with_dtype(storage, "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "mode": mode, "smooth_beta": smooth_beta}
    return _direction(rules.lion, given, storage, implementation)


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
    return lift([_trace(decay, nesterov, storage)], implementation, "trace", bare=True)


def momentum_link(momentum: chex.Numeric | None, nesterov: bool, storage: Storage) -> Link:
    """The momentum of `sgd` and `rmsprop`, or a link that does nothing."""
    if callable(momentum):
        errors.no_step_count("momentum", optax.TraceState)
    return link(rules.identity, {}) if momentum is None else _trace(momentum, nesterov, storage)


def _trace(decay: chex.Numeric, nesterov: bool, storage: Storage) -> Link:
    given = {"decay": decay, "nesterov": nesterov}
    return link(rules.trace, given, formats=storage, state=optax.TraceState)


def _direction(
    rule: Rule,
    hyperparams: Mapping[str, Any],
    storage: Storage,
    implementation: str,
    state: type[Any] | None = None,
) -> Transformation:
    links = [link(rule, hyperparams, formats=storage, state=state)]
    return lift(links, implementation, rule.name, bare=True)

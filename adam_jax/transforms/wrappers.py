"""Wrappers around a direction, such as `scale_by_adam()`, that also use the gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, link
from adam_jax._engine.transformation import (
    Transformation,
    describe,
    links_of,
    source_of,
    transformation_of,
    with_repr,
)
from adam_jax._util import errors
from adam_jax._util.declare import Rule
from adam_jax._util.typing import FROM_ZERO, UNIT, DecayRate, NonNegative, PyTree
from adam_jax.optimizers.from_rule import scale_by_rule
from adam_jax.storage import Storage
from adam_jax.transforms.chain import chain


def cautious(tx: optax.GradientTransformation) -> Transformation:
    """Zero the components of a direction that oppose the gradient, and rescale the others.

    Per leaf: u·φ / max(mean φ, 1e-3), with φ = 1 where u·g > 0. The state is the state of `tx`.
    Source: Liang et al. (2024), Cautious Optimizers: Improving Training with One Line of Code.

    Args:
      tx: a direction, such as `scale_by_adam()`, to be multiplied by the learning rate afterwards.

    Raises:
      ValueError: tx is a finished optimizer, whose updates point against the gradient.

    >>> import optax, adam_jax
    >>> tx = optax.chain(cautious(adam_jax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))
    """
    return _follow(tx, rules.cautious)


def grams(tx: optax.GradientTransformation) -> Transformation:
    """Combine a direction's magnitudes with the gradient's signs: sign(g)·|u|.

    The state is the state of `tx`.

    Source: Cao et al. (2024), Grams: Gradient Descent with Adaptive Momentum Scaling.

    Args:
      tx: a direction, such as `scale_by_adam()`.

    Raises:
      ValueError: tx is a finished optimizer, whose updates point against the gradient.

    >>> import optax, adam_jax
    >>> tx = optax.chain(grams(adam_jax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))
    """
    return _follow(tx, rules.grams)


def mars(
    tx: optax.GradientTransformation,
    gamma: NonNegative = 0.025,
    b1: DecayRate = 0.95,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Pass a variance-reduced gradient to `tx`: g + γ·b1/(1 - b1)·(g - g_prev).

    Each leaf of this gradient is clipped to norm 1. This is the paper's approximate form: g_prev is
    the previous batch's gradient, not this batch's at the previous parameters. g_prev starts at 0,
    as in the authors' code. The state is the pair (state with g_prev, state of `tx`).
    Source: Yuan et al. (2024), MARS: Unleashing the Power of Variance Reduction, Algorithm 2.

    Args:
      tx: a direction or an optimizer.
      gamma: ≥ 0, the strength of the variance reduction.
      b1: in [0, 1), the decay rate of the momentum in tx.

    >>> import adam_jax
    >>> tx = mars(adam_jax.adamw(3e-3, b1=0.95, b2=0.99))
    """
    given: dict[str, PyTree] = {"gamma": gamma, "b1": b1}
    with errors.error_context("mars"):
        errors.transformation("tx", tx, "mars(tx)")
        errors.in_range("gamma", gamma, FROM_ZERO)
    corrected = scale_by_rule(rules.mars, storage=storage, implementation=implementation, **given)
    return with_repr(chain(corrected, tx), f"mars({tx!r}, gamma={gamma}, b1={b1})")


def grokfast(
    tx: optax.GradientTransformation,
    alpha: DecayRate = 0.98,
    lamb: NonNegative = 2.0,
    *,
    storage: Storage = None,
    implementation: str = "auto",
) -> Transformation:
    """Pass g + lamb·slow to `tx`, where slow averages the gradients: Grokfast-EMA.

    It lets a small model that has memorized its data generalize sooner. The state is the pair
    (state with slow, state of `tx`).
    Source: Lee et al. (2024), Grokfast: Accelerated Grokking by Amplifying Slow Gradients,
    arXiv:2405.20233, Algorithm 2.

    Args:
      tx: a direction or an optimizer.
      alpha: in [0, 1), the decay rate of the average gradient.
      lamb: ≥ 0, the weight of the average gradient.

    >>> import adam_jax
    >>> tx = grokfast(adam_jax.adamw(1e-3, weight_decay=1.0))
    """
    given: dict[str, PyTree] = {"alpha": alpha, "lamb": lamb}
    with errors.error_context("grokfast"):
        errors.transformation("tx", tx, "grokfast(tx)")
        errors.in_range("alpha", alpha, UNIT)
        errors.in_range("lamb", lamb, FROM_ZERO)
    amplified = scale_by_rule(
        rules.grokfast, storage=storage, implementation=implementation, **given
    )
    return with_repr(chain(amplified, tx), f"grokfast({tx!r}, alpha={alpha}, lamb={lamb})")


def _follow(tx: optax.GradientTransformation, rule: Rule) -> Transformation:
    with errors.error_context(rule.name):
        errors.transformation("tx", tx, f"{rule.name}(tx)")
    refuse_finished(rule.name, tx)
    inner = optax.with_extra_args_support(tx)
    follower = Chain(rule.name, (link(rule, {}),), "auto", bare=True)
    follow = errors.error_context(rule.name)(follower.step)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        direction, state = inner.update(updates, state, params, **extra)
        empty = optax.EmptyState()
        out, _ = follow(direction, empty, None, {}, emit_params=False, grads=updates)
        return out, state

    parts = (tx, follower.transformation())
    return transformation_of(parts, tx.init, update, f"{rule.name}({tx!r})")


def refuse_finished(wrapper: str, tx: optax.GradientTransformation) -> None:
    """Raise if the updates of a transformation point against the gradient."""
    if any(link.rule is rules.descend for _, link in links_of(tx)) or _descends(tx):
        errors.not_a_direction(wrapper, describe(tx))


def _descends(tx: optax.GradientTransformation) -> bool:
    """Whether the updates of a transformation point against the gradient.

    Optax's transformations can't be inspected, so take two steps on a scalar; the first update may
    be 0, for example in a warmup. If the steps fail or are traced, assume a
    direction: `tx` may require other parameters than a scalar.
    """
    if isinstance(source_of(tx), Chain):  # `_follow` has checked its links
        return False

    def two_updates(one: jax.Array) -> PyTree:
        first, state = tx.update(one, tx.init(one), one)
        return first, tx.update(one, state, one)[0]

    try:
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            first, second = map(float, jax.jit(two_updates)(jnp.float32(1)))
    except Exception:
        return False
    return (first or second) < 0

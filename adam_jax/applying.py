"""A step from gradients to new parameters, in one pass where that is possible."""

from __future__ import annotations

from typing import Any

import optax

from adam_jax import rules
from adam_jax.engine import lift, link
from adam_jax.parameters import any_narrow, full, widened
from adam_jax.transformation import applies

_LAND = lift([link(rules.identity, {})], "auto", "apply", bare=True)


def apply(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra: Any,
) -> tuple[optax.Params, optax.OptState]:
    """`update` and `optax.apply_updates` at once: nothing is written but parameters and state.

    The result is theirs. Donate `params` and `state` to the jitted step that calls it, and coded
    state is updated in place beside them; the gradients stay as they are.

    Args:
      tx: an optimizer of ours, `chain`, `tunable`, `master_weights`, `stochastic_rounding` or
        `zero1` around one; with any other Optax transformation its two functions are called.
      grads: gradients, with the parameters' structure and shapes.
      state: the state of `tx`.
      params: the parameters.
      **extra: what `tx.update` takes beside these.

    Returns:
      the new parameters, in their dtypes, and the new state.

    Raises:
      ValueError: what `tx.update` raises for gradients or a state that do not fit.

    >>> import adam_jax, jax.numpy as jnp
    >>> tx = adam_jax.adam(0.125)
    >>> params = {"w": jnp.array([3.0])}
    >>> params, state = apply(tx, {"w": jnp.array([0.5])}, tx.init(params), params)
    >>> params
    {'w': Array([2.875], dtype=float32)}
    """
    if applies(tx):
        return step(tx, grads, state, params, apply=True, **extra)
    updates, new = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), new


def step(
    tx: Any, updates: optax.Updates, state: Any, params: Any, *, apply: bool, **extra: Any
) -> tuple[Any, Any]:
    """One step of any transformation on parameters that may be Narrow, which it gives anew.

    Of the others it gives the update, or with `apply` the new parameter, too.
    """
    if applies(tx):
        return tx.update(updates, state, params, apply=apply, **extra)
    whole = full(params)
    updates = widened(updates, params)
    updates, state = optax.with_extra_args_support(tx).update(updates, state, whole, **extra)
    if not (apply or any_narrow(params)):
        return updates, state
    return _LAND.update(updates, optax.EmptyState(), params, apply=apply)[0], state

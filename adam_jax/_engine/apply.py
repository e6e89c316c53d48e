"""A step from gradients to new parameters, in one pass where that is possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from adam_jax import rules
from adam_jax._engine.chain import lift, link
from adam_jax._engine.split_params import any_narrow, full, widened
from adam_jax._engine.transformation import emits_params
from adam_jax._util import errors

_EMIT: Any = lift([link(rules.identity, {})], "auto", "apply", bare=True)


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
    with errors.naming("apply"):
        errors.transformation("tx", tx, "apply(tx, grads, state, params)")
    if emits_params(tx):
        return step(tx, grads, state, params, extra, emit_params=True)
    updates, new = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), new


def step(
    tx: Any,
    updates: optax.Updates,
    state: Any,
    params: Any,
    extra: Mapping[str, Any],
    *,
    emit_params: bool,
) -> tuple[Any, Any]:
    """Step any transformation on parameters that may be Narrow, which are returned anew.

    For the others return the update, or with `emit_params` the new parameter, too.
    """
    if emits_params(tx):
        return tx.update.function(updates, state, params, extra, emit_params=emit_params)
    whole = full(params)
    updates = widened(updates, params)
    updates, state = optax.with_extra_args_support(tx).update(updates, state, whole, **extra)
    if not (emit_params or any_narrow(params)):
        return updates, state
    empty = optax.EmptyState()
    emitted, _ = _EMIT.update.function(updates, empty, params, {}, emit_params=emit_params)
    return emitted, state

"""A step from gradients to new parameters, in one pass where that is possible."""

from __future__ import annotations

from collections.abc import Mapping

import optax

from adam_jax._engine.chain import Chain
from adam_jax._engine.split_params import any_split, to_float32, upcast_updates
from adam_jax._engine.transformation import emits_params, update_of
from adam_jax._util import errors
from adam_jax._util.typing import PyTree

_NO_LINKS = Chain("apply", (), "auto")


def apply(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra: PyTree,
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
    with errors.error_context("apply"):
        errors.transformation("tx", tx, "apply(tx, grads, state, params)")
    if emits_params(tx):
        return step(tx, grads, state, params, extra, emit_params=True)
    updates, new = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), new


def step(
    tx: optax.GradientTransformation,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    extra: Mapping[str, PyTree],
    *,
    emit_params: bool,
) -> tuple[PyTree, PyTree]:
    """Step any transformation; new SplitParams are returned, and updates for other parameters.

    With `emit_params` return new parameters only.
    """
    if emits_params(tx):
        return update_of(tx).function(updates, state, params, extra, emit_params=emit_params)
    updates = upcast_updates(updates, params)
    update = optax.with_extra_args_support(tx).update
    updates, state = update(updates, state, to_float32(params), **extra)
    if emit_params or any_split(params):
        updates, _ = _NO_LINKS.step(updates, (), params, {}, emit_params=emit_params)
    return updates, state

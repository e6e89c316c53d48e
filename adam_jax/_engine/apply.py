"""Computes new parameters from gradients, in one pass if possible."""

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
    """Compute `tx.update` and `optax.apply_updates` in one pass, with the same result.

    Updates aren't written to memory. If the jitted caller donates `params` and `state`,
    parameters and quantized state are updated in place. Gradients aren't overwritten.

    Args:
      tx: an adam_jax optimizer, alone or in `chain`, `tunable`, `master_weights`,
        `stochastic_rounding`, or `zero1`. Other transformations run `update` and
        `apply_updates` separately.
      grads: gradients, with the parameters' structure and shapes.
      state: the state of `tx`.
      params: the parameters.
      **extra: further arguments of `tx.update`.

    Returns:
      the new parameters, with dtypes unchanged, and the new state. (`master_weights` describes a
      rare difference.)

    Raises:
      ValueError: as in `tx.update`, if the gradients or the state don't fit.

    >>> import adam_jax, jax.numpy as jnp
    >>> tx = adam_jax.adam(0.125)
    >>> params = {"w": jnp.array([3.0])}
    >>> params, state = apply(tx, {"w": jnp.array([0.5])}, tx.init(params), params)
    >>> params
    {'w': Array([2.875], dtype=float32)}
    """
    with errors.error_context("apply"):
        errors.transformation("tx", tx, "apply(tx, grads, state, params)")
        errors.both_given(grads, params)
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
    """Step any transformation; return updates, or for a `SplitParam`, the new parameter.

    If `emit_params`, return new parameters for all leaves.
    """
    if emits_params(tx):
        return update_of(tx).function(updates, state, params, extra, emit_params=emit_params)
    updates = upcast_updates(updates, params)
    update = optax.with_extra_args_support(tx).update
    updates, state = update(updates, state, to_float32(params), **extra)
    if emit_params or any_split(params):
        updates, _ = _NO_LINKS.step(updates, (), params, {}, emit_params=emit_params)
    return updates, state

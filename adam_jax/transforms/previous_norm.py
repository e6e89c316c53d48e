"""Clipping by the gradient norm of the previous step, for gradient release."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._engine import parts
from adam_jax._engine.transformation import Transformation, transformation_of
from adam_jax._util import errors
from adam_jax._util.numerics import sum_of_squares
from adam_jax._util.paths import by_key
from adam_jax._util.typing import Numeric, PyTree
from adam_jax.transforms.clip import check_max_norm, clip_link, clipped


class PreviousNormState(NamedTuple):
    """The state of `clip_to_previous_norm`."""

    norm: jax.Array
    """The last finite global norm; 0 before the first step."""


@errors.error_context("clip_to_previous_norm")
def clip_to_previous_norm(max_norm: Numeric) -> Transformation:
    """Scale gradients by min(1, max_norm / norm), where norm is the previous step's gradient norm.

    Clipping by this step's norm needs the whole gradient, which `gradient_release` never has.
    The previous norm is nearly the same in most steps, but it doesn't limit the first large
    gradient. For that, use `stable_adamw`. The first step uses its own norm, for which
    `gradient_release` runs the backward pass twice. Non-finite norms aren't stored.

    Args:
      max_norm: > 0, the largest global norm allowed.

    Returns:
      an Optax transformation whose state is a `PreviousNormState`.

    Raises:
      TypeError: max_norm isn't a number.
      ValueError: max_norm isn't > 0.

    >>> import adam_jax
    >>> adam_jax.chain(clip_to_previous_norm(1.0), adam_jax.sgd(0.1))
    chain(clip_to_previous_norm(1.0), sgd(learning_rate=0.1))
    """
    check_max_norm(max_norm)

    def init(params: optax.Params) -> PreviousNormState:
        del params
        return PreviousNormState(jnp.zeros([], jnp.float32))

    @errors.error_context("clip_to_previous_norm")
    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PreviousNormState]:
        del params
        errors.made_by_init(state, PreviousNormState)
        square = parts.total(sum_of_squares(parts.own(by_key(updates))))
        own = jnp.sqrt(square).astype(jnp.float32)
        norm = jnp.where(state.norm == 0, own, state.norm)
        clip = clip_link(norm, max_norm)
        updates, _ = clipped("clip_to_previous_norm", clip, updates, optax.EmptyState(), extra)
        return updates, PreviousNormState(jnp.where(jnp.isfinite(own), own, state.norm))

    return transformation_of((), init, update, f"clip_to_previous_norm({max_norm})")

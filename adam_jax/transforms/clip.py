"""Clipping by the global norm, inside the next optimizer's step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._engine.transformation import Transformation, transformation_of
from adam_jax._util import errors
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.typing import Numeric, PyTree


@dataclasses.dataclass(frozen=True)
class GlobalNormClip:
    """The settings of `clip_by_global_norm`."""

    max_norm: Numeric

    def link(self, updates: PyTree) -> Link:
        """Return a link that clips these updates."""
        wide = jax.tree.map(lambda u: u.astype(arithmetic_dtype(u.dtype)), updates)
        return clip_link(optax.tree.norm(wide), self.max_norm)


def clip_link(norm: jax.Array, max_norm: Numeric) -> Link:
    """Return a link that scales updates by min(1, max_norm / norm)."""
    return link(rules.clip, {"norm": norm, "max_norm": max_norm})


def clipped(
    name: str, clip: Link, updates: PyTree, state: PyTree, extra: Mapping[str, PyTree]
) -> tuple[PyTree, PyTree]:
    """Run this link alone, in a transformation of this name; `state` is an EmptyState."""
    chain = Chain(name, (clip,), "auto", bare=True)
    return chain.step(updates, state, None, extra, emit_params=False)


def check_max_norm(max_norm: Numeric) -> None:
    """Check that max_norm is a number > 0, or an array."""
    errors.hyperparam("max_norm", max_norm)
    errors.not_a_schedule("max_norm", max_norm)
    errors.above_zero("max_norm", max_norm)


@errors.error_context("clip_by_global_norm")
def clip_by_global_norm(max_norm: Numeric) -> Transformation:
    """Scale updates down to a global norm of at most max_norm.

    Directly before an adam_jax optimizer in `adam_jax.chain`, it runs inside the optimizer's step:
    clipped gradients are neither stored nor rounded to the gradients' dtype. Elsewhere, it equals
    `optax.clip_by_global_norm` with the norm computed in float32.
    Source: Pascanu et al. (2013), On the difficulty of training recurrent neural networks,
    Algorithm 1.

    Args:
      max_norm: > 0, the largest global norm allowed.

    Returns:
      a stateless Optax transformation.

    Raises:
      TypeError: max_norm isn't a number.
      ValueError: max_norm isn't > 0.

    >>> import adam_jax
    >>> adam_jax.chain(clip_by_global_norm(1.0), adam_jax.sgd(0.1))
    chain(clip_by_global_norm(1.0), sgd(learning_rate=0.1))
    """
    check_max_norm(max_norm)
    clip = GlobalNormClip(max_norm)

    @errors.error_context("clip_by_global_norm")
    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        del params
        return clipped("clip_by_global_norm", clip.link(updates), updates, state, extra)

    text = f"clip_by_global_norm({max_norm})"
    return transformation_of(clip, optax.identity().init, update, text)

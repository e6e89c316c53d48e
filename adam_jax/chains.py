"""`optax.chain` that keeps its parts visible, and clips inside the step that follows."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import optax

from adam_jax import checks, rules
from adam_jax.engine import Chain, link
from adam_jax.transformation import Transformation


def chain(*transformations: optax.GradientTransformation) -> Transformation:
    """`optax.chain` that keeps its parts visible.

    `optax.clip_by_global_norm` in front of one of our optimizers is computed inside its step: the
    clipped gradients are never written, and not rounded to the gradients' dtype.

    Args:
      *transformations: Optax transformations, ours or others, in the order in which they act.

    Returns:
      a transformation with the state of `optax.chain(*transformations)`, and its updates.

    Raises:
      ValueError: at update, a state of another chain.

    >>> import optax, adam_jax
    >>> adam_jax.chain(optax.clip_by_global_norm(1.0), adam_jax.adam(1e-3))
    chain(clip_by_global_norm, adam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0))
    """
    chained = optax.chain(*transformations)
    limits = [
        _max_norm(tx) if isinstance(getattr(after, "source", None), Chain) else None
        for tx, after in zip(transformations, (*transformations[1:], None), strict=False)
    ]

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        checks.chained(state, len(transformations))
        states: Any = state
        new, limit = [], None
        for tx, s, next_limit in zip(transformations, states, limits, strict=True):
            if limit is not None:
                updates, s = _clipped(limit, tx, updates, s, params)
            elif next_limit is None:
                updates, s = optax.with_extra_args_support(tx).update(updates, s, params, **extra)
            new.append(s)
            limit = next_limit
        return updates, tuple(new)

    text = f"chain({', '.join(_text(tx) for tx in transformations)})"
    return Transformation(chained.init, update).made_of(transformations, text)


def _max_norm(tx: optax.GradientTransformation) -> Any:
    """The limit of an `optax.clip_by_global_norm`; None for any other transformation."""
    if getattr(tx.update, "__qualname__", "") != "clip_by_global_norm.<locals>.update_fn":
        return None
    return inspect.getclosurevars(tx.update).nonlocals.get("max_norm")


def _clipped(
    limit: Any, tx: Any, updates: optax.Updates, state: Any, params: optax.Params | None
) -> tuple[optax.Updates, Any]:
    """A step of one of our optimizers with clipping for its first link."""
    steps: Chain = tx.source
    front = link(rules.clip, {"norm": optax.tree.norm(updates), "max_norm": limit})
    with_clip = dataclasses.replace(steps, links=(front, *steps.links), bare=False)
    states = (optax.EmptyState(), *((state,) if steps.bare else state))
    with checks.naming(steps.name):
        updates, new = with_clip.update(updates, states, params)
    after: Any = new
    return updates, after[1] if steps.bare else after[1:]


def _text(tx: optax.GradientTransformation) -> str:
    if isinstance(tx, Transformation):
        return repr(tx)
    made_by = getattr(tx.update, "__qualname__", "?")  # clip.<locals>.update_fn, as Optax has it
    return made_by.split(".")[0]

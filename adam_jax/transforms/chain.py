"""`optax.chain` that keeps its parts visible, and clips inside the step that follows."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import optax

from adam_jax import rules
from adam_jax._engine.apply import step
from adam_jax._engine.chain import Chain, link
from adam_jax._engine.split_params import full, widened
from adam_jax._engine.transformation import Transformation, is_last, made_of, source_of, told
from adam_jax._util import errors
from adam_jax._util.numerics import arithmetic_dtype


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
    with errors.naming("chain"):
        for k, tx in enumerate(transformations):
            errors.transformation(f"argument {k + 1}", tx, "chain(clip, adamw)")
        errors.nothing_after(filter(is_last, transformations[:-1]))
    chained = optax.chain(*transformations)
    limits = [
        _max_norm(tx) if isinstance(source_of(after), Chain) else None
        for tx, after in zip(transformations, (*transformations[1:], None), strict=False)
    ]

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None,
        extra: Mapping[str, Any],
        *,
        emit_params: bool,
    ) -> tuple[Any, optax.OptState]:
        errors.chained(state, len(transformations))
        states: Any = state
        new, limit = [], None
        last = len(transformations) - 1
        for k, (tx, s, next_limit) in enumerate(zip(transformations, states, limits, strict=True)):
            if k < last and next_limit is None:
                updates = widened(updates, params)
            seen, emits = (params, emit_params) if k == last else (full(params), False)
            if limit is not None:
                updates, s = _clipped(limit, tx, updates, s, seen, extra, emits)
            elif next_limit is None:
                updates, s = step(tx, updates, s, seen, extra, emit_params=emits)
            new.append(s)
            limit = next_limit
        return updates, tuple(new)

    text = f"chain({', '.join(map(told, transformations))})"
    ends = bool(transformations) and is_last(transformations[-1])
    return made_of(transformations, chained.init, update, text, emits_params=True, last=ends)


def _max_norm(tx: optax.GradientTransformation) -> Any:
    """The limit of an `optax.clip_by_global_norm`; None for any other transformation."""
    if getattr(tx.update, "__qualname__", "") != "clip_by_global_norm.<locals>.update_fn":
        return None
    return inspect.getclosurevars(tx.update).nonlocals.get("max_norm")


def _clipped(
    limit: Any,
    tx: Any,
    updates: optax.Updates,
    state: Any,
    params: Any,
    extra: Mapping[str, Any],
    emit_params: bool,
) -> tuple[Any, Any]:
    """A step of one of our optimizers with clipping for its first link."""
    steps: Chain = source_of(tx)
    norm = optax.tree.norm(jax.tree.map(lambda u: u.astype(arithmetic_dtype(u.dtype)), updates))
    front = link(rules.clip, {"norm": norm, "max_norm": limit})
    with_clip = dataclasses.replace(steps, links=(front, *steps.links), bare=False)
    states = (optax.EmptyState(), *((state,) if steps.bare else state))
    with errors.naming(steps.name):
        updates, new = with_clip.step(updates, states, params, extra, emit_params=emit_params)
    after: Any = new
    return updates, after[1] if steps.bare else after[1:]

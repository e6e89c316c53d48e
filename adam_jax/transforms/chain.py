"""`optax.chain` that keeps its parts visible, and clips inside the step that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import optax

from adam_jax._engine.apply import step
from adam_jax._engine.chain import Chain
from adam_jax._engine.split_params import to_float32, upcast_updates
from adam_jax._engine.transformation import (
    Transformation,
    describe,
    is_exact,
    source_of,
    transformation_of,
)
from adam_jax._util import errors
from adam_jax._util.typing import PyTree
from adam_jax.transforms.clip import GlobalNormClip


def chain(*transformations: optax.GradientTransformation) -> Transformation:
    """`optax.chain` that keeps its parts visible.

    `clip_by_global_norm` in front of one of our optimizers is computed inside its step.

    Args:
      *transformations: Optax transformations, ours or others, in the order in which they act.

    Returns:
      a transformation with the state of `optax.chain(*transformations)`, and its updates.

    Raises:
      ValueError: at update, a state of another chain.

    >>> import adam_jax
    >>> adam_jax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.lion(1e-4, weight_decay=1.0))
    chain(clip_by_global_norm(1.0), lion(learning_rate=0.0001, b1=0.9, b2=0.99, weight_decay=1.0))
    """
    with errors.error_context("chain"):
        for k, tx in enumerate(transformations):
            errors.transformation(f"argument {k + 1}", tx, "chain(clip, adamw)")
        errors.nothing_after(filter(is_exact, transformations[:-1]))
    sources = [source_of(tx) for tx in transformations]
    inside = [  # clips that are computed inside the step that follows
        isinstance(source, GlobalNormClip) and isinstance(after, Chain)
        for source, after in zip(sources, (*sources[1:], None), strict=False)
    ]
    last = len(transformations) - 1

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, PyTree],
        *,
        emit_params: bool,
    ) -> tuple[PyTree, PyTree]:
        errors.chained(state, len(transformations))
        new = []
        for k, (tx, s) in enumerate(zip(transformations, state, strict=True)):
            if k < last and not inside[k]:
                updates = upcast_updates(updates, params)
            seen, emits = (params, emit_params) if k == last else (to_float32(params), False)
            if k > 0 and inside[k - 1]:
                updates, s = _clipped(sources[k - 1], sources[k], updates, s, seen, extra, emits)
            elif not inside[k]:
                updates, s = step(tx, updates, s, seen, extra, emit_params=emits)
            new.append(s)
        return updates, tuple(new)

    text = f"chain({', '.join(map(describe, transformations))})"
    init = optax.chain(*transformations).init
    exact = bool(transformations) and is_exact(transformations[-1])
    return transformation_of(transformations, init, update, text, emits_params=True, exact=exact)


def _clipped(
    clip: GlobalNormClip,
    chain: Chain,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    extra: Mapping[str, PyTree],
    emit_params: bool,
) -> tuple[PyTree, PyTree]:
    """Step one of our optimizers with clipping for its first link."""
    links = (clip.link(updates), *chain.links)
    states = (optax.EmptyState(), *((state,) if chain.bare else state))
    clipped = dataclasses.replace(chain, links=links, bare=False)
    with errors.error_context(chain.name):
        updates, new = clipped.step(updates, states, params, extra, emit_params=emit_params)
    return updates, new[1] if chain.bare else new[1:]

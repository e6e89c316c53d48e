"""An `optax.chain` that shows its parts and clips inside the next optimizer's step."""

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
    """Chain transformations as `optax.chain` does, with a readable repr.

    A `clip_by_global_norm` directly before an adam_jax optimizer runs inside its step.

    Args:
      *transformations: any Optax transformations, in order of application.

    Returns:
      a transformation with the state and updates of `optax.chain(*transformations)`.

    Raises:
      ValueError: at update, the state is from another chain.

    >>> import adam_jax
    >>> adam_jax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.lion(1e-4, weight_decay=1.0))
    chain(clip_by_global_norm(1.0), lion(learning_rate=0.0001, b1=0.9, b2=0.99, weight_decay=1.0))
    """
    with errors.error_context("chain"):
        for k, tx in enumerate(transformations):
            errors.transformation(f"argument {k + 1}", tx, "chain(clip, adamw)")
        errors.nothing_after(filter(is_exact, transformations[:-1]))
    sources = [source_of(tx) for tx in transformations]
    is_fused = [  # clips that run inside the next optimizer's step
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
            if k < last and not is_fused[k]:
                updates = upcast_updates(updates, params)
            seen, emits = (params, emit_params) if k == last else (to_float32(params), False)
            if k > 0 and is_fused[k - 1]:
                updates, s = _clip_step(sources[k - 1], sources[k], updates, s, seen, extra, emits)
            elif not is_fused[k]:
                updates, s = step(tx, updates, s, seen, extra, emit_params=emits)
            new.append(s)
        return updates, tuple(new)

    text = f"chain({', '.join(map(describe, transformations))})"
    init = optax.chain(*transformations).init
    exact = bool(transformations) and is_exact(transformations[-1])
    return transformation_of(transformations, init, update, text, emits_params=True, exact=exact)


def _clip_step(
    clip: GlobalNormClip,
    chain: Chain,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    extra: Mapping[str, PyTree],
    emit_params: bool,
) -> tuple[PyTree, PyTree]:
    """Run one step of `chain` with `clip` as its first link."""
    links = (clip.link(updates), *chain.links)
    states = state if chain.bare else (optax.EmptyState(), *state)
    clipped = dataclasses.replace(chain, links=links)
    with errors.error_context(chain.name):
        updates, new = clipped.step(updates, states, params, extra, emit_params=emit_params)
    return updates, new if chain.bare else new[1:]

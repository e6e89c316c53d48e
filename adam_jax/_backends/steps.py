"""The step of a leaf as implementations see it: it may ask for means on its way."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import jax

Step: TypeAlias = Generator[Sequence[jax.Array], Sequence[jax.Array], Any]
"""Yields arrays, is sent their means over the whole leaf, returns the update and new moments."""


def finish(step: Step, mean: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]) -> Any:
    """The result of a step whose questions are answered by `mean`."""
    try:
        asked = next(step)
        while True:
            asked = step.send(mean(asked))
    except StopIteration as done:
        return done.value


def asked(step: Step, means: Sequence[Sequence[jax.Array]]) -> Sequence[jax.Array]:
    """What a step asks after it has been sent these means."""
    question = next(step)
    for each in means:
        question = step.send(each)
    return question

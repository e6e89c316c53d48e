"""The time before and around a step: tracing, lowering, compiling, and eager updates.

python -m benchmarks.compile       # 10 minutes

A step is (params, state, gradients) → (params, state), jitted anew with JAX's caches empty.
Optax and adam_jax take turns; ratios are medians of the ratios within each round.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import adam_jax
from benchmarks import report, trees

ADAMW = {"optax": optax.adamw, "ours": adam_jax.adamw}


def step(tx: Any) -> Callable[..., Any]:
    """Return a new function, for which JAX has nothing cached."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Build:
    """Repeated builds of a tree's step.

    Garbage is collected beforehand, so that no collection happens during a timed build.
    """

    def __init__(self, make: Callable[..., Any], tree: Any):
        self.make, self.params = make, trees.arrays(tree)

    def lower(self) -> tuple[float, Any]:
        jax.clear_caches()
        tx = self.make(1e-3)
        state = tx.init(self.params)
        gc.collect()
        start = time.perf_counter()
        lowered = jax.jit(step(tx), donate_argnums=(0, 1)).lower(self.params, state, self.params)
        return time.perf_counter() - start, lowered

    def seconds(self) -> tuple[float, float]:
        """Return the seconds to trace and lower, and to compile."""
        lowering, lowered = self.lower()
        start = time.perf_counter()
        lowered.compile()
        return lowering, time.perf_counter() - start


class Eager:
    """Eager updates: each call makes one and returns its seconds."""

    def __init__(self, make: Callable[..., Any], tree: Any):
        self.tx, self.params = make(1e-3), trees.arrays(tree)
        self.state = self.tx.init(self.params)
        self()

    def __call__(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.tx.update(self.params, self.state, self.params))
        return time.perf_counter() - start


def main() -> None:
    rows = []

    def add(what: str, measure: Callable[[Callable[..., Any]], Callable[[], float]], rounds: int):
        seconds = report.turns({name: measure(make) for name, make in ADAMW.items()}, rounds)
        row = {name: f"{np.median(x):.3g}" for name, x in seconds.items()}
        ratio = np.median(seconds["ours"] / seconds["optax"])
        rows.append({"AdamW, seconds": what, **row, "ours / optax": f"{ratio:.2f}"})

    for what, tree in (
        ("2000 equal leaves", trees.equal(2000)),
        ("400 distinct shapes", trees.distinct(400)),
    ):
        builds = {make: Build(make, tree) for make in ADAMW.values()}
        add(f"trace + lower, {what}", lambda make, b=builds: lambda: b[make].lower()[0], 5)
        add(f"compile, {what}", lambda make, b=builds: lambda: b[make].seconds()[1], 2)
    small = trees.gpt2(width=96, vocabulary=2048)
    add("eager update, GPT-2's 148 leaves, width 96", functools.partial(Eager, tree=small), 21)
    add("eager update, GPT-2 small", functools.partial(Eager, tree=trees.gpt2()), 7)
    report.write("compile", rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

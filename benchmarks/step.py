"""The time of a step on one leaf of 64M float32 elements, and what it needs beside its operands.

Gradients and state are donated; all runs take turns in one process. python -m benchmarks.step
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adam_jax
from benchmarks import report

SHAPE = (65536, 1024)
ROUNDS = 15
MAKERS = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.adamw, mu_dtype=bfloat16": lambda: optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    "adam_jax float32": lambda: adam_jax.adamw(1e-3),
    "adam_jax bfloat16": lambda: adam_jax.adamw(1e-3, storage="bfloat16"),
    "adam_jax int8": lambda: adam_jax.adamw(1e-3, storage="int8"),
    "adam_jax int8, implementation='xla'": lambda: adam_jax.adamw(
        1e-3, storage="int8", implementation="xla"
    ),
}


class Run:
    """An optimizer at work: each call makes a step and returns its seconds."""

    def __init__(self, tx: optax.GradientTransformation, params: jax.Array):
        self.params = params
        self.grads = jnp.sin(jnp.arange(params.size, dtype=jnp.float32)).reshape(params.shape)
        self.state = tx.init(params)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=(0, 1))
        self.step: Any = step.lower(self.grads, self.state, params).compile()
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self) -> float:
        start = time.perf_counter()
        self.grads, self.state = self.step(self.grads, self.state, self.params)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def main() -> None:
    params = jnp.ones(SHAPE)
    runs = {name: Run(make(), params) for name, make in MAKERS.items()}
    seconds = report.interleaved(runs, ROUNDS)
    base = seconds["optax.adamw"]
    rows = [
        {
            "adamw, 64M elements": name,
            "ms": f"{1e3 * seconds[name]:.0f}",
            "× optax": f"{seconds[name] / base:.2f}",
            "state, bytes per parameter": f"{run.state_bytes / params.size:.2f}",
            "temporaries, MB": f"{run.temporaries / 1e6:.1f}",
        }
        for name, run in runs.items()
    ]
    report.write("step", rows)


if __name__ == "__main__":
    main()

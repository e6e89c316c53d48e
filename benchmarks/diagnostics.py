"""The time that diagnostics.record adds to a small Transformer's training step and to an update.

The Transformer is from `python -m adam_jax compare --task characters`, with 8 windows of 64
characters per batch. Runs take turns, 10 steps at a time. The time added to a training step is
below the noise between turns, so it is given twice: as the median relative difference over rounds,
and as the time added to a bare update. python -m benchmarks.diagnostics
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import adam_jax
from adam_jax.cli.tasks import TASKS
from benchmarks import report

ROUNDS, STEPS = 60, 10
TASK = TASKS["characters"]
PARTS = {"embeddings": "characters|positions|head", "attention": "attend|merge", "mlp": "en$|ow$"}
MAKERS: dict[str, Callable[[Any], Any]] = {
    "without": lambda tx: tx,
    "every 10 (default)": adam_jax.diagnostics.record,
    "every 10, 3 groups": lambda tx: adam_jax.diagnostics.record(tx, PARTS),
    "every 1": lambda tx: adam_jax.diagnostics.record(tx, every=1),
}


class Run:
    """A run of an optimizer: each call makes some steps and returns the seconds per step."""

    def __init__(self, tx: optax.GradientTransformation, trains: bool):
        self.params = TASK.init(jax.random.key(0))
        self.state = tx.init(self.params)
        self.batches = jax.device_put(TASK.batches(STEPS))

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(TASK.loss)(params, batch) if trains else params
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = jax.jit(lambda *carry: jax.lax.scan(step, carry, self.batches)[0])
        self.steps: Any = steps.lower(self.params, self.state).compile()
        self.temporaries = self.steps.memory_analysis().temp_size_in_bytes

    def __call__(self) -> float:
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.steps(self.params, self.state))
        return (time.perf_counter() - start) / STEPS


def main() -> None:
    rows = []
    for storage in ("float32", "int8"):
        tx = adam_jax.chain(
            adam_jax.clip_by_global_norm(1.0),
            adam_jax.adamw(1e-3, weight_decay=0.1, storage=storage),
        )
        wholes = {name: Run(make(tx), trains=True) for name, make in MAKERS.items()}
        bare = {name: Run(make(tx), trains=False) for name, make in MAKERS.items()}
        step, update = (report.turns(runs, ROUNDS) for runs in (wholes, bare))
        for name in MAKERS:
            added = np.median(update[name] - update["without"])
            rows.append(
                {
                    "state": storage,
                    "record": name,
                    "training step, ms": f"{1e3 * np.median(step[name]):.2f}",
                    "added": f"{np.median(step[name] / step['without']) - 1:+.1%}",
                    "update, ms": f"{1e3 * np.median(update[name]):.3f}",
                    "added, of a training step": f"{added / np.median(step['without']):+.1%}",
                    "temporaries of a training step, MB": f"{wholes[name].temporaries / 1e6:.2f}",
                }
            )
    report.write("diagnostics", rows)


if __name__ == "__main__":
    main()

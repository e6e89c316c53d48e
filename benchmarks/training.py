"""The time of a small Transformer's training step, and the optimizer's share of it.

python -m benchmarks.training

The models are the character Transformer of `python -m adam_jax compare`, with 8 windows of 64
characters per batch, and a wider one. The optimizer's time is the step's time minus the time of a
step that returns only the gradients' sum. All take turns; differences are medians over rounds.
Params and state are donated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_jax
from adam_jax.cli import tasks
from benchmarks import report, step

ROUNDS = 21
CLIP = optax.clip_by_global_norm(1.0)
MAKERS: dict[str, Callable[[], Any]] = {
    "optax.adamw": lambda: optax.chain(CLIP, optax.adamw(1e-3, weight_decay=0.1)),
    **{
        f"adam_jax {storage}": functools.partial(
            lambda storage: adam_jax.chain(
                adam_jax.clip_by_global_norm(1.0),
                adam_jax.adamw(1e-3, weight_decay=0.1, storage=storage),
            ),
            storage,
        )
        for storage in ("float32", "bfloat16", "int8")
    },
}


def trained(tx: Any, params: Any, batch: Any) -> step.Run:
    def train(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(tasks.characters_loss)(params, batch)
        if tx is None:  # a small result that needs every gradient
            return params, sum(jnp.sum(g) for g in jax.tree.leaves(grads))
        return adam_jax.apply(tx, grads, state, params)

    params = jax.tree.map(jnp.array, params)  # copies, to be donated
    state = jnp.zeros(()) if tx is None else tx.init(params)
    return step.Jitted(train, params, state, batch).warmed()


def main() -> None:
    rows = []
    batch = jnp.asarray(tasks.characters_batches(1)[0])
    for width in (64, 512):
        tasks.WIDTH = width
        params = tasks.characters_init(jax.random.key(0))
        count = sum(x.size for x in jax.tree.leaves(params))
        runs = {name: trained(make(), params, batch) for name, make in MAKERS.items()}
        runs["gradients alone"] = trained(None, params, batch)
        seconds = report.turns(runs, ROUNDS)
        gradients = seconds["gradients alone"]
        for name in MAKERS:
            whole, share = seconds[name], 1 - gradients / seconds[name]
            rows.append(
                {
                    "Transformer": f"width {width}, {count / 1e6:.2g}M parameters",
                    "clip + AdamW": name,
                    "training step, ms": f"{1e3 * np.median(whole):.2f}",
                    "× optax": f"{np.median(whole / seconds['optax.adamw']):.2f}",
                    "optimizer, ms": f"{1e3 * np.median(whole - gradients):.2f}",
                    "of the step": f"{np.median(share):.1%}",
                }
            )
    report.write("training", rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

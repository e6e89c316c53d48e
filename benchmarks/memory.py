"""The memory of AdamW's state and step, from the compiled step: nothing is run.

python -m benchmarks.memory

The model is GPT-2 small, with params and state donated. The peak is everything in memory during a
step: parameters, gradients, state, new results, and temporary buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adam_jax
from benchmarks import report, trees
from benchmarks.step import update


class Case(NamedTuple):
    make: Callable[[], Any]
    dtype: Any = jnp.float32
    way: Callable[..., Any] = update


def ours(storage: str) -> Any:
    return adam_jax.adamw(1e-3, storage=storage)


def masters() -> Any:
    return adam_jax.master_weights(ours("int8"), bits=24)


CASES = {
    "optax.adamw": Case(lambda: optax.adamw(1e-3)),
    "optax.adamw, mu_dtype=bfloat16": Case(lambda: optax.adamw(1e-3, mu_dtype=jnp.bfloat16)),
    **{
        f"adam_jax {storage}, {way.__name__}": Case(functools.partial(ours, storage), way=way)
        for storage in ("float32", "bfloat16", "int8")
        for way in (update, adam_jax.apply)
    },
    "adam_jax int8, bfloat16 + master_weights(24), update": Case(masters, jnp.bfloat16),
    "adam_jax int8, bfloat16 + master_weights(24), apply": Case(
        masters, jnp.bfloat16, adam_jax.apply
    ),
}


def row(name: str, case: Case) -> dict[str, str]:
    tx = case.make()
    params = trees.structs(trees.gpt2(), case.dtype)
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return case.way(tx, grads, state, params)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    count = trees.elements(trees.gpt2())
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return {
        "AdamW on GPT-2 small": name,
        "state, bytes per parameter": f"{held / count:.2f}",
        "temporaries, MB": f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f}",
        "peak, bytes per parameter": f"{report.peak(compiled) / count:.2f}",
    }


def main() -> None:
    report.write("memory", [row(name, case) for name, case in CASES.items()])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

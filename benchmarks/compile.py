"""What happens before and around a step: tracing, lowering, eager dispatch, temporaries.

python -m benchmarks.compile
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adam_jax
from benchmarks import report

ADAMW = {"optax": optax.adamw, "ours": adam_jax.adamw}


def leaves(count: int, shape: tuple[int, ...] = (64, 32)) -> dict[str, jax.Array]:
    return {f"layer{i}": jnp.ones(shape) for i in range(count)}


def jitted(tx: optax.GradientTransformation) -> Any:
    """The step anew, so that nothing is cached."""
    return jax.jit(lambda g, s, p: tx.update(g, s, p))


def trace_and_lower(make: Callable[..., Any], params: Any) -> float:
    jax.clear_caches()
    tx = make(1e-3)
    state = tx.init(params)
    start = time.perf_counter()
    jitted(tx).trace(params, state, params).lower()
    return time.perf_counter() - start


def eager_update(tx: optax.GradientTransformation, params: Any, state: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(tx.update(params, state, params))
    return time.perf_counter() - start


def temporaries(make: Callable[..., Any]) -> int:
    tx = make(1e-3)
    params = jnp.ones((1024, 1024))
    state = tx.init(params)
    compiled = jitted(tx).lower(params, state, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    many, some = leaves(2000), leaves(150)
    lowered = report.interleaved(
        {name: functools.partial(trace_and_lower, make, many) for name, make in ADAMW.items()}, 5
    )
    eager = {}
    for name, make in ADAMW.items():
        tx = make(1e-3)
        eager[name] = functools.partial(eager_update, tx, some, tx.init(some))
        eager[name]()  # compiles
    eager = report.interleaved(eager, 21)
    rows = [
        ("trace + lower, 2000 leaves (s)", lowered),
        ("eager update, 150 leaves (s)", eager),
        ("temporaries of a float32 step (bytes)", {n: temporaries(m) for n, m in ADAMW.items()}),
    ]
    report.write(
        "compile",
        [
            {
                "adamw": what,
                **{name: float(f"{x:.3g}") for name, x in figures.items()},
                "ours / optax": round(figures["ours"] / figures["optax"], 2),
            }
            for what, figures in rows
        ],
    )


if __name__ == "__main__":
    main()

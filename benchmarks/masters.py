"""The final loss with bfloat16 parameters: plain, stochastically rounded, and with master weights.

AdamW trains the character Transformer. For each seed, all runs start from the same bfloat16
values and see the same batches. The network computes in float32, so that only the storage of
parameters and state differs. python -m benchmarks.masters
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adam_jax
from adam_jax.cli.tasks import TASKS, scheduled
from benchmarks import report

TASK = TASKS["characters"]
RATE, STEPS, SEEDS = 3e-3, 600, 6
INT8 = functools.partial(adam_jax.adamw, storage="int8")
MODES: dict[str, tuple[Any, Callable[[Any], Any], Callable[..., Any]]] = {
    "float32": (jnp.float32, lambda tx: tx, adam_jax.adamw),
    "bfloat16, plain": (jnp.bfloat16, lambda tx: tx, adam_jax.adamw),
    "bfloat16, stochastic_rounding": (
        jnp.bfloat16,
        adam_jax.stochastic_rounding,
        adam_jax.adamw,
    ),
    "bfloat16, master_weights(bits=32)": (
        jnp.bfloat16,
        adam_jax.master_weights,
        adam_jax.adamw,
    ),
    "bfloat16, master_weights(bits=24), int8": (
        jnp.bfloat16,
        functools.partial(adam_jax.master_weights, bits=24),
        INT8,
    ),
}


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def finals(name: str, dtype: Any, wrap: Callable[[Any], Any], make: Callable[..., Any]) -> Any:
    """Return the final loss of each seed."""

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return wrap(scheduled(make, STEPS)(rate))

    result = adam_jax.compare(
        {name: optimizer},
        init=lambda key: cast(cast(TASK.init(key), jnp.bfloat16), dtype),
        loss=lambda params, batch: TASK.loss(cast(params, jnp.float32), batch),
        batches=TASK.batches(STEPS),
        learning_rates=(RATE,),
        seeds=SEEDS,
    )
    return result.final(name)[0]


def main() -> None:
    losses = {name: finals(name, *mode) for name, mode in MODES.items()}
    exact = losses["float32"]
    deviation = float(exact.std(ddof=1))
    rows = []
    for name, final in losses.items():
        difference = float((final - exact).mean())
        rows.append(
            {
                "parameters": name,
                "final loss": f"{final.mean():.4f}",
                "deviation of float32's seeds": f"{deviation:.4f}",
                "mean paired difference": f"{difference:+.4f}",
                "inside": "yes" if abs(difference) <= deviation else "no",
            }
        )
    report.write("masters", rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

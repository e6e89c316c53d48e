"""The final loss of AdamW with each storage format, paired by seed: `python -m benchmarks.quality`.

For each seed, all optimizers start from the same parameters and see the same batches. Optax's
Adafactor is there for comparison, with its own decay, and with a fixed b2 like AdamW's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_jax
from adam_jax.cli.tasks import TASKS, scheduled
from benchmarks import report

FORMATS = {
    "bfloat16": "bfloat16",
    "int8": "int8",
    "compact": "compact",
    "mean per row": {"signed": "int8", "positive": adam_jax.storage.mean(-1)},
    "mean per column": {"signed": "int8", "positive": adam_jax.storage.mean(-2)},
}
RATES = {"digits": 3e-3, "characters": 3e-3}
STEPS = {"digits": 500, "characters": 600}
SEEDS = 6


def adafactor(
    learning_rate: optax.ScalarOrSchedule, b2: float | None = None
) -> optax.GradientTransformation:
    """Return Adafactor for a given learning rate, with momentum; without b2, its decay grows."""
    fixed = {} if b2 is None else {"decay_rate_fn": lambda step, rate: jnp.float32(b2)}
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32, **fixed),
        optax.clip_by_block_rms(1.0),
        optax.ema(0.9, debias=False),
        optax.scale_by_learning_rate(learning_rate),
    )


def optimizers(b2: float, steps: int) -> Mapping[str, Callable[..., Any]]:
    """Return the constructors to compare, each with a schedule over this many steps."""
    formats = {"float32": "float32", **FORMATS}
    made = {
        name: functools.partial(adam_jax.adamw, b2=b2, storage=storage)
        for name, storage in formats.items()
    }
    made |= {"adafactor": adafactor, "adafactor, b2 fixed": functools.partial(adafactor, b2=b2)}
    return {name: scheduled(make, steps) for name, make in made.items()}


def main() -> None:
    """Train, print the table, and write it."""
    rows = []
    for name, task in TASKS.items():
        for b2 in (0.999, 0.95):
            steps = STEPS[name]
            result = adam_jax.compare(
                optimizers(b2, steps),
                init=task.init,
                loss=task.loss,
                batches=task.batches(steps),
                learning_rates=(RATES[name],),
                seeds=SEEDS,
            )
            exact = np.asarray(result.final("float32")[0])
            row = {"task": name, "b2": b2}
            row["float32, ± over seeds"] = f"{exact.mean():.4f} ± {exact.std(ddof=1):.4f}"
            for other in list(optimizers(b2, steps))[1:]:
                paired = np.asarray(result.final(other)[0]) - exact
                error = 2 * paired.std(ddof=1) / np.sqrt(SEEDS)
                row[other] = f"{paired.mean():+.4f} ± {error:.4f}"
            rows.append(row)
    report.write("quality", rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

"""The final loss of AdamW with each storage format, paired by seed.

For each seed, all formats start from the same parameters and see the same batches, so that only
the format and its rounding differ. python -m benchmarks.quality
"""

from __future__ import annotations

import functools

import jax

import adam_jax
from adam_jax.cli.tasks import TASKS, scheduled
from benchmarks import report

FORMATS = ("float32", "bfloat16", "int8")
RATES = {"digits": 3e-3, "characters": 3e-3}
STEPS = {"digits": 500, "characters": 600}
SEEDS = 6


def main() -> None:
    rows = []
    for name, task in TASKS.items():
        for b2 in (0.999, 0.95):
            steps = STEPS[name]
            result = adam_jax.compare(
                {
                    storage: scheduled(
                        functools.partial(adam_jax.adamw, b2=b2, storage=storage), steps
                    )
                    for storage in FORMATS
                },
                init=task.init,
                loss=task.loss,
                batches=task.batches(steps),
                learning_rates=(RATES[name],),
                seeds=SEEDS,
            )
            exact = result.final("float32")[0]
            for storage in FORMATS:
                final = result.final(storage)[0]
                difference = float((final - exact).mean())
                deviation = float(exact.std(ddof=1))
                rows.append(
                    {
                        "task": name,
                        "b2": b2,
                        "storage": storage,
                        "final loss": f"{final.mean():.4f}",
                        "deviation of float32's seeds": f"{deviation:.4f}",
                        "mean paired difference": f"{difference:+.4f}",
                        "inside": "yes" if abs(difference) <= deviation else "no",
                    }
                )
    report.write("quality", rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

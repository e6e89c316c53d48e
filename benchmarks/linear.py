"""Step time per element by size, and build time per leaf by count: both should be constant.

python -m benchmarks.linear

Sizes take turns in each round; a time is the median over rounds.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from benchmarks import report, step, trees
from benchmarks.compile import ADAMW, Build

SIZES = {f"{2 ** (k - 20)}M": 2**k for k in (20, 22, 24, 26, 28)}
COUNTS = (100, 400, 1000, 2000, 4000)
MAKERS = {
    "optax.adamw": functools.partial(step.optax_adamw, None),
    "adam_jax float32": functools.partial(step.ours, "float32"),
    "adam_jax bfloat16": functools.partial(step.ours, "bfloat16"),
    "adam_jax int8": functools.partial(step.ours, "int8"),
}


def per_element() -> list[dict[str, Any]]:
    rows = []
    for name, make in MAKERS.items():
        runs = {size: make(trees.one(n)).warmed() for size, n in SIZES.items()}
        seconds = report.interleaved(runs, step.ROUNDS)
        figures = {size: 1e9 * seconds[size] / n for size, n in SIZES.items()}
        rows.append(_row(f"{name}, step, ns per element", figures))
    return rows


def per_leaf() -> list[dict[str, Any]]:
    rows = []
    for name, make in ADAMW.items():
        parts: dict[str, dict[str, float]] = {"trace + lower": {}, "compile": {}}
        for count in COUNTS:
            build = Build(make, trees.equal(count))
            seconds = [build.seconds() for _ in range(2 if count < 2000 else 1)]
            for part, median in zip(parts, np.median(seconds, axis=0), strict=True):
                parts[part][f"{count}"] = 1e3 * float(median) / count
        rows += [_row(f"{name}, {part}, ms per leaf", figures) for part, figures in parts.items()]
    return rows


def _row(what: str, figures: dict[str, float]) -> dict[str, str]:
    spread = max(figures.values()) / min(figures.values()) - 1
    values = {size: f"{value:.2f}" for size, value in figures.items()}
    return {"cost": what, **values, "largest / smallest": f"{spread:+.0%}"}


def main() -> None:
    report.write("linear_sizes", per_element())
    report.write("linear_leaves", per_leaf())


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

"""The whole family at equal tuning, on the two tasks of `compare`: `python -m benchmarks.family`.

Each optimizer has its default arguments, a warmup, a linear decay, and four learning rates over 1.5
decades. They start around a first guess, and shift (by at most 2 decades) until the best one isn't
at an edge.
All optimizers start from the same parameters, one set per seed, and see the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import adam_jax
from adam_jax.analysis.catalogue import constructors
from adam_jax.cli.tasks import TASKS, Task, scheduled
from benchmarks import report

CENTERS = {"characters": 4e-3, "digits": 4e-3}
"""AdamW's first guess."""
STEPS = {"characters": 150, "digits": 200}
FACTOR = 10**0.5
WINDOW = 4
MAX_SHIFT = 4
"""The largest number of factors by which the window may move, 2 decades."""
SEEDS = 3
GUESSES = {
    "adan": 5.0,
    "lamb": 3.0,
    "lion": 0.1,
    "prodigy": 250.0,
    "schedule_free_adamw": 3.0,
    "sgd": 100.0,
    "simplified_ademamix": 0.01,
    "yogi": 5.0,
}
"""First guesses as multiples of AdamW's; 1 for others."""


def search(train: Callable[[Sequence[int]], np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Return the indices of the learning rates and their losses [rate, seed].

    `train` returns the losses at the first guess times FACTOR**k, for each index k.
    """
    known: dict[int, np.ndarray] = {}
    center = 0
    while True:
        window = [center + k - 1 for k in range(WINDOW)]
        new = [k for k in window if k not in known]
        known |= dict(zip(new, train(new), strict=True))
        losses = np.stack([known[k] for k in window])
        best = int(losses.mean(axis=1).argmin())
        shift = {0: -2, WINDOW - 1: 2}.get(best, 0)
        if shift == 0 or abs(center + shift) > MAX_SHIFT:
            return window, losses
        center += shift


def optimum(window: Sequence[int], losses: np.ndarray) -> float:
    """Return the index of the smallest mean loss, by a parabola through it and its neighbors."""
    means = losses.mean(axis=1)
    best = int(np.clip(means.argmin(), 1, WINDOW - 2))
    before, at, after = means[best - 1 : best + 2]
    curvature = before - 2 * at + after
    if not (np.isfinite(curvature) and curvature > 0):
        return window[int(means.argmin())]
    return window[best] + float(np.clip((before - after) / (2 * curvature), -1, 1))


def measure(name: str, task: Task, steps: int, center: float) -> dict[str, Any]:
    """Return the best learning rate of an optimizer, and its final losses."""
    make = constructors()[name]

    def train(indices: Sequence[int]) -> np.ndarray:
        result = adam_jax.compare(
            {name: scheduled(make, steps)},
            init=task.init,
            loss=task.loss,
            batches=task.batches(steps),
            learning_rates=[center * FACTOR**k for k in indices],
            seeds=SEEDS,
            progress=False,
        )
        return np.asarray(result.final(name))

    window, losses = search(train)
    return {
        "rates": [center * FACTOR**k for k in window],
        "losses": losses.tolist(),
        "best": center * FACTOR ** optimum(window, losses),
    }


def row(name: str, found: dict[str, dict[str, Any]], adamw: dict[str, dict[str, Any]]) -> Any:
    """Return a line of the table."""
    cells: dict[str, Any] = {"optimizer": name}
    ratios = []
    for task, result in found.items():
        losses = np.array(result["losses"])
        best = losses[losses.mean(axis=1).argmin()]
        cells[f"{task}: η"] = f"{result['best']:.1g}"
        cells[f"{task}: loss"] = f"{best.mean():.4f} ± {best.std(ddof=1):.4f}"
        ratios.append(result["best"] / adamw[task]["best"])
    low, high = (f"{float(f'{x:.1g}'):g}" for x in (min(ratios), max(ratios)))
    cells["η / AdamW's"] = (
        low if max(ratios) < 1.5 * min(ratios) or low == high else f"{low}–{high}"
    )
    return cells


def main() -> None:
    """Train, print the table, and write it."""
    names = [entry.name for entry in adam_jax.catalogue()]
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for task, name in tqdm([(task, name) for task in CENTERS for name in names]):
        center = CENTERS[task] * GUESSES.get(name, 1)
        found[name][task] = measure(name, TASKS[task], STEPS[task], center)
    rows = [row(name, found[name], found["adamw"]) for name in names]

    def loss(name: str) -> float:
        return float(np.mean(found[name]["characters"]["losses"], axis=1).min())

    report.write("family", sorted(rows, key=lambda cells: loss(cells["optimizer"])))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

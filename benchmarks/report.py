"""What every benchmark does with its figures: a Markdown table on the screen, JSON in results/."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "adam_jax")
PEERS = ("flashoptim-jax", "torchao", "torch")  # named where they are installed


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each run's own measure, all runs taking turns so that noise is shared."""
    return {name: float(np.median(values)) for name, values in turns(runs, rounds).items()}


def turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Each run's own measure in every round, in which all take a turn."""
    figures = [[run() for run in runs.values()] for _ in tqdm(range(rounds), leave=False)]
    return dict(zip(runs, np.transpose(figures), strict=True))


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows as a Markdown table and writes them with the machine, versions and date."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(row[k]) for k in header) + " |" for row in rows]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    document = {"date": str(datetime.date.today()), "machine": machine(), "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        **{package: version(package) for package in PEERS if _installed(package)},
    }


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next(
        x.partition(":")[2].strip() for x in info.splitlines() if x.startswith("model name")
    )

"""The output of every benchmark: a Markdown table on the screen, and JSON in results/."""

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

import adam_jax

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
PAGES = (
    Path(__file__).parent / "README.md",
    DOCS / "comparison.md",
    DOCS / "speed.md",
    DOCS / "low_memory.md",
    DOCS / "gradient_release.md",
    DOCS / "which_optimizer.md",
)
PACKAGES = ("jax", "jaxlib", "optax")
PEERS = ("flashoptim-jax", "torchao", "bitsandbytes", "torch")  # listed if installed
PEERS += ("libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median of each run, with all runs taking turns so that they share noise."""
    return {name: float(np.median(values)) for name, values in turns(runs, rounds).items()}


def turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Return each run's value in every round.

    Rounds shuffle the order, because the previous run can slow a run by a tenth.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    for _ in tqdm(range(rounds), leave=False):
        for name in rng.permutation(list(runs)):
            figures[name].append(runs[name]())
    return {name: np.array(values) for name, values in figures.items()}


def peak(compiled: Any) -> int:
    """Return the peak bytes of a compiled step: operands, new results, and temporaries."""
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new + memory.temp_size_in_bytes


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a Markdown table, and write them with the machine, versions, and date.

    Pages get the new table between `<!-- benchmarks/NAME -->` and `<!-- /benchmarks/NAME -->`.
    """
    document = save(name, rows)
    print(table(rows))
    for page in PAGES:
        text = page.read_text()
        new = filled(text, name, document)
        if new != text:  # tests may be reading the page
            page.write_text(new)


def save(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the rows to results/NAME.json with the machine, versions, and date."""
    RESULTS.mkdir(exist_ok=True)
    document = {"date": str(datetime.date.today()), "machine": machine(), "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return document


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(r[k]) for k in header) + " |" for r in rows])


def filled(page: str, name: str, document: Mapping[str, Any]) -> str:
    """Return the page with the table, machine, versions, and date between the markers."""
    info = document["machine"]
    versions = ", ".join(f"{p} {info[p]}" for p in ("jax", "optax", "torch") if p in info)
    cpu = f"{info['cpu']}, {info['cores']} cores"
    device = cpu if info["device"] == "cpu" else info["device"]
    origin = f"{device}, {versions}, {document['date']}"
    head, marker, rest = page.partition(f"<!-- benchmarks/{name} -->\n")
    end = f"<!-- /benchmarks/{name} -->"
    if not marker or end not in rest:
        return page
    inside = (
        f"(`python -m benchmarks.{name.partition('_')[0]}`, {origin})\n\n{table(document['rows'])}"
    )
    return f"{head}{marker}{inside}\n{end}{rest.partition(end)[2]}"


def machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "adam_jax": adam_jax.__version__,  # which may run from a checkout
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

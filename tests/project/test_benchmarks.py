"""Tables in pages show the figures that benchmarks wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

report = pytest.importorskip("benchmarks.report", reason="benchmarks/ is not installed")


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.parent.name)
def test_tables_show_the_measured_results(page):
    text = page.read_text()
    names = re.findall(r"<!-- benchmarks/(\w+) -->", text)
    assert names
    for name in names:
        if f"<!-- benchmarks/{name} -->\npending" in text:
            assert not (report.RESULTS / f"{name}.json").exists()
            continue
        document = json.loads((report.RESULTS / f"{name}.json").read_text())
        assert report.filled(text, name, document) == text, f"{name}: the page's table is stale"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_completely_on_cpu():
    """Packages that aren't installed are named; the rows of others must not fail."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = report.RESULTS.parents[1]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("one leaf | adam_jax int8, apply", "3 leaves | optax.adamw", "adam_jax int8"):
        assert f"\n| {title} | " in done.stdout
    reason = (
        "needs CUDA" if importlib.util.find_spec("torch") else "not installed: pip install torch"
    )
    assert f"one leaf, torch fused: {reason}\n" in done.stdout

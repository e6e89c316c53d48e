"""The examples are short, compile, and learn.

Each of them asserts that it has learned. `two_processes.py` is tested in test_processes.py.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(set(ROOT.glob("examples/*.py")) - {ROOT / "examples" / "two_processes.py"})
LONGEST = 80  # lines
SECONDS = 300  # most of them wait for other processes of a busy machine
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

each = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def imports(path):
    """Return the top-level packages that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@each
def test_an_example_is_short_and_says_how_to_run_it(path):
    source = path.read_text()
    compile(source, path, "exec")
    assert len(source.splitlines()) <= LONGEST
    assert f"`python examples/{path.name}`" in ast.get_docstring(ast.parse(source))
    assert "adam_jax" in imports(path)
    assert "\nassert " in source, "an example that can't fail"


@pytest.mark.slow
@each
def test_an_example_learns(path):
    missing = sorted(name for name in imports(path) if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[examples]'")
    ran = subprocess.run(
        [sys.executable, path], env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    print(ran.stdout)
    assert ran.stdout.strip()

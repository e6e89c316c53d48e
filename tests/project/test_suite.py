"""The suite keeps its own rules."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

import jax
import pytest

MODULES = sorted(Path(__file__).parents[1].rglob("test_*.py"))


def test_one_device_is_the_default():
    assert jax.device_count() == 1


@pytest.mark.eight_devices
def test_eight_devices_are_there_on_request():
    assert jax.device_count() == 8


def test_no_test_module_imports_another():
    stems = collections.Counter(path.stem for path in MODULES)
    assert not [stem for stem, count in stems.items() if count > 1]
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not stems.keys() & {*names}, path

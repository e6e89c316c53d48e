"""Packages import in one direction, and files that tools/ generates are current."""

from __future__ import annotations

import runpy
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def test_packages_import_from_the_layers_below_only():
    house = runpy.run_path(str(TOOLS / "house.py"))
    assert len(house["edges"]()) > 20
    up = [(a, b) for a, b in house["edges"]() if house["layer"](a) >= house["layer"](b)]
    assert not up, f"a package may import from the layers below its own only: {up}"


def test_the_picture_of_the_packages_is_current():
    house = runpy.run_path(str(TOOLS / "house.py"))
    assert house["is_current"](), "docs/house.svg is stale; run python tools/house.py"


def test_the_exports_are_current():
    exports = runpy.run_path(str(TOOLS / "exports.py"))
    assert exports["INIT"].read_text() == exports["source"](), "run python tools/exports.py"

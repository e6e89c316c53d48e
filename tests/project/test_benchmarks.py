"""Tables in pages show the figures that benchmarks wrote."""

from __future__ import annotations

import json
import re

import pytest

report = pytest.importorskip("benchmarks.report", reason="benchmarks/ is not installed")


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.parent.name)
def test_tables_show_the_measured_results(page):
    text = page.read_text()
    names = re.findall(r"<!-- benchmarks/(\w+) -->", text)
    assert names
    for name in names:
        document = json.loads((report.RESULTS / f"{name}.json").read_text())
        assert report.filled(text, name, document) == text, f"{name}: its table is another"

"""The committed notebooks have their outputs, and no errors.

`pytest --nbmake notebooks` runs them, in a separate step of CI.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""(?<![\w/.:<])/(?:home|root|tmp|work|usr|opt|var|mnt|Users)/|[A-Z]:\\\\""")
LARGEST = 600_000  # bytes of a notebook with its pictures


def cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def text(value):
    """Return a notebook's text, which may be a string or a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def shown(output):
    """Return the text of an output: printed text, or the plain form of a value."""
    data = output.get("data", {})
    return text(output.get("text", "")) + "".join(text(v) for k, v in data.items() if "text" in k)


def complaints(path):
    """Yield a sentence for each defect of a notebook."""
    outputs = [o for cell in cells(path) for o in cell["outputs"]]
    sources = [text(cell["source"]) for cell in cells(path)]
    if path.stat().st_size > LARGEST:
        yield f"is larger than {LARGEST:,} bytes"
    if any(cell["execution_count"] is None for cell in cells(path)):
        yield "has a cell that was not run"
    if not any("image/png" in o.get("data", {}) for o in outputs):
        yield "has no picture"
    if not any(shown(o).strip() for o in outputs):
        yield "has no text in its outputs"
    for output in outputs:
        if output["output_type"] == "error" or "Traceback (most recent call last)" in shown(output):
            yield f"has an error output: {output.get('ename', shown(output)[-80:])}"
        if output.get("name") == "stderr":
            yield f"has a warning: {shown(output)[:80]}"
    for place in (*map(shown, outputs), *sources):
        if found := ABSOLUTE.search(place):
            yield f"has an absolute path: {place[found.start() : found.start() + 40]}"


def test_there_are_ten_notebooks_in_order():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 11)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
    assert list(complaints(path)) == []


def test_a_broken_notebook_is_found(tmp_path):
    notebook = json.loads(NOTEBOOKS[0].read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    code[0]["outputs"] = [
        {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []},
        {"output_type": "stream", "name": "stderr", "text": ["UserWarning: no"]},
        {"output_type": "stream", "name": "stdout", "text": "saved to /home/me/plot.png"},
    ]
    for cell in code[1:]:
        cell["outputs"], cell["execution_count"] = [], None
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps(notebook))
    said = " ".join(complaints(path))
    for wrong in ("not run", "no picture", "error output: ValueError", "warning", "path: /home/me"):
        assert wrong in said

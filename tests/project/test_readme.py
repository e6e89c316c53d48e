"""What the README shows works as it stands."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_snippet_trains():
    names = {}
    exec(SNIPPETS[0], names)
    np.testing.assert_allclose(names["params"]["kernel"], [1.0, -2.0, 3.0, 0.5], atol=0.02)
    assert len(SNIPPETS[0].splitlines()) < 15


@pytest.mark.parametrize("snippet", SNIPPETS[1:])
def test_every_other_snippet_runs(snippet):
    exec(snippet, {})


PAGES = [p for p in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")] if not p.parent.name.startswith(".")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_and_sections_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, section = urllib.parse.unquote(link).partition("#")
        if re.match(r"[a-z]+:", path):
            continue  # on the web, which tests leave alone
        target = page.parent / path if path else page
        assert target.exists(), link
        if section:
            assert section in anchors(target.read_text()), link


def anchors(text):
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}

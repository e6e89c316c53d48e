"""The snippets of the README and of the docs run, and links in all pages exist."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from helpers import slowly

ROOT = Path(__file__).parents[2]


def run_snippets(page):
    """Run the Python snippets of a page in order, in JAX's default modes; return their names."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert snippets, page
    names: dict[str, object] = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for snippet in snippets:
            exec(snippet, names)
    return names


def test_the_first_snippet_of_the_readme_trains():
    names = run_snippets("README.md")
    x, params = names["x"], names["params"]
    error = x @ params["kernel"] + params["bias"][None] - x
    assert jnp.mean(error**2) < 0.1


BY_DEFAULT = ("docs/getting_started.md", "docs/low_memory.md", "docs/your_own_variant.md")
WITH_SNIPPETS = [
    name if name in BY_DEFAULT else slowly(name)
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "```python\n" in path.read_text("utf-8")
    and (name := path.relative_to(ROOT).as_posix()) != "docs/devices.md"
]


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_the_snippets_of_a_page_run(page):
    run_snippets(page)


def test_every_block_of_a_page_is_python_or_for_a_shell():
    for path in sorted((ROOT / "docs").rglob("*.md")):
        fences = re.findall(r"^ *```(.*)$", path.read_text("utf-8"), re.MULTILINE)
        assert {*fences[::2]} <= {"python", "bash"}, path
        assert {*fences[1::2]} <= {""}, path


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.standard_promotion
def test_the_snippets_about_devices_run():
    names = run_snippets("docs/devices.md")
    grads = jax.tree.map(jnp.ones_like, names["params"])
    _, state = names["step"](names["params"], names["state"], grads)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_linked_files_and_sections_exist(page):
    for link in LINK.findall(page.read_text()):
        path, _, section = urllib.parse.unquote(link).partition("#")
        if re.match(r"[a-z]+:", path):
            continue  # on the web, which tests leave alone
        target = page.parent / path if path else page
        assert target.exists(), link
        if section:
            assert section in anchors(target.read_text()), link


def anchors(text):
    """Return GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}

"""The site's reference has every public name, with completed signatures and docstrings.

`mkdocs build --strict` checks the rest: links, sections, and the arguments in docstrings.
"""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

import adam_jax

ROOT = Path(__file__).parents[2]


def test_the_reference_has_every_public_name_once():
    pages = [path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md")]
    documented = re.findall(r"^::: ([\w.]+)$", "\n".join(pages), re.MULTILINE)
    names = runpy.run_path(str(ROOT / "tools" / "site" / "names.py"))
    documented += [f"adam_jax.{n}" for n in (*names["CONSTRUCTORS"], *names["DIRECTIONS"])]
    assert len(documented) == len({*documented})
    assert names["PUBLIC"] <= {*documented}


@pytest.fixture(scope="module")
def reference():
    griffe = pytest.importorskip("griffe", reason="the extra docs is not installed")
    extension = griffe.load_extensions(str(ROOT / "tools" / "site" / "docstrings.py"))
    return griffe.load("adam_jax", search_paths=[ROOT], extensions=extension, resolve_aliases=True)


def test_constructors_have_their_full_signatures(reference):
    for name in adam_jax.optimizers.__all__:
        shown = reference[name].parameters
        actual = inspect.signature(getattr(adam_jax, name)).parameters
        assert [p.name.lstrip("*") for p in shown] == [*actual], name


def test_types_keep_their_names_and_examples_are_code(reference):
    adamw = reference["adamw"]
    assert str(adamw.parameters["learning_rate"].annotation) == "ScalarOrSchedule"
    text = adamw.docstring.value
    assert "**Source:** Loshchilov & Hutter" in text
    assert "```pycon\n>>> adamw(1e-3" in text
    assert "see [`from_rule`][adam_jax.from_rule]" in text

"""The catalogue holds the whole family, is correct, and equals the table in the docs."""

from __future__ import annotations

import inspect
import re
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import adam_jax
from adam_jax.analysis.catalogue import constructors, markdown, table
from adam_jax.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
ENTRIES = {entry.name: entry for entry in adam_jax.catalogue()}


def test_the_catalogue_holds_every_public_constructor_and_nothing_else():
    public = {name for name in adam_jax.__all__ if first_argument(name) == "learning_rate"}
    assert set(ENTRIES) == public


def first_argument(name):
    """Return the name of a public function's first argument."""
    value = getattr(adam_jax, name)
    return next(iter(inspect.signature(value).parameters), None) if callable(value) else None


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_complete_and_short(name):
    entry = ENTRIES[name]
    assert 1960 < entry.year < 2030
    authors, source = entry.paper.split(", ", maxsplit=1)
    assert authors and re.search(r"arXiv:\d{4}\.\d{4,5}$|\w", source)
    assert 0 < len(entry.formula) <= 60 and "\n" not in entry.formula
    assert 0 < len(entry.purpose) <= 45
    assert entry.learning_rate


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_lists_the_moments_that_init_allocates(name):
    size = 1000
    state = constructors()[name](1e-3).init({"w": jnp.ones(size)})
    floats = sum(x.size for x in jax.tree.leaves(state) if x.size == size)
    assert len(ENTRIES[name].state) == floats // size
    moments = getattr(adam_jax, f"scale_by_{name}", None)
    if moments is not None:
        read = adam_jax.moments(moments().init(jnp.ones(3)))
        assert ENTRIES[name].state == tuple(k for k, moment in read.items() if moment.shape == (3,))


def test_lines_of_the_table_fit_a_wide_terminal():
    widths = [sum(not unicodedata.combining(c) for c in line) for line in table().splitlines()]
    assert max(widths) <= 120


def test_list_prints_the_table(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    assert printed == table() + "\n"
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in ENTRIES)


def test_every_row_of_the_markdown_table_has_the_same_number_of_cells(capsys):
    main(["list", "--markdown"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(ENTRIES) + 2
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    assert "\n".join(rows) == markdown()


def test_the_page_of_optimizers_shows_the_table():
    between = re.search(
        r"<!-- catalogue -->\n(.*?)<!-- /catalogue -->", PAGE.read_text("utf-8"), re.DOTALL
    )
    assert between, f"{PAGE} has no <!-- catalogue --> … <!-- /catalogue -->"
    assert between[1].strip() == markdown(), "run python tools/exports.py"

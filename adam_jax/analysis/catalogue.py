"""The catalogue of optimizers: the formula, state, purpose, and paper of each."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence

from adam_jax._engine.transformation import Transformation
from adam_jax.optimizers._constructor import ENTRIES, Entry

_HEADER = ("name", "p ← p − η·(…)", "state", "η", "for", "paper")
_WIDTHS = (19, 29, 9, 8, 20, 25)  # 120 columns with two spaces between


def constructors() -> dict[str, Callable[..., Transformation]]:
    """Return all constructors by name."""
    return {entry.name: entry.constructor for entry in catalogue()}


def catalogue() -> tuple[Entry, ...]:
    """Return one entry for each constructor.

    Returns:
      the entries, sorted by name; `Entry` explains their fields.

    >>> import adam_jax
    >>> lion = next(entry for entry in adam_jax.catalogue() if entry.name == "lion")
    >>> lion.formula, lion.state, lion.learning_rate
    ('sign(β₁·m + (1−β₁)·g) + λ·p', ('mu',), '0.2–0.3')
    """
    return tuple(entry for _, entry in sorted(ENTRIES.items()))


def table() -> str:
    """Format the catalogue as text, 120 columns wide.

    >>> table().splitlines()[2].split()[0]
    'adabelief'
    """
    rows = (_HEADER, tuple("─" * width for width in _WIDTHS), *map(_cells, catalogue()))
    return "\n".join(line for row in rows for line in _wrapped(row))


def markdown() -> str:
    """Format the catalogue as a Markdown table.

    >>> print(markdown().splitlines()[1])
    |---|---|---|---|---|---|
    """
    rows = [_row(_HEADER), "|---" * len(_HEADER) + "|"]
    for entry in catalogue():
        name, formula, *middle, paper = _cells(entry)
        rows.append(_row((f"`{name}`", f"`{formula}`", *middle, _linked(paper))))
    return "\n".join(rows)


def _cells(entry: Entry) -> tuple[str, ...]:
    state = f"{len(entry.state)}: {', '.join(entry.state)}" if entry.state else "none"
    authors, source = entry.paper.split(", ", maxsplit=1)
    paper = f"{authors} {entry.year}, {source}"
    return entry.name, entry.formula, state, entry.learning_rate, entry.purpose, paper


def _wrapped(cells: Sequence[str]) -> list[str]:
    """Wrap a row's cells, and return its lines."""
    columns = [_wrap(text, width) for text, width in zip(cells, _WIDTHS, strict=True)]
    lines = itertools.zip_longest(*columns, fillvalue="")
    return ["  ".join(map(_padded, line, _WIDTHS)).rstrip() for line in lines]


def _wrap(text: str, width: int) -> list[str]:
    """Return lines of at most `width` columns (textwrap counts combining accents)."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _width(longer) <= width else [*lines, word]
    return lines


def _width(text: str) -> int:
    """Count screen columns; combining accents take none."""
    return sum(not unicodedata.combining(character) for character in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:([\d.]+)", r"[\g<0>](https://arxiv.org/abs/\1)", paper)

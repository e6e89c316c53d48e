"""The public names of adam_jax, and links from their mentions to the API reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Set

import adam_jax

MODULES = {adam_jax.diagnostics, adam_jax.interop, adam_jax.schedules, adam_jax.storage}


def public_names() -> Iterator[str]:
    """Yield the names that the reference documents, besides the formulas in rules.py."""
    for name in adam_jax.__all__:
        if not inspect.ismodule(getattr(adam_jax, name)):
            yield f"adam_jax.{name}"
    for module in MODULES:
        own = [
            n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
        ]
        for name in getattr(module, "__all__", own):
            if name not in adam_jax.__all__:
                yield f"{module.__name__}.{name}"


PUBLIC = {*public_names()}

CONSTRUCTORS = [entry.name for entry in adam_jax.catalogue()]
ELSEWHERE = {"from_rule", "scale_by_rule", "schedule_free_eval_params"}
DIRECTIONS = [n for n in adam_jax.optimizers.__all__ if n not in {*CONSTRUCTORS, *ELSEWHERE}]
"""The names in docs/api/directions.md; `ELSEWHERE` is on other pages."""

MENTION = re.compile(r"(?<![\[`])`((?:adam_jax\.)?([\w.]+)(?:\([^`]*)?)`(?!`)")


def linked(text: str, *, bare: bool = False, but: Set[str] = frozenset()) -> str:
    """Link names such as `adam_jax.adamw(1e-3)` to the reference.

    Args:
      text: Markdown without code blocks.
      bare: whether to link names without "adam_jax.", too, as docstrings write them.
      but: bare names that mean something else, such as a function's arguments.
    """

    def link(match: re.Match[str]) -> str:
        name = f"adam_jax.{match[2]}"
        is_full = match[1].startswith("adam_jax.")
        if name not in PUBLIC or not (is_full or (bare and match[1] not in but)):
            return match[0]
        return f"[`{match[1]}`][{name}]"

    return MENTION.sub(link, text)

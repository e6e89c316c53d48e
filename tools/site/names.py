"""The public names of adam_jax, and links from their mentions to the API reference."""

from __future__ import annotations

import re
from collections.abc import Set

import adam_jax

MODULES = ("storage", "schedules", "diagnostics", "interop")
PUBLIC = {f"adam_jax.{name}" for name in adam_jax.__all__ if name not in (*MODULES, "rules")} | {
    f"adam_jax.{module}.{name}"
    for module in MODULES
    for name in getattr(getattr(adam_jax, module), "__all__", ("ademamix_warmup",))
}
"""The names that the reference documents, besides the formulas in rules.py."""

CONSTRUCTORS = [entry.name for entry in adam_jax.catalogue()]
ELSEWHERE = {"from_rule", "scale_by_rule", "schedule_free_eval_params"}
DIRECTIONS = [n for n in adam_jax.optimizers.__all__ if n not in {*CONSTRUCTORS, *ELSEWHERE}]
"""What docs/api/directions.md lists; `ELSEWHERE` is on other pages."""

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

"""A Griffe extension: what the package adds to signatures and docstrings at import.

Griffe reads the source, in which constructors have `**options` and short docstrings. The decorators
in adam_jax/optimizers/_constructor.py complete both.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from names import linked


class Completed(griffe.Extension):
    """Take signatures from the decorated functions, and format docstrings for the site."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Let `adam_jax.adam` be the function, although a module has this name, too."""
        for name, module in pkg["optimizers"].modules.items():
            if name in module.functions:
                alias = griffe.Alias(name, target=f"{module.path}.{name}", parent=pkg)
                pkg.set_member(name, alias)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Complete a function, and format a docstring."""
        if obj.docstring is None:
            return
        if isinstance(obj, griffe.Function):
            function = getattr(sys.modules.get(obj.module.path), obj.name, None)
            if "__signature__" in getattr(function, "__dict__", ()):
                obj.parameters = parameters(inspect.signature(function))
                obj.returns = "Transformation"
                obj.docstring.value = inspect.getdoc(function) or ""
        arguments = {p.name for p in getattr(obj, "parameters", ())}
        obj.docstring.value = formatted(obj.docstring.value, arguments)
        if isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases):
            names = ", ".join(f"`{name}`" for name in obj.attributes)
            obj.docstring.value += f"\n\n**Fields:** {names}"


def parameters(signature: inspect.Signature) -> griffe.Parameters:
    """Return a signature's parameters, with types by name."""
    return griffe.Parameters(
        *(
            griffe.Parameter(
                p.name,
                annotation=str(p.annotation),
                kind=griffe.ParameterKind(p.kind.description),
                default=None if p.default is p.empty else repr(p.default),
            )
            for p in signature.parameters.values()
        )
    )


def formatted(text: str, arguments: Set[str]) -> str:
    """Give a docstring's source, result, and example their own paragraphs, and link names."""
    about, mark, example = text.partition(">>>")
    about = re.sub(r"\n+Source: ", "\n\n**Source:** ", about)
    about = re.sub(r"\nReturns:\n((?:  .*\n?)+)", result, about)
    about = re.sub(r"^( +\*{0,2}\w+: )>", r"\1\\>", about, flags=re.MULTILINE)  # not a quotation
    example = f"\n\n**Example:**\n\n```pycon\n{mark}{example.rstrip()}\n```\n" if mark else ""
    return linked(about.rstrip(), bare=True, but=arguments) + example


def result(match: re.Match[str]) -> str:
    """Write a section of results as a paragraph."""
    return f"\n**Returns:** {inspect.cleandoc(match[1])}\n"

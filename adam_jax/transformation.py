"""Optax transformations that can be looked into: what our constructors return."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import optax

from adam_jax import checks, storage
from adam_jax.documentation import complete

P = ParamSpec("P")


class Transformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that remembers what it was made of, for `repr` and for wrappers."""

    source: Any = None  # a Chain of links, a tuple of transformations, or groups of them by label
    text: str = ""
    applies: bool = False
    """Whether update takes `apply=True`, for the new parameters, and parameters that are Narrow."""

    last: bool = False
    """Whether its updates land exactly, so that nothing may change them."""

    def made_of(
        self, source: Any, text: str = "", applies: bool = False, last: bool = False
    ) -> Transformation:
        """Notes the source: the engine's chain of links, or the transformations inside."""
        self.source, self.text, self.applies, self.last = source, text, applies, last
        return self

    def named(self, name: str, arguments: Mapping[str, Any]) -> Transformation:
        """The same under the name, in errors and `repr`, of the function that the user called."""
        text = f"{name}({', '.join(f'{k}={_argument(v)}' for k, v in arguments.items())})"
        if isinstance(self.source, tuple):
            return self.retold(text)
        source = dataclasses.replace(self.source, name=name)
        return source.transformation().retold(text)

    def retold(self, text: str) -> Transformation:
        """The same with another repr."""
        self.text = text
        return self

    def __repr__(self) -> str:
        return self.text or super().__repr__()


def applies(tx: Any) -> bool:
    """Whether a transformation, ours or another, can take an update to the parameters by itself."""
    return isinstance(tx, Transformation) and tx.applies


def told(tx: optax.GradientTransformation) -> str:
    """A transformation for a repr: of Optax's, what made it."""
    if isinstance(tx, Transformation):
        return repr(tx)
    made_by = getattr(tx.update, "__qualname__", "?")  # clip.<locals>.update_fn, as Optax has it
    return made_by.split(".")[0]


def parts(tx: Any) -> Iterator[Any]:
    """The engine's links inside a transformation, as far as it can be looked into."""
    return (link for _, link in labelled_parts(tx))


def labelled_parts(tx: Any, label: str = "") -> Iterator[tuple[str, Any]]:
    """The same links, each with the label of the parameter group that it is for."""
    source = getattr(tx, "source", None)
    if isinstance(source, Mapping):
        for name, inner in source.items():
            yield from labelled_parts(inner, name)
    elif isinstance(source, tuple):
        for inner in source:
            yield from labelled_parts(inner, label)
    elif source is not None:
        yield from ((label, link) for link in source.links)


def constructor(make: Callable[P, Transformation]) -> Callable[P, Transformation]:
    """Gives a constructor what all have in common: checked arguments, its name in errors, a repr.

    Every number among the arguments is checked by its name before anything is built, so that the
    error carries the name of the function that the user called.
    """
    signature = inspect.signature(make)
    make.__doc__ = complete(inspect.getdoc(make) or "", signature)

    @functools.wraps(make)
    @checks.naming(make.__name__)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Transformation:
        bound = checks.arguments(signature, args, kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if checks.allowed(name) and value is not None:
                checks.argument(name, value)
        told = {
            k: storage.described(v) if k == "storage" else v
            for k, v in bound.arguments.items()
            if isinstance(v, float) or v is not signature.parameters[k].default
        }
        return make(*args, **kwargs).named(make.__name__, told)

    return checked


def _argument(value: Any) -> str:
    return getattr(value, "__name__", "schedule") if callable(value) else str(value)

"""Optax transformations that record their parts; our constructors return them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import optax

from adam_jax._util.typing import PyTree

UpdateFunction: TypeAlias = Callable[..., tuple[PyTree, PyTree]]

Source: TypeAlias = Any
"""The parts of a transformation: a Chain, or a tuple or mapping of transformations."""


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The `update` function of one of our transformations, with attributes for wrappers.

    They aren't attributes of the transformation, because `tx._replace(init=...)` and Optax's
    wrappers build a new NamedTuple from `tx.init` and `tx.update` only.
    """

    function: UpdateFunction
    """Takes (updates, state, params, **extra), unless `emits_params`."""

    source: Source = None

    text: str = ""
    """The repr of the transformation."""

    emits_params: bool = False
    """Whether `function` takes (updates, state, params, extra, emit_params).

    With `emit_params`, it returns new parameters instead of updates. Parameters may be
    `SplitParam`s. `emit_params` isn't in `extra`, because `extra` belongs to the user.
    """

    exact: bool = False
    """Whether no later transformation may change the updates; see `master_weights`."""

    def __call__(
        self,
        updates: PyTree,
        state: PyTree = ...,
        params: PyTree = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """Return the updates and the new state."""
        if state is ...:
            raise TypeError(
                f"{self.text.partition('(')[0] or 'update'}: update must be given the state, got "
                f"only gradients; call update(gradients, state, params)"
            )
        if self.emits_params:
            return self.function(updates, state, params, extra, emit_params=False)
        return self.function(updates, state, params, **extra)


class Transformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation whose `update` is an `Update`."""

    def __repr__(self) -> str:
        return getattr(self.update, "text", "") or super().__repr__()


def transformation_of(
    source: Source,
    init: Callable[..., PyTree],
    function: UpdateFunction,
    text: str = "",
    *,
    emits_params: bool = False,
    exact: bool = False,
) -> Transformation:
    """Build a transformation that records its source; see the fields of `Update`."""
    return Transformation(init, Update(function, source, text, emits_params, exact))


def with_repr(tx: Transformation, text: str) -> Transformation:
    """Return the transformation with another repr."""
    return Transformation(tx.init, dataclasses.replace(update_of(tx), text=text))


def update_of(tx: PyTree) -> Update:
    """Return `tx.update`, typed as an `Update`, for one of our transformations."""
    return tx.update


def source_of(tx: PyTree) -> Source:
    """Return the source of a transformation; None for one of Optax's."""
    return getattr(getattr(tx, "update", None), "source", None)


def emits_params(tx: optax.GradientTransformation) -> bool:
    """Whether a transformation can return new parameters in place of updates."""
    return getattr(tx.update, "emits_params", False)


def is_exact(tx: optax.GradientTransformation) -> bool:
    """Whether a transformation's updates are exact and must not be changed."""
    return getattr(getattr(tx, "update", None), "exact", False)


def describe(tx: optax.GradientTransformation) -> str:
    """Return the repr of one of our transformations, or the name of an Optax constructor."""
    if isinstance(tx, Transformation):
        return repr(tx)
    made_by = getattr(tx.update, "__qualname__", "?")  # in Optax: clip.<locals>.update_fn
    return made_by.split(".")[0]


def links_of(tx: optax.GradientTransformation, label: str = "") -> Iterator[tuple[str, PyTree]]:
    """Yield (label of the parameter group, link) for each link in a transformation."""
    source = source_of(tx)
    if isinstance(source, Mapping):
        for name, inner in source.items():
            yield from links_of(inner, name)
    elif isinstance(source, tuple):
        for inner in source:
            yield from links_of(inner, label)
    else:
        yield from ((label, link) for link in getattr(source, "links", ()))

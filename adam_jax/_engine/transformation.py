"""Optax transformations that can be looked into: what our constructors return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import optax

from adam_jax._util.typing import PyTree

UpdateFunction: TypeAlias = Callable[..., tuple[PyTree, PyTree]]

Source: TypeAlias = Any
"""What a transformation is made of: a Chain, or a tuple or a mapping of transformations."""


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The `update` function of one of our transformations, with what wrappers need to know of it.

    This is kept here because the NamedTuple around it can't keep it: `tx._replace(init=...)` and
    Optax's wrappers build a new tuple from `tx.init` and `tx.update`.
    """

    function: UpdateFunction
    """(updates, state, params, **extra), or what `emits_params` says."""

    source: Source = None

    text: str = ""
    """The repr of the transformation."""

    emits_params: bool = False
    """Whether `function` takes (updates, state, params, extra, emit_params).

    It then returns new parameters in place of updates if `emit_params`, and takes `SplitParam`
    parameters. This is an argument of its own, not one of `extra`, which belong to the user.
    """

    exact: bool = False
    """Whether its updates are exact, so that nothing may change them."""

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
    """An Optax transformation whose `update` says what it is made of."""

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
    """Return the `update` of one of our transformations, which has more than Optax's."""
    return tx.update


def source_of(tx: PyTree) -> Source:
    """Return what a transformation was made of; None for one of Optax's."""
    return getattr(getattr(tx, "update", None), "source", None)


def emits_params(tx: optax.GradientTransformation) -> bool:
    """Whether a transformation, ours or another, can apply its update to the parameters."""
    return getattr(tx.update, "emits_params", False)


def is_exact(tx: optax.GradientTransformation) -> bool:
    """Whether nothing may change the updates of a transformation, because they are exact."""
    return getattr(getattr(tx, "update", None), "exact", False)


def describe(tx: optax.GradientTransformation) -> str:
    """Return a transformation as a repr shows it: one of Optax's by what made it."""
    if isinstance(tx, Transformation):
        return repr(tx)
    made_by = getattr(tx.update, "__qualname__", "?")  # clip.<locals>.update_fn, as Optax has it
    return made_by.split(".")[0]


def links_of(tx: optax.GradientTransformation, label: str = "") -> Iterator[tuple[str, PyTree]]:
    """Yield the engine's links inside a transformation, with the label of their parameter group."""
    source = source_of(tx)
    if isinstance(source, Mapping):
        for name, inner in source.items():
            yield from links_of(inner, name)
    elif isinstance(source, tuple):
        for inner in source:
            yield from links_of(inner, label)
    else:
        yield from ((label, link) for link in getattr(source, "links", ()))

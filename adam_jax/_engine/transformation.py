"""Optax transformations that can be looked into: what our constructors return."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import optax

from adam_jax import storage
from adam_jax._util import errors
from adam_jax.optimizers._docs import complete
from adam_jax.storage._policy import is_function

P = ParamSpec("P")

_MISSING: Any = object()


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The `update` function of one of our transformations, with what wrappers need to know of it.

    This is kept here because the NamedTuple around it can't keep it: `tx._replace(init=...)` and
    Optax's wrappers build a new tuple from `tx.init` and `tx.update`.
    """

    function: Callable[..., tuple[Any, optax.OptState]]
    """(updates, state, params, **extra), or what `emits_params` says."""

    source: Any = None
    """A Chain of links, a tuple of transformations, or a mapping of them by group."""

    text: str = ""
    """The repr of the transformation."""

    emits_params: bool = False
    """Whether `function` takes (updates, state, params, extra, emit_params).

    It then returns new parameters in place of updates if `emit_params`, and takes `Narrow`
    parameters. This is an argument of its own, not one of `extra`, which belong to the user.
    """

    last: bool = False
    """Whether its updates are exact, so that nothing may change them."""

    def __call__(
        self,
        updates: optax.Updates,
        state: Any = _MISSING,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[Any, optax.OptState]:
        """Return the updates and the new state."""
        if state is _MISSING:
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


def made_of(
    source: Any,
    init: Callable[..., optax.OptState],
    function: Callable[..., tuple[Any, optax.OptState]],
    text: str = "",
    *,
    emits_params: bool = False,
    last: bool = False,
) -> Transformation:
    """Build a transformation that records its source; see the fields of `Update`."""
    return Transformation(init, Update(function, source, text, emits_params, last))


def with_repr(tx: Transformation, text: str) -> Transformation:
    """Return the transformation with another repr."""
    update: Any = tx.update
    return Transformation(tx.init, dataclasses.replace(update, text=text))


def with_name(tx: Transformation, name: str, arguments: Mapping[str, Any]) -> Transformation:
    """Return the transformation under the name, in errors and repr, of the function called."""
    source = source_of(tx)
    if not isinstance(source, tuple):
        tx = dataclasses.replace(source, name=name).transformation()
    return with_repr(
        tx, f"{name}({', '.join(f'{k}={_argument(v)}' for k, v in arguments.items())})"
    )


def source_of(tx: Any) -> Any:
    """Return what a transformation was made of; None for one of Optax's."""
    return getattr(getattr(tx, "update", None), "source", None)


def emits_params(tx: Any) -> bool:
    """Whether a transformation, ours or another, can apply its update to the parameters."""
    return getattr(tx.update, "emits_params", False)


def is_last(tx: Any) -> bool:
    """Whether nothing may change the updates of a transformation, because they are exact."""
    return getattr(getattr(tx, "update", None), "last", False)


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
    source = source_of(tx)
    if isinstance(source, Mapping):
        for name, inner in source.items():
            yield from labelled_parts(inner, name)
    elif isinstance(source, tuple):
        for inner in source:
            yield from labelled_parts(inner, label)
    elif source is not None:
        yield from ((label, link) for link in source.links)


class _Signature(inspect.Signature):
    """The signature of a constructor, by which `optax.inject_hyperparams` binds its arguments.

    It takes every function for a schedule, a storage function, too. As it calls that with the step
    count before the constructor runs, the function itself has to say what is wrong.
    """

    name: str

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        given = bound.arguments.get("storage")
        if is_function(given):
            bound.arguments["storage"] = errors.no_schedule(self.name, given)
        return bound


def constructor(make: Callable[P, Transformation]) -> Callable[P, Transformation]:
    """Gives a constructor what all have in common: checked arguments, its name in errors, a repr.

    Every number among the arguments is checked by its name before anything is built, so that the
    error carries the name of the function that the user called.
    """
    signature = inspect.signature(make)
    make.__doc__ = complete(inspect.getdoc(make) or "", signature)

    @functools.wraps(make)
    @errors.naming(make.__name__)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Transformation:
        bound = errors.arguments(signature, args, kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if errors.allowed(name) and value is not None:
                errors.argument(name, value)
        told = {
            k: storage.described(v) if k == "storage" else v
            for k, v in bound.arguments.items()
            if isinstance(v, float) or v is not signature.parameters[k].default
        }
        return with_name(make(*args, **kwargs), make.__name__, told)

    public: Any = checked
    public.__signature__ = _Signature(
        [*signature.parameters.values()], return_annotation=signature.return_annotation
    )
    public.__signature__.name = make.__name__
    return checked


def _argument(value: Any) -> str:
    return getattr(value, "__name__", "schedule") if callable(value) else str(value)

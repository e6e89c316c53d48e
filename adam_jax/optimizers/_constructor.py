"""Decorators that add argument checks, a repr, and a full signature to a constructor."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeAlias, TypedDict

import jax
import jax.numpy as jnp

from adam_jax._engine.chain import Chain, Link
from adam_jax._engine.transformation import Transformation, with_repr
from adam_jax._util import errors
from adam_jax._util.typing import Mask, PyTree, Range, ScalarOrSchedule
from adam_jax.optimizers._docs import complete
from adam_jax.storage import Storage
from adam_jax.storage._policy import describe_storage, is_function

P = ParamSpec("P")
Form: TypeAlias = Literal["decoupled", "independent", "cautious", "proximal", "l2"]


class Options(TypedDict, total=False):
    """Keywords of every constructor, documented in `_docs.py`."""

    storage: Storage
    implementation: str


class FormOptions(Options, total=False):
    """Keywords of every optimizer whose weight decay `descend` adds."""

    weight_decay_form: Form
    cautious: bool


class MaskOptions(FormOptions, total=False):
    """Keywords of an optimizer whose weight decay is positional, as in Optax."""

    weight_decay_mask: Mask


class DecayOptions(MaskOptions, total=False):
    """Keywords of an optimizer without weight decay in Optax."""

    weight_decay: ScalarOrSchedule | None


DEFAULTS: Mapping[str, Any] = {
    "weight_decay": None,
    "weight_decay_mask": None,
    "weight_decay_form": "decoupled",
    "cautious": False,
    "storage": None,
    "implementation": "auto",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer of the family.

    Attributes:
      name: the constructor's name, `adam_jax.<name>`.
      paper: its authors, and an arXiv number or a venue.
      year: the paper's year.
      formula: u in p ← p - η·u, with the parameter p and the learning rate η. g is the gradient,
        m and v average g and g², a hat marks bias correction, and λ is the weight decay.
      purpose: its use, in one line.
      learning_rate: a first guess, as a multiple of AdamW's learning rate; `benchmarks.family`
        measures it.
      constructor: the function.
    """

    name: str
    paper: str
    year: int
    formula: str
    purpose: str
    learning_rate: str
    constructor: Callable[..., Transformation] = dataclasses.field(repr=False)

    @functools.cached_property
    def state(self) -> tuple[str, ...]:
        """Return the names of the state's parameter-shaped arrays, for default arguments."""
        shape = (7,)  # differs from a step count's
        init = self.constructor(1.0).init
        state = jax.eval_shape(init, jax.ShapeDtypeStruct(shape, jnp.float32))
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        return tuple(path[-1].name for path, leaf in leaves if leaf.shape == shape)


OPTIONS = (Options, FormOptions, MaskOptions, DecayOptions)

ENTRIES: dict[str, Entry] = {}
_LINKS: dict[Callable[..., Transformation], Callable[..., Link]] = {}
_RANGES: list[dict[str, Range]] = []


def direction(make: Callable[P, Link]) -> Callable[P, Transformation]:
    """Turn a function that returns a link into a public `scale_by_x`."""
    name = make.__name__

    def transformation(arguments: inspect.BoundArguments, text: str) -> Transformation:
        link, options = make(*arguments.args, **arguments.kwargs), arguments.arguments
        return Chain(name, (link,), options["implementation"], bare=True).transformation(text)

    public = _public(make, transformation)
    _LINKS[public] = make
    return public


def link_of(scale_by: Callable[P, Transformation]) -> Callable[P, Link]:
    """Return the function that returns the link of a `scale_by_x`."""
    return _LINKS[scale_by]


def optimizer(
    *, paper: str, year: int, formula: str, purpose: str, learning_rate: str
) -> Callable[[Callable[P, Chain | Transformation]], Callable[P, Transformation]]:
    """Turn a function that returns a chain into a public constructor with an `Entry`."""

    def decorate(make: Callable[P, Chain | Transformation]) -> Callable[P, Transformation]:
        def transformation(arguments: inspect.BoundArguments, text: str) -> Transformation:
            made = make(*arguments.args, **arguments.kwargs)
            if not isinstance(made, Chain):
                return with_repr(made, text)
            return dataclasses.replace(made, name=make.__name__).transformation(text)

        public = _public(make, transformation)
        facts = (paper, year, formula, purpose, learning_rate)
        ENTRIES[make.__name__] = Entry(make.__name__, *facts, public)
        return public

    return decorate


def declared_range(argument: str) -> Range | None:
    """Return the range that constructors declare for an argument name."""
    return next((ranges[argument] for ranges in _RANGES if argument in ranges), None)


def _public(
    make: Callable[P, Any],
    transformation: Callable[[inspect.BoundArguments, str], Transformation],
) -> Callable[P, Transformation]:
    """Return a constructor that checks its arguments and sets the repr.

    Numbers are checked before anything is built, so that errors name the function that the user
    called.
    """
    name, signature = make.__name__, _signature(make)
    plain = inspect.Signature(list(signature.parameters.values()))
    make.__doc__ = complete(inspect.getdoc(make) or "", signature)
    ranges = _ranges(make)

    @functools.wraps(make)
    @errors.error_context(name)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Transformation:
        bound = errors.arguments(plain, args, kwargs)
        bound.apply_defaults()
        for argument, allowed in ranges.items():
            value = bound.arguments.get(argument)
            if value is not None:
                errors.in_range(argument, value, allowed)
                errors.hyperparam(argument, value)
        return transformation(bound, _text(name, bound))

    checked.__dict__["__signature__"] = signature
    _RANGES.append(ranges)
    return checked


@dataclasses.dataclass(frozen=True, eq=False)
class _NamedType:
    """An annotation that equals `type`, and that `help` shows as `name`."""

    name: str
    type: PyTree

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: PyTree) -> bool:
        return other == self.type

    def __hash__(self) -> int:
        return hash(self.name)


class _Signature(inspect.Signature):
    """The signature by which `optax.inject_hyperparams` binds a constructor's arguments.

    Optax treats every callable as a schedule, including a storage function, and calls it with the
    step count before the constructor runs. So `bind` makes that call raise an error.
    """

    name: str

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        given = bound.arguments.get("storage")
        if is_function(given):
            bound.arguments["storage"] = errors.no_schedule(self.name, given)
        return bound


def _signature(make: Callable[..., Any]) -> _Signature:
    """Return the signature with the shared keywords listed, and types shown by name."""
    *own, shared = inspect.signature(make).parameters.values()
    named = {f"Unpack[{kind.__name__}]": kind for kind in OPTIONS}
    annotations = named[shared.annotation].__annotations__
    keywords = [
        inspect.Parameter(k, shared.KEYWORD_ONLY, default=v, annotation=annotations[k])
        for k, v in DEFAULTS.items()
        if k in annotations
    ]
    scope = {**globals(), **make.__globals__}
    parameters = [p.replace(annotation=_named_type(p.annotation, scope)) for p in (*own, *keywords)]
    returned = _NamedType("Transformation", Transformation)
    signature = _Signature(parameters, return_annotation=returned)
    signature.name = make.__name__
    return signature


def _named_type(annotation: str | typing.ForwardRef, scope: Mapping[str, Any]) -> _NamedType:
    name = str(getattr(annotation, "__forward_arg__", annotation))
    kind = scope.get(name.removesuffix(" | None"))
    return _NamedType(name, getattr(kind, "__origin__", kind))


def _ranges(make: Callable[..., Any]) -> dict[str, Range]:
    """Return the `Range` of each argument whose type declares one."""
    names = {"weight_decay": "ScalarOrSchedule", **inspect.get_annotations(make)}
    scope = {**globals(), **make.__globals__}
    found: dict[str, Range] = {}
    for argument, name in names.items():
        for mark in getattr(scope.get(name.removesuffix(" | None")), "__metadata__", ()):
            found[argument] = mark
    return found


def _text(name: str, bound: inspect.BoundArguments) -> str:
    """Return the repr: a call with all floats and all non-default arguments."""
    parameters = bound.signature.parameters
    shown = {
        k: describe_storage(v) if k == "storage" else v
        for k, v in bound.arguments.items()
        if isinstance(v, float) or v is not parameters[k].default
    }
    return call_text(name, shown)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as text, with functions shown by name."""

    def text(value: Any) -> str:
        return getattr(value, "__name__", "schedule") if callable(value) else str(value)

    return f"{name}({', '.join(f'{k}={text(v)}' for k, v in arguments.items())})"

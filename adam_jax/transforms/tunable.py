"""Hyperparameters in the state, to read, log, and change between steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax

from adam_jax._engine.apply import step
from adam_jax._engine.state import named_tuples
from adam_jax._engine.transformation import Transformation, transformation_of
from adam_jax._util import errors
from adam_jax._util.numerics import decay_rate
from adam_jax._util.paths import path_string
from adam_jax._util.typing import Numeric, PyTree
from adam_jax.optimizers._constructor import declared_range

P = ParamSpec("P")


class TunableState(NamedTuple):
    """The state of a `tunable` optimizer."""

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name
    hyperparams: dict[str, jax.Array]
    """The last step's values, or ones set since."""
    set_to: dict[str, jax.Array]
    """The values that were set."""
    is_set: dict[str, jax.Array]
    """Whether `set_to` overrides the constructor's argument."""
    inner_state: optax.OptState


def tunable(constructor: Callable[P, optax.GradientTransformation]) -> Callable[P, Transformation]:
    """Wrap a constructor so that its optimizer stores hyperparameters in the state.

    `get_hyperparams` reads and `set_hyperparams` changes, without retracing, the arguments that
    have a range and aren't None, such as learning_rate, b1, eps, and weight_decay: numbers, scalar
    arrays, and schedules. Excluded are initial values of moments and of prodigy's estimate,
    prodigy's betas, weight_lr_power, and the hyperparameters of a rule given to `from_rule`.

    Args:
      constructor: an adam_jax constructor such as `adamw`, or one with the same argument names.

    Returns:
      a constructor with the same arguments. Its optimizer's state is a `TunableState` around the
      original state.

    >>> import adam_jax, jax.numpy as jnp
    >>> tx = tunable(adam_jax.adamw)(1e-3, weight_decay=0.1)
    >>> state = tx.init({"w": jnp.ones(2)})
    >>> state = set_hyperparams(state, learning_rate=5e-4)
    >>> round(float(get_hyperparams(state)["learning_rate"]), 6)
    0.0005
    """
    with errors.error_context("tunable"):
        errors.constructor(constructor, "tunable(adam_jax.adamw)(1e-3)")
    signature, plain = inspect.signature(constructor), errors.name_of(constructor)

    def is_tunable(argument: str) -> bool:
        ranged = declared_range(argument) or errors.range_of(argument)
        return ranged is not None and argument not in STARTS

    name = f"tunable({plain})"

    @functools.wraps(constructor)
    def make(*args: P.args, **kwargs: P.kwargs) -> Transformation:
        with errors.error_context(name):
            bound = errors.arguments(signature, args, kwargs)
            example = constructor(*args, **kwargs)  # bad arguments raise here
        bound.apply_defaults()
        given = {k: v for k, v in bound.arguments.items() if is_tunable(k) and v is not None}

        def inner(values: Mapping[str, PyTree]) -> optax.GradientTransformationExtraArgs:
            arguments = inspect.BoundArguments(signature, bound.arguments | values)  # type: ignore
            return optax.with_extra_args_support(constructor(*arguments.args, **arguments.kwargs))

        def init(params: PyTree) -> TunableState:
            count = jnp.zeros([], jnp.int32)
            zeros = {k: jnp.zeros([], jnp.float32) for k in given}
            unset = {k: jnp.zeros([], jnp.bool_) for k in given}
            values = _effective(given, zeros, unset, count)
            state = inner(values).init(params)
            return TunableState(count, _numbers(values), zeros, unset, state)

        def update(
            updates: PyTree,
            state: PyTree,
            params: PyTree,
            extra: Mapping[str, PyTree],
            *,
            emit_params: bool,
        ) -> tuple[PyTree, TunableState]:
            errors.made_by_init(state, TunableState)
            values = _effective(given, state.set_to, state.is_set, state.count)
            updates, new = step(
                inner(values), updates, state.inner_state, params, extra, emit_params=emit_params
            )
            count = optax.safe_increment(state.count)
            return updates, state._replace(
                count=count, hyperparams=_numbers(values), inner_state=new
            )

        named = errors.error_context(name)
        text = repr(example).replace(plain, name, 1)
        return transformation_of((), named(init), named(update), text, emits_params=True)

    return make


STARTS = ("initial_scale", "initial_accumulator_value")


def _effective(
    given: Mapping[str, PyTree],
    set_to: Mapping[str, PyTree],
    is_set: Mapping[str, PyTree],
    count: jax.Array,
) -> dict[str, PyTree]:
    """Return a step's values; values that were set override the constructor's arguments."""
    values: dict[str, PyTree] = {}
    value: PyTree
    for name, value in given.items():
        value, other = value(count) if callable(value) else value, set_to[name]
        if errors.is_decay_rate(name):
            value, other = decay_rate(value), decay_rate(other)
        choose = functools.partial(_choose, is_set[name])
        values[name] = jax.tree.map(choose, value, other)
    return values


def _choose(is_set: jax.Array, given: Numeric, other: Numeric) -> jax.Array:
    return jnp.where(is_set, other, jnp.asarray(given, jnp.float32))


def _numbers(values: Mapping[str, PyTree]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(getattr(value, "value", value)) for name, value in values.items()}


def get_hyperparams(state: PyTree, *, group: str | None = None) -> dict[str, jax.Array]:
    """Return the last step's hyperparameters, or values set since.

    Args:
      state: a state that contains the state of one `tunable` optimizer; also
        `nnx.Optimizer.opt_state`.
      group: the pattern of one of the `groups`, or "default".

    Returns:
      float32 scalars by name. A schedule gives its value at the last step.

    Raises:
      ValueError: the state has no hyperparameters, or hyperparameters of several groups.
    """
    found = _find("get_hyperparams", state, group)
    return {k: jax.tree.leaves(v)[0] for k, v in found.hyperparams.items()}


def set_hyperparams(state: PyTree, *, group: str | None = None, **values: Numeric | None) -> PyTree:
    """Return a state with other hyperparameters from the next step on.

    Args:
      state: the state of a `tunable` optimizer; see `get_hyperparams`.
      group: see `get_hyperparams`.
      **values: numbers or scalar arrays by name. A number replaces a schedule. None restores the
        constructor's argument.

    Returns:
      a new state.

    Raises:
      ValueError: a number is out of range; the state has no hyperparameters, or several sets.
      TypeError: there is no hyperparameter of that name, or a value isn't a number.
    """
    found = _find("set_hyperparams", state, group)
    with errors.error_context("set_hyperparams"):
        errors.known_hyperparams(values, found.set_to)
        for name, value in values.items():
            if value is not None:
                errors.not_a_schedule(name, value)
                errors.in_range(name, value, declared_range(name))
                errors.hyperparam(name, value)

    def put(old: dict[str, PyTree], new: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return old | {
            k: jax.tree.map(lambda x, v=v: jnp.asarray(v, x.dtype), old[k]) for k, v in new.items()
        }

    def replace(node: PyTree) -> PyTree:
        if node is not found:
            return node
        numbers = {k: v for k, v in values.items() if v is not None}
        return node._replace(
            hyperparams=put(node.hyperparams, numbers),
            set_to=put(node.set_to, numbers),
            is_set=put(node.is_set, {k: v is not None for k, v in values.items()}),
        )

    return jax.tree.map(replace, state, is_leaf=lambda x: isinstance(x, TunableState))


def _find(caller: str, state: PyTree, group: str | None) -> TunableState:
    """Return the only TunableState, within a group if given."""
    everywhere = {
        path_string(path) or "its root": (path, s)
        for path, s in named_tuples(state)
        if isinstance(s, TunableState)
    }
    found = {
        where: s
        for where, (path, s) in everywhere.items()
        if group is None or group in [str(getattr(key, "key", "")) for key in path]
    }
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(
            f"{caller}: the state has hyperparameters at {', '.join(found)}; name the group"
        )
    if everywhere:
        fix = "omit group" if len(everywhere) == 1 else "name one of these groups"
        raise ValueError(
            f"{caller}: group must have hyperparameters, got {group!r}; the state has them at "
            f"{', '.join(everywhere)}: {fix}"
        )
    raise ValueError(
        f"{caller}: the state has no hyperparameters; make the optimizer with tunable, e.g. "
        f"tunable(adam_jax.adamw)(1e-3)"
    )

"""Lifts a rule to a pytree: the only loop over leaves, the only place that knows dtypes.

A `Link` is a rule with its hyperparameters. A `Chain` of links is executed leaf by leaf in one
pass: the gradient goes in, every link transforms it in turn, in float32 whatever the leaf's dtype,
and the update comes out in the gradient's dtype. The state is laid out as Optax lays it out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import checks, hyperparams, storage
from adam_jax.arithmetic import arithmetic_dtype
from adam_jax.declare import Rule
from adam_jax.implementations import IMPLEMENTATIONS
from adam_jax.paths import path_string
from adam_jax.states import count_fields, state_class
from adam_jax.storage.noise import fold, path_key
from adam_jax.transformation import Transformation

Stages: TypeAlias = tuple[tuple[Rule, tuple[tuple[str, Any], ...]] | None, ...]
"""Rules with their options; None where a mask keeps a rule off the leaf."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A rule with its hyperparameters: what one link of a chain does to every leaf."""

    rule: Rule
    hyperparams: Mapping[str, Any]
    options: tuple[tuple[str, Any], ...]
    storage: storage.Storage
    state: type[Any]
    mask: Any


def link(
    rule: Rule,
    given: Mapping[str, Any],
    *,
    formats: storage.Storage = None,
    state: type[Any] | None = None,
    mask: Any = None,
) -> Link:
    """A link, once all that was given for it has been checked.

    `state` is the NamedTuple of its state, whose fields are the rule's moments and step counts.
    """
    starts = {m.start: 0.0 for m in rule.moments.values() if isinstance(m.start, str)}
    known = {**rule.hyperparams, **starts, **rule.options}
    checks.known_hyperparams(given, known)
    values = {k: given.get(k, v) for k, v in known.items() if k not in rule.options}
    for name, value in values.items():
        checks.hyperparam(name, value)
    state = state or state_class(tuple(rule.moments))
    if hyperparams.has_schedule(values) and not count_fields(state, rule.moments):
        checks.no_step_count(next(k for k, v in values.items() if callable(v)), state)
    options = tuple((k, given.get(k, v)) for k, v in rule.options.items())
    return Link(rule, values, options, formats, state, mask)


def lift(links: Sequence[Link], implementation: str, name: str, *, bare: bool) -> Transformation:
    """The Optax transformation that runs `links` on every leaf, one after the other.

    With `bare` its state is that of the only link, else a tuple with the state of each, as in
    `optax.chain`. Errors at init and update carry `name`.
    """
    checks.choice("implementation", implementation, IMPLEMENTATIONS)
    moments = [name for each in links for name in each.rule.moments]
    for each in links:
        storage.check(each.storage, moments)
    return Chain(name, tuple(links), implementation, bare).transformation()


@dataclasses.dataclass(frozen=True)
class Chain:
    """Links lifted to a pytree, with the name that errors call them by."""

    name: str
    links: tuple[Link, ...]
    implementation: str
    bare: bool

    def transformation(self) -> Transformation:
        init, update = checks.naming(self.name)(self.init), checks.naming(self.name)(self.update)
        return Transformation(init, update).made_of(self)

    def init(self, params: optax.Params) -> optax.OptState:
        """The state before the first step: moments at their start, counts at 0."""
        jax.tree_util.tree_map_with_path(functools.partial(checks.leaf, "the parameter"), params)
        states = tuple(_init(each, params) for each in self.links)
        return states[0] if self.bare else states

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        beside: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        """One step: what to add to the parameters, and the new state. Ignores extra arguments.

        `beside` holds the gradients, where `updates` are another transformation's direction.
        """
        del extra
        masked = [each.mask is not None for each in self.links]
        checks.states(state, [each.state for each in self.links], masked, self.bare)
        states: Sequence[Any] = (state,) if self.bare else state  # type: ignore[assignment]
        inner = [s.inner_state if each.mask is not None else s for each, s in self._with(states)]
        gradients, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_none)

        def leaves(what: str, tree: Any) -> list[Any]:
            try:
                return treedef.flatten_up_to(tree)
            except ValueError:
                raise checks.structure(what, updates, tree) from None

        moments = [
            [leaves("state", getattr(s, name)) for name in each.rule.moments]
            for each, s in self._with(inner)
        ]
        parameters = [None] * len(gradients) if params is None else leaves("parameters", params)
        originals = [None] * len(gradients) if beside is None else leaves("gradients", beside)
        masks = [_flags(each.mask, updates) for each in self.links]
        steps = [_step(each, s) for each, s in self._with(inner)]
        scalars, layout = hyperparams.pack([(step.t, step.operands) for step in steps])

        directions = []
        for i, (path, gradient) in enumerate(gradients):
            stages = tuple(
                (each.rule, each.options) if mask is None or mask[i] else None
                for each, mask in zip(self.links, masks, strict=True)
            )
            stored = [tuple(column[i] for column in columns) for columns in moments]
            direction, written = self._step_leaf(
                path, gradient, originals[i], parameters[i], stored, scalars, stages, layout
            )
            directions.append(direction)
            for columns, new in zip(moments, written, strict=True):
                for column, moment in zip(columns, new, strict=True):
                    column[i] = moment

        new = [
            s._replace(
                **step.counts,
                **dict(zip(each.rule.moments, map(treedef.unflatten, columns), strict=True)),
            )
            for (each, s), step, columns in zip(self._with(inner), steps, moments, strict=True)
        ]
        new = [optax.MaskedState(s) if each.mask is not None else s for each, s in self._with(new)]
        return treedef.unflatten(directions), new[0] if self.bare else tuple(new)

    def _with(self, states: Sequence[Any]) -> list[tuple[Link, Any]]:
        return list(zip(self.links, states, strict=True))

    def _step_leaf(
        self,
        path: tuple[Any, ...],
        gradient: Any,
        beside: Any,
        parameter: Any,
        stored: Sequence[tuple[Any, ...]],
        scalars: jax.Array,
        stages: Stages,
        layout: Any,
    ) -> tuple[Any, Sequence[tuple[Any, ...]]]:
        """Checks one leaf and runs the links on it; a leaf without a gradient stays as it is."""
        if gradient is None:
            return None, stored
        if getattr(gradient, "dtype", None) == jax.dtypes.float0:
            return gradient if parameter is None else jnp.zeros_like(parameter), stored
        checks.leaf("the gradient of", path, gradient)
        for link, moments in self._with(stored):
            for (name, declared), x in zip(link.rule.moments.items(), moments, strict=True):
                checks.moment(path, gradient, name, declared, x)
        wants_parameter = [stage[0] for stage in stages if stage and "p" in stage[0].inputs]
        if wants_parameter:
            checks.parameter(path, gradient, parameter, wants_parameter[0])
        if np.size(gradient) == 0:
            return gradient, stored
        return run_leaf(
            gradient,
            beside,
            parameter if wants_parameter else None,
            stored,
            scalars,
            np.uint32(path_key(path_string(path))) if storage.draws(stored) else None,
            stages=stages,
            layout=layout,
            run=IMPLEMENTATIONS[self.implementation],
        )


class _Step(NamedTuple):
    """What a link computes with in this step, the same for every leaf."""

    t: Any
    operands: dict[str, Any]
    counts: dict[str, Any]


def _step(link: Link, state: Any) -> _Step:
    counts = {name: getattr(state, name) for name in count_fields(link.state, link.rule.moments)}
    count = next(iter(counts.values()), None)
    used = {k: v for k, v in link.hyperparams.items() if k in link.rule.hyperparams}
    counts = {name: optax.safe_increment(count) for name, count in counts.items()}
    return _Step(next(iter(counts.values()), None), hyperparams.operands(used, count), counts)


def _init(link: Link, params: optax.Params) -> Any:
    def start(name: str, path: tuple[Any, ...], leaf: Any) -> Any:
        value = link.rule.moments[name].start
        value = link.hyperparams[value] if isinstance(value, str) else value
        return storage.start(storage.format_of(link.storage, name, path, leaf), leaf, value)

    moments = {
        name: jax.tree_util.tree_map_with_path(functools.partial(start, name), params)
        for name in link.rule.moments
    }
    counts = {name: jnp.zeros([], jnp.int32) for name in count_fields(link.state, moments)}
    state = link.state(**counts, **moments)
    return optax.MaskedState(state) if link.mask is not None else state


def _flags(mask: Any, updates: optax.Updates) -> list[bool] | None:
    """Optax's mask, a prefix tree or a function of the updates, as one flag for each leaf."""
    if mask is None:
        return None
    tree = mask(updates) if callable(mask) else mask
    flags: list[bool] = []

    def spread(flag: Any, subtree: Any) -> None:
        if not (flag is None or isinstance(flag, (bool, np.bool_, jax.Array))):
            raise checks.mask(mask, updates, TypeError)
        flags.extend([bool(flag)] * len(jax.tree.leaves(subtree, is_leaf=_is_none)))

    try:
        jax.tree.map(spread, tree, updates, is_leaf=_is_none)
    except ValueError:
        raise checks.mask(mask, updates) from None
    return flags


def _is_none(x: Any) -> bool:
    return x is None


@functools.partial(jax.jit, static_argnames=("stages", "layout", "run"))
def run_leaf(u, g, p, stored, scalars, key, *, stages, layout, run):
    """`leaf`, compiled; one trace for each shape and dtype, whatever the path and the values."""
    return run(functools.partial(leaf, stages, layout), u, g, p, stored, scalars, key)


def leaf(
    stages: Stages,
    layout: Any,
    u: jax.Array,
    g: jax.Array | None,
    p: jax.Array | None,
    stored: Sequence[tuple[Any, ...]],
    scalars: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, list[tuple[Any, ...]]]:
    """The step of one leaf: decode the moments, apply the rules, encode the moments."""
    dtype = arithmetic_dtype(*(x.dtype for x in jax.tree.leaves((u, g, p, stored))))
    real = jnp.finfo(dtype).dtype
    operands = hyperparams.unpack(scalars.astype(real), layout)
    emitted, u = u.dtype, u.astype(dtype)
    g = u if g is None else g.astype(dtype)
    p = None if p is None else p.astype(dtype)
    written = []
    with _promotion(dtype):
        for stage, moments, (t, hyper) in zip(stages, stored, operands, strict=True):
            if stage is None:
                written.append(moments)
                continue
            rule, options = stage
            given = {"t": t, "g": g, "p": p}
            inputs = {name: given[name] for name in rule.inputs}
            decoded = [
                storage.decode(x, dtype if moment.signed else real)
                for x, moment in zip(moments, rule.moments.values(), strict=True)
            ]
            u, *new = _apply(rule, u, decoded, **inputs, **hyper, **dict(options))
            keys = [
                None if key is None or t is None else fold(key, name, t) for name in rule.moments
            ]
            written.append(tuple(map(storage.encode, new, moments, keys)))
    return u.astype(emitted), written


def _apply(rule: Rule, u: jax.Array, moments: Sequence[jax.Array], **keywords: Any) -> Any:
    """A rule's direction, with its factor, and its new moments."""
    out = rule.step(u, *moments, **keywords)
    if rule.moments:
        checks.returned(rule, out)
    direction, *new = out if rule.moments else (out,)
    if rule.factor is not None:
        checks.averaged(rule, direction)
        direction, *averaged = direction
        direction = direction * rule.factor(*(jnp.mean(x) for x in averaged))
    checks.outputs(rule, u, moments, direction, new)
    return direction, *new


def _promotion(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Real coefficients multiply complex moments, which strict promotion would not let them."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.numpy_dtype_promotion("standard")
    return contextlib.nullcontext()

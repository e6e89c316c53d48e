"""Lifts a rule to a pytree: the only loop over leaves, the only place that knows dtypes.

A `Link` is a rule with its hyperparameters. A `Chain` of links is executed leaf by leaf in one
pass: the gradient goes in, every link transforms it in turn, in float32 whatever the leaf's dtype,
and the update comes out in the gradient's dtype, or the parameter with the update applied. The
state is laid out as Optax lays it out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from adam_jax import storage
from adam_jax._backends import IMPLEMENTATIONS, Step, orders
from adam_jax._engine import hyperparams, split_params
from adam_jax._engine.split_params import is_narrow
from adam_jax._engine.state import count_fields, state_class
from adam_jax._engine.transformation import Transformation, made_of
from adam_jax._util import errors
from adam_jax._util.declare import Moment, Rule
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.partition_specs import known_sharding
from adam_jax._util.paths import Key, is_box, keys, map_with_path, rebox, unbox
from adam_jax.storage import Blocks
from adam_jax.storage._random_bits import Place, after, name_key, random_bits

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
    errors.known_hyperparams(given, known)
    values = {k: given.get(k, v) for k, v in known.items() if k not in rule.options}
    for name, value in values.items():
        errors.hyperparam(name, value)
        if name in starts:
            errors.not_a_schedule(name, value, ", because it is used once, in init")
    scheduled = hyperparams.has_schedule(values)
    codes = storage.may_code(formats, rule.moments)
    if state is None or (codes and not count_fields(state, rule.moments)):
        # codes are rounded with random bits, which no two steps should share: they need a count
        state = state_class(tuple(rule.moments), codes or scheduled or "t" in rule.inputs)
    if scheduled and not count_fields(state, rule.moments):
        errors.no_step_count(next(k for k, v in values.items() if callable(v)), state)
    options = tuple((k, given.get(k, v)) for k, v in rule.options.items())
    return Link(rule, values, options, formats, state, mask)


def lift(links: Sequence[Link], implementation: str, name: str, *, bare: bool) -> Transformation:
    """The Optax transformation that runs `links` on every leaf, one after the other.

    With `bare` its state is that of the only link, else a tuple with the state of each, as in
    `optax.chain`. Errors at init and update carry `name`.
    """
    errors.choice("implementation", implementation, IMPLEMENTATIONS)
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
        named = errors.naming(self.name)
        return made_of(self, named(self.init), named(self.step), emits_params=True)

    def init(self, params: optax.Params) -> optax.OptState:
        """The state before the first step: moments at their start, counts at 0."""
        if any(link.rule.moments for link in self.links):  # without, a leaf may be anything
            map_with_path(functools.partial(errors.leaf, "the parameter"), params)
        states = tuple(_init(each, params) for each in self.links)
        for each, state in zip(self.links, states, strict=True):
            _warn_if_nothing_is_quantized(self.name, each, state, params)
        return states[0] if self.bare else states

    def step(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None,
        extra: Mapping[str, Any],
        *,
        emit_params: bool,
        grads: optax.Updates | None = None,
    ) -> tuple[Any, optax.OptState]:
        """Return what to add to the parameters, and the new state. Extra arguments are ignored.

        With `emit_params` return the new parameters instead; `Narrow` ones are always returned.
        `grads` holds the gradients if `updates` are the direction of another transformation.
        """
        del extra
        states = self._own(state)
        steps = [_step(link, s) for link, s in zip(self.links, states, strict=True)]
        scalars, layout = hyperparams.pack([(step.t, step.operands) for step in steps])
        counts = tuple(0 if step.t is None else step.t for step in steps)
        tree = Tree(updates)
        moments = self._moments(tree, states)
        stepped = [
            self._step_leaf(
                path, key, u, g, p, stored, stages, scalars, layout, counts, emit_params
            )
            for (path, u), key, g, p, stored, stages in zip(
                tree.leaves,
                tree.keys,
                tree.like("gradients", grads),
                tree.like("parameters", params),
                moments,
                self._stages(tree),
                strict=True,
            )
        ]
        results = tree.with_leaves([result for result, _ in stepped])
        return results, self._next(tree, states, steps, [written for _, written in stepped])

    def _scaled(self) -> bool:
        """Whether a learning rate scales its updates: then, most likely, parameters get them."""
        return any("learning_rate" in link.rule.hyperparams for link in self.links)

    def _own(self, state: Any) -> list[Any]:
        """The state of each link, out of the masks around them."""
        masked = [link.mask is not None for link in self.links]
        errors.states(state, [link.state for link in self.links], masked, self.bare)
        states = [state] if self.bare else state
        return [s.inner_state if m else s for s, m in zip(states, masked, strict=True)]

    def _moments(self, tree: Tree, states: Sequence[Any]) -> list[tuple[tuple[Any, ...], ...]]:
        """For each leaf, for each link, its moments as they are stored."""
        per_link = [
            zip(*(_stored(tree, getattr(s, name)) for name in link.rule.moments), strict=True)
            if link.rule.moments
            else [()] * len(tree.leaves)
            for link, s in zip(self.links, states, strict=True)
        ]
        return list(zip(*per_link, strict=True))

    def _stages(self, tree: Tree) -> list[Stages]:
        """For each leaf, the rules that act on it."""
        per_link = []
        for link in self.links:
            flags = [True] * len(tree.leaves) if link.mask is None else _flags(link.mask, tree.tree)
            per_link.append([(link.rule, link.options) if flag else None for flag in flags])
        return list(zip(*per_link, strict=True))

    def _next(
        self, tree: Tree, states: Sequence[Any], steps: Sequence[_Step], written: Sequence[Any]
    ) -> Any:
        """The new state: moments written, steps counted, masks put back around."""
        new = []
        for k, (link, state, step) in enumerate(zip(self.links, states, steps, strict=True)):
            moments = {
                name: _written(tree, getattr(state, name), [leaf[k][i] for leaf in written])
                for i, name in enumerate(link.rule.moments)
            }
            state = state._replace(**step.counts, **moments)
            new.append(state if link.mask is None else optax.MaskedState(state))
        return new[0] if self.bare else tuple(new)

    def _step_leaf(
        self,
        path: tuple[Any, ...],
        leaf_key: Key,
        u: Any,
        g: Any,
        p: Any,
        stored: Sequence[tuple[Any, ...]],
        stages: Stages,
        scalars: jax.Array,
        layout: Any,
        counts: tuple[Any, ...],
        emit_params: bool,
    ) -> tuple[Any, Sequence[tuple[Any, ...]]]:
        """Checks one leaf and runs the rules on it; a leaf without a gradient stays as it is."""
        lands = emit_params or is_narrow(p)
        if u is None:
            return p if lands else None, stored
        if getattr(u, "dtype", None) == jax.dtypes.float0:
            return p if lands else u if p is None else jnp.zeros_like(p), stored
        errors.leaf("the gradient of", path, u)
        u = float(u) if isinstance(u, int) else u
        for link, moments in zip(self.links, stored, strict=True):
            for (name, declared), x in zip(link.rule.moments.items(), moments, strict=True):
                errors.moment(path, u, name, declared, x.codes if storage.is_coded(x) else x)
                if storage.is_coded(x):
                    errors.scales(path, name, x.codes, x.scales, storage.block_of(x))
        wants_p = [stage[0] for stage in stages if stage and "p" in stage[0].inputs]
        errors.parameter(path, u, split_params.value(p), wants_p, lands)
        if np.size(u) == 0:
            return p if lands else u, stored
        draw = p.draw if is_narrow(p) else None
        draws = storage.draws(stored) or draw is not None
        key = Seeds(_name_key(leaf_key), draw, counts) if draws else None
        run = IMPLEMENTATIONS[self.implementation]
        # what is drawn waits for the parameter that apply_updates will make
        waits = key is not None and self._scaled() and orders()
        if draw is not None:
            p = p._replace(draw=None)
        elif not (wants_p or lands or waits):
            p = None
        used = [moments for moments, stage in zip(stored, stages, strict=True) if stage]
        settings = Settings(stages, layout, run, lands, known_sharding(leaf_key))
        result, new = run_leaf(u, g, p, used, scalars, key, settings=settings)
        news = iter(new)
        return result, [
            next(news) if stage else moments for moments, stage in zip(stored, stages, strict=True)
        ]


class Seeds(NamedTuple):
    """The seeds of the random bits of a leaf."""

    leaf: Any
    """A hash of its path."""
    parameter: Any
    """The seed and step of its parameter, if that is rounded stochastically."""
    counts: Any
    """The step of each link, for its moments."""

    def packed(self) -> jax.Array:
        """One vector of uint32: the leaf, the parameter, the steps."""
        parameter = 0 if self.parameter is None else self.parameter
        numbers = (self.leaf, parameter, *self.counts)
        return jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in numbers])


def _name_key(leaf: Key) -> np.uint32:
    path, repeated = leaf
    return np.uint32(name_key(f"{path}#{repeated}" if repeated else path))


class Tree:
    """A list of the leaves of updates, with their paths; a None or a box of Flax is a leaf."""

    def __init__(self, tree: Any):
        self.tree = tree
        boxed, self.treedef = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: x is None or is_box(x)
        )
        self.leaves = [(path, unbox(x)) for path, x in boxed]
        self.keys = keys(path for path, _ in boxed)

    def like(self, what: str, tree: Any) -> list[Any]:
        """Return the leaves of another tree in the same order; all None if there is no tree."""
        return [unbox(x) for x in self._boxes(what, tree)]

    def with_leaves(self, leaves: Sequence[Any], like: Any = None) -> Any:
        """Return a tree of these leaves, in the boxes of another tree or of the updates."""
        boxes = self._boxes("state", self.tree if like is None else like)
        return self.treedef.unflatten(map(rebox, boxes, leaves))

    def _boxes(self, what: str, tree: Any) -> list[Any]:
        if tree is None:
            return [None] * len(self.leaves)
        try:
            return self.treedef.flatten_up_to(tree)
        except ValueError:
            raise errors.structure(what, self.tree, tree) from None


def _stored(tree: Tree, moment: Any) -> list[Any]:
    """A moment's leaves as they are stored: arrays, or the codes and scales of one leaf."""
    if not isinstance(moment, Blocks):
        return tree.like("state", moment)
    codes, scales = tree.like("state", moment.codes), tree.like("state", moment.scales)
    return list(map(storage.one_leaf, codes, scales))


def _written(tree: Tree, moment: Any, leaves: Sequence[Any]) -> Any:
    """The moment with new leaves."""
    if not isinstance(moment, Blocks):
        return tree.with_leaves(leaves, moment)
    scales = tree.like("state", moment.scales)
    pairs = [
        x if isinstance(x, Blocks) else Blocks(x, s) for x, s in zip(leaves, scales, strict=True)
    ]
    return Blocks(*(tree.with_leaves([pair[i] for pair in pairs], moment[i]) for i in (0, 1)))


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
    moments = {}
    for name, declared in link.rule.moments.items():
        value = declared.start
        value = link.hyperparams[value] if isinstance(value, str) else value
        moments[name] = storage.start(link.storage, name, declared, params, value)
    counts = {name: jnp.zeros([], jnp.int32) for name in count_fields(link.state, moments)}
    state = link.state(**counts, **moments)
    return optax.MaskedState(state) if link.mask is not None else state


def _warn_if_nothing_is_quantized(name: str, link: Link, state: Any, params: optax.Params) -> None:
    """Warn if a format was asked for by name, and no leaf is fit for it.

    Under a mask, as in `groups`, the leaves of others are hidden, and those may be fit.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    masked = link.mask is not None or any(isinstance(x, optax.MaskedNode) for x in leaves)
    if masked or storage.is_function(link.storage):
        return
    moments = [getattr(state, moment) for moment in link.rule.moments]
    asked = [m for m in moments if isinstance(m, Blocks)]
    stored = [x for moment in asked for x in storage.leaves(moment).values()]
    if stored and not any(map(storage.is_coded, stored)):
        warnings.warn(
            f"{name}: storage={storage.described(link.storage)} must find a leaf to quantize, "
            f"real, of at least {storage.MIN_SIZE} elements and a last axis longer than 1, got "
            f"none of {len(leaves)} leaves; leave storage out, or give a function that names the "
            f"format, storage=lambda path, leaf: ...",
            stacklevel=4,
        )


def _flags(mask: Any, updates: optax.Updates) -> list[bool]:
    """Optax's mask, a prefix tree or a function of the updates, as one flag for each leaf."""
    tree = mask(updates) if callable(mask) else mask
    flags: list[bool] = []

    def spread(flag: Any, subtree: Any) -> None:
        if not (flag is None or isinstance(flag, (bool, np.bool_, jax.Array))):
            raise errors.mask(mask, updates, TypeError)
        flags.extend([bool(flag)] * len(jax.tree.leaves(subtree, is_leaf=_is_none)))

    try:
        jax.tree.map(spread, tree, updates, is_leaf=_is_none)
    except ValueError:
        raise errors.mask(mask, updates) from None
    return flags


def _is_none(x: Any) -> bool:
    return x is None


class Settings(NamedTuple):
    """What a leaf's trace depends on beside shapes and dtypes."""

    stages: Stages
    layout: Any
    run: Callable[..., Any]
    lands: bool
    sharding: NamedSharding | None


@functools.partial(jax.jit, static_argnames="settings")
def run_leaf(u, g, p, stored, scalars, key, *, settings):
    """`leaf`, compiled; one trace for each shape and dtype, whatever the path and the values.

    `stored` has the moments of the rules that act on the leaf.
    """
    stages, layout, run, lands, sharding = settings
    asks = [stage[0].averages for stage in stages if stage and stage[0].factor]
    step = functools.partial(leaf, stages, layout, lands, float(np.size(u)))
    key = None if key is None else key.packed()
    return run(step, asks, 2 if lands else 0, sharding, u, g, p, stored, scalars, key)


def leaf(
    stages: Stages,
    layout: Any,
    lands: bool,
    size: float,
    u: jax.Array,
    g: jax.Array | None,
    p: Any,
    stored: Sequence[tuple[Any, ...]],
    scalars: jax.Array,
    key: jax.Array | None,
    place: Place | None,
    share: Callable[..., jax.Array] | None = None,
    *,
    ordered: bool = False,
) -> Step:
    """The step of one leaf, or of a part of it: decode the moments, apply the rules, encode them.

    It returns the update, or with `lands` the new parameter, and what is stored. A generator: what
    has to be averaged over the whole leaf it yields, and is sent the means.
    `share` finds the largest of each block where this is only a part of them. With `ordered` what
    is stored waits for the new parameter. `place` is for random bits: without a key there need be
    none.
    """
    dtype = arithmetic_dtype(*storage.dtypes((u, g, p, stored)))
    real = jnp.finfo(dtype).dtype
    operands = hyperparams.unpack(scalars.astype(real), layout)
    active = [
        (stage, o, k)
        for k, (stage, o) in enumerate(zip(stages, operands, strict=True))
        if stage is not None
    ]
    emitted, u = u.dtype, u.astype(dtype)
    g = u if g is None else g.astype(dtype)
    kept, p = p, None if p is None else split_params.read(p, dtype)

    def draw_bits(k: int, name: str = "") -> jax.Array | None:
        """Draw for the parameter, k = 1, or for a moment, from k = 2 on."""
        if key is None or place is None:
            return None
        return random_bits(key[0], key[k], place, name)

    results: list[tuple[Any, Any, Any, Any, Any]] = []
    for ((rule, options), (t, hyper), k), moments in zip(active, stored, strict=True):
        given = {"t": t, "g": g, "p": p, "size": size}
        inputs = {name: given[name] for name in rule.inputs}
        received = u
        decoded = _decode(rule, moments, hyper, dtype)
        with _promotion(dtype):
            u, averaged, *new = _apply(rule, u, decoded, **inputs, **hyper, **dict(options))
        if rule.factor is not None:
            means = yield averaged
            with _promotion(dtype):
                u = u * rule.factor(*means)
        draw = (lambda _: None) if t is None else functools.partial(draw_bits, 2 + k)
        results.append((rule.moments, new, moments, received, draw))
    if not lands:
        result = u.astype(emitted)
    else:
        if not is_narrow(kept):
            u = u.astype(emitted).astype(dtype)  # as it would have been emitted
        bits = draw_bits(1) if split_params.draws(kept) else None
        result = split_params.land(kept, jnp.add(p, u), bits)
    if key is not None and ordered and kept is not None:
        key = after(jax.tree.leaves(result)[0] if lands else _landed(kept, result), key)
    return result, [_encode(*each, share) for each in results]


def _encode(
    declared: Mapping[str, Moment],
    new: Sequence[jax.Array],
    old: Sequence[Any],
    received: jax.Array,
    draw: Callable[[str], jax.Array | None],
    share: Callable[..., jax.Array] | None,
) -> tuple[Any, ...]:
    """Return the new moments of one rule as the old ones are stored.

    Only a gradient that isn't finite makes its block NaN. The square of a finite one may overflow:
    then the largest finite number stands for Inf. Whether the gradient is finite is known from a
    signed moment in the same blocks, or else costs three instructions per element.
    """
    encoded: dict[str, Any] = {}
    for (name, moment), x, stored in zip(declared.items(), new, old, strict=True):
        bits = draw(name) if moment.average and storage.draws(stored) else None
        marks = [encoded[k] for k in encoded if declared[k].signed]
        mark = next((y for y in marks if storage.in_equal_blocks(stored, y)), None)
        mark = None if moment.signed else mark
        if storage.is_coded(stored) and not moment.signed and mark is None:
            x = storage.finite(x) + 0 * received  # 0·Inf is NaN
        x = storage.encode(
            x, stored, bits, share, average=moment.average, saturate=mark is not None
        )
        encoded[name] = x if mark is None else storage.marked_as(x, mark)
    return tuple(encoded.values())


def _decode(
    rule: Rule, stored: Sequence[Any], hyperparams: Mapping[str, Any], dtype: Any
) -> list[jax.Array]:
    """Return the moments of one leaf; a quantized one is at least what its rule declares."""
    real = jnp.finfo(dtype).dtype
    moments = [
        storage.decode(x, dtype if moment.signed else real)
        for x, moment in zip(stored, rule.moments.values(), strict=True)
    ]
    bounds = rule.bounds(moments, hyperparams) if any(map(storage.is_coded, stored)) else moments
    return [
        jnp.where(bound > m, bound, m) if storage.is_coded(x) and bound is not None else m
        for m, bound, x in zip(moments, bounds, stored, strict=True)
    ]


def _landed(p: Any, update: Any) -> Any:
    """The parameter that the update makes, computed as Optax does it, so that XLA sees one sum."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(p, update)


def _apply(rule: Rule, u: jax.Array, moments: Sequence[jax.Array], **keywords: Any) -> Any:
    """A rule's direction, what its factor wants averaged, and its new moments."""
    out = rule.step(u, *moments, **keywords)
    if rule.moments:
        errors.returned(rule, out)
    direction, *new = out if rule.moments else (out,)
    averaged: Sequence[jax.Array] = ()
    if rule.factor is not None:
        errors.averaged(rule, direction)
        direction, *averaged = direction
    errors.outputs(rule, u, moments, direction, new)
    return direction, tuple(averaged), *new


def _promotion(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Real coefficients multiply complex moments, which strict promotion would not let them."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.numpy_dtype_promotion("standard")
    return contextlib.nullcontext()

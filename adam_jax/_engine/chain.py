"""Lift rules to pytrees.

A `Link` is a rule with its hyperparameters. A `Chain` runs its links leaf by leaf in one pass: each
link transforms the previous link's output. A step returns the update in the gradient's dtype, or
the new parameter. The state has Optax's structure.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._backends import xla
from adam_jax._backends.choice import BACKENDS
from adam_jax._backends.step import Operands
from adam_jax._engine import parts
from adam_jax._engine.hyperparams import Computed, Value, as_value, evaluate, is_schedule
from adam_jax._engine.leaf import (
    Layout,
    Seeds,
    Settings,
    Stages,
    pack,
    run_leaf,
    target_platform,
)
from adam_jax._engine.parts import seed_of_layer
from adam_jax._engine.split_params import SplitParam
from adam_jax._engine.state import State, count_fields, state_class
from adam_jax._engine.transformation import Transformation, transformation_of
from adam_jax._util import errors
from adam_jax._util.declare import Moment, Option, Rule
from adam_jax._util.numerics import arithmetic_dtype, real_dtype
from adam_jax._util.partition_specs import known_shardings
from adam_jax._util.paths import Key, is_box, keys, map_with_path, rebox, unbox
from adam_jax._util.typing import KeyPath, Mask, PyTree, ScalarOrSchedule
from adam_jax.storage import MIN_SIZE, Storage, _moments, _policy
from adam_jax.storage._blockwise import QuantizedLeaf
from adam_jax.storage._moments import Stored
from adam_jax.storage._reduced import TotalLeaf


@dataclasses.dataclass(frozen=True)
class Link:
    """One link of a chain: a rule with its hyperparameters, applied to every leaf."""

    rule: Rule
    hyperparams: Mapping[str, ScalarOrSchedule]
    moments: Mapping[str, Moment]
    """The rule's moments, with `bounds_step` False if these hyperparameters make the bound 0."""
    constants: Mapping[str, Value]
    """The hyperparameters that are Python numbers, converted once."""
    starts: Mapping[str, PyTree]
    """The initial value of each moment and scalar; for a moment, it may be f(parameter)."""
    options: tuple[tuple[str, Option], ...]
    storage: Storage
    state: type[State]
    counts: tuple[str, ...]
    """The state's fields that count steps."""
    mask: Mask

    def init(self, params: PyTree) -> State:
        """Return the state before the first step."""
        moments = {
            name: _moments.start(self.storage, name, moment, params, self.starts[name])
            for name, moment in self.moments.items()
        }
        counts = {name: jnp.zeros([], jnp.int32) for name in self.counts}
        leaves = jax.tree.leaves(params) if self.rule.scalars else ()
        dtype = real_dtype(*map(jnp.result_type, leaves))
        scalars = {name: jnp.array(self.starts[name], dtype) for name in self.rule.scalars}
        state = self.state(**counts, **moments, **scalars)
        return state if self.mask is None else optax.MaskedState(state)

    def operands(self, count: jax.Array | None, values: Mapping[str, PyTree]) -> dict[str, Value]:
        """Return the values of the hyperparameters after `count` steps.

        `values` has the scalars and hyperparameters that `Computed` functions take.
        """
        evaluated = {
            k: v(values) if isinstance(v, Computed) else v
            for k, v in self.hyperparams.items()
            if k not in self.constants
        }
        return {**self.constants, **evaluate(evaluated, count)}


def link(
    rule: Rule,
    given: Mapping[str, PyTree],
    *,
    storage: Storage = None,
    state: type[State] | None = None,
    mask: Mask = None,
) -> Link:
    """Check the arguments and return a link.

    `state` is the class of the link's state, a NamedTuple with the rule's moments and step counts.
    If it has no step count but quantized storage needs one, another class replaces it.
    """
    declared: dict[str, PyTree] = {**rule.moments, **rule.scalars}
    starts = {m.start: 0.0 for m in declared.values() if isinstance(m.start, str)}
    known = {**starts, **rule.hyperparams, **rule.options}
    errors.known_hyperparams(given, known)
    values = {k: given.get(k, v) for k, v in known.items() if k not in rule.options}
    for name, value in values.items():
        if isinstance(value, Computed):
            continue
        errors.hyperparam(name, value)
        if name in starts:
            errors.not_a_schedule(name, value, ", because it is used once, in init")
    schedules = [name for name, value in values.items() if is_schedule(value)]
    quantized = _policy.may_quantize(storage, rule.moments)
    if state is None or (quantized and not count_fields(state, rule.fields)):
        # stochastic rounding needs a count, so that no two steps share random bits
        counted = quantized or bool(schedules) or "t" in rule.inputs
        state = state_class(tuple(rule.moments), counted, tuple(rule.scalars))
    counts = count_fields(state, rule.fields)
    if schedules and not counts:
        errors.no_step_count(schedules[0], state)
    start = {
        name: values[m.start] if isinstance(m.start, str) else m.start
        for name, m in declared.items()
    }
    used = {k: values[k] for k in rule.hyperparams}
    constants = {k: as_value(k, v) for k, v in used.items() if isinstance(v, (int, float))}
    options = tuple((k, given.get(k, v)) for k, v in rule.options.items())
    moments = _with_bounds(rule, constants) if quantized else rule.moments
    return Link(rule, used, moments, constants, start, options, storage, state, counts, mask)


def _with_bounds(rule: Rule, constants: Mapping[str, Value]) -> Mapping[str, Moment]:
    """Return the rule's moments, with `bounds_step` False if the lower bound is 0."""
    if rule.hyperparams.keys() - constants.keys():  # schedules and arrays have no fixed bound
        return rule.moments
    with jax.ensure_compile_time_eval():
        bounds = rule.bounds([jnp.ones(())] * len(rule.moments), constants)
        limits = [bound is not None and bool(bound > 0) for bound in bounds]
    named = zip(rule.moments.items(), limits, strict=True)
    return {name: m._replace(bounds_step=m.bounds_step and limit) for (name, m), limit in named}


@dataclasses.dataclass(frozen=True)
class Chain:
    """Links that run on every leaf in sequence.

    If `bare`, the state of the main link, which has the moments, is the chain's state; the other
    links use at most its step count. Otherwise, the state is a tuple with one state per link, as
    in `optax.chain`. Errors at init and update begin with `name`.
    """

    name: str
    links: tuple[Link, ...]
    implementation: str
    bare: bool = False

    def transformation(self, text: str = "") -> Transformation:
        """Return an Optax transformation whose repr is `text`."""
        errors.choice("implementation", self.implementation, BACKENDS)
        moments = {k: m for each in self.links for k, m in each.rule.moments.items()}
        for each in self.links:
            _policy.check(each.storage, moments)
        named = errors.error_context(self.name)
        return transformation_of(self, named(self.init), named(self.step), text, emits_params=True)

    def init(self, params: PyTree) -> PyTree:
        """Return the state before the first step: moments at their initial values, counts at 0."""
        if any(link.rule.moments for link in self.links):  # without moments, any leaf is valid
            map_with_path(functools.partial(errors.leaf, "the parameter"), params)
        states = tuple(link.init(params) for link in self.links)
        for each, state in zip(self.links, states, strict=True):
            _warn_if_nothing_is_lossy(self.name, each, state, params)
        return states[self._main] if self.bare else states

    @property
    def _main(self) -> int:
        """Return the index of the first link with moments, or of the last link."""
        with_moments = (k for k, link in enumerate(self.links) if link.rule.moments)
        return next(with_moments, len(self.links) - 1)

    def step(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, PyTree],
        *,
        emit_params: bool,
        grads: PyTree = None,
    ) -> tuple[PyTree, PyTree]:
        """Return the updates, or new parameters if `emit_params`, and the new state.

        A `SplitParam` is always returned as a new parameter. If `updates` is the direction of
        another transformation, `grads` has the gradients. Extra arguments are ignored.
        """
        del extra
        states = self._states(state)
        steps = self._step_scalars(states)
        scalars, layout = pack([(step.t, step.operands) for step in steps])
        counts = tuple(0 if step.t is None else step.t for step in steps)
        tree = Tree(updates)
        stored = self._moments(tree, states)
        stepped = [
            self._step_leaf(path, key, operands, stages, layout, counts, emit_params)
            for (path, u), key, g, p, moments, stages in zip(
                tree.leaves,
                tree.keys,
                tree.like("gradients", grads),
                tree.like("parameters", params),
                stored,
                self._stages(tree),
                strict=True,
            )
            for operands in [Operands(u, g, p, moments, scalars, None)]
        ]
        outputs = tree.with_leaves([leaf.output for leaf in stepped])
        return outputs, self._next(tree, states, steps, stepped)

    def _has_learning_rate(self) -> bool:
        """Whether a link has a learning rate, which suggests that the updates will be applied."""
        return any("learning_rate" in link.rule.hyperparams for link in self.links)

    def _states(self, state: PyTree) -> list[State]:
        """Return each link's state, unwrapped from its `MaskedState`."""
        links = [self.links[self._main]] if self.bare else self.links
        masked = [link.mask is not None for link in links]
        errors.states(state, [link.state for link in links], masked, self.bare)
        states = [state] if self.bare else state
        states = [s.inner_state if m else s for s, m in zip(states, masked, strict=True)]
        if not self.bare:
            return states
        count = next((getattr(states[0], name) for name in links[0].counts), None)
        return [
            states[0] if link is links[0] else link.state(**dict.fromkeys(link.counts, count))
            for link in self.links
        ]

    def _step_scalars(self, states: Sequence[State]) -> list[_StepScalars]:
        """Return each link's scalars in this step, some computed from another link's scalars."""
        pairs = list(zip(self.links, states, strict=True))
        known: dict[str, PyTree] = {}
        for link, state in pairs:
            if link.rule.scalars:
                known |= _StepScalars.of(link, state, {}).cast(_dtype_of_scalars(link, state))
        return [_StepScalars.of(link, state, known) for link, state in pairs]

    def _moments(self, tree: Tree, states: Sequence[State]) -> list[tuple[tuple[Stored, ...], ...]]:
        """Return the stored moments of each leaf, per link."""
        per_link = [
            zip(*(tree.moment(getattr(s, name)) for name in link.rule.moments), strict=True)
            if link.rule.moments
            else itertools.repeat((), len(tree.leaves))
            for link, s in zip(self.links, states, strict=True)
        ]
        return list(zip(*per_link, strict=True)) if per_link else [()] * len(tree.leaves)

    def _stages(self, tree: Tree) -> list[Stages]:
        """Return the rules that act on each leaf."""
        stages = tuple((link.rule, link.options) for link in self.links)
        if all(link.mask is None for link in self.links):
            return [stages] * len(tree.leaves)
        flags = [
            itertools.repeat(True) if link.mask is None else _flags(link.mask, tree.tree)
            for link in self.links
        ]
        per_leaf = zip(tree.leaves, *flags, strict=False)
        return [
            tuple(stage if flag else None for stage, flag in zip(stages, leaf_flags, strict=True))
            for _, *leaf_flags in per_leaf
        ]

    def _next(
        self,
        tree: Tree,
        states: Sequence[State],
        steps: Sequence[_StepScalars],
        stepped: Sequence[SteppedLeaf],
    ) -> PyTree:
        """Return the new state: moments, scalars, and counts, in a `MaskedState` if masked."""
        new = []
        for k, (link, state, step) in enumerate(zip(self.links, states, steps, strict=True)):
            moments = {
                name: tree.with_moment(
                    [leaf.moments[k][i] for leaf in stepped], getattr(state, name)
                )
                for i, name in enumerate(link.rule.moments)
            }
            sums = dict(zip(tree.keys, (leaf.sums[k] for leaf in stepped), strict=True))
            scalars = _next_scalars(link, state, step, list(parts.own(sums).values()))
            state = state._replace(**step.counts, **moments, **scalars)
            new.append(state if link.mask is None else optax.MaskedState(state))
        return new[self._main] if self.bare else tuple(new)

    def _step_leaf(
        self,
        path: KeyPath,
        key: Key,
        operands: Operands,
        stages: Stages,
        layout: Layout,
        counts: tuple[jax.Array | int, ...],
        emit_params: bool,
    ) -> SteppedLeaf:
        """Check one leaf and run the rules on it; without a gradient, the leaf is unchanged."""
        u: PyTree = operands.update
        p: PyTree = operands.param
        stored = operands.moments
        split = isinstance(p, SplitParam)
        by_addition = split and not emit_params
        emit_params = emit_params or split
        unchanged = functools.partial(SteppedLeaf, moments=stored, sums=[()] * len(stages))
        if u is None:
            return unchanged(p if emit_params else None)
        if getattr(u, "dtype", None) == jax.dtypes.float0:
            zero = u if p is None else jax.tree.map(jnp.zeros_like, p)
            return unchanged(p if emit_params else zero)
        errors.leaf("the gradient of", path, u)
        u = float(u) if isinstance(u, int) else u
        for link, moments in zip(self.links, stored, strict=True):
            for (name, declared), x in zip(link.rule.moments.items(), moments, strict=True):
                errors.moment(path, u, name, declared, _moments.whole(x, np.shape(u)))
                if isinstance(x, QuantizedLeaf):
                    errors.scales(path, name, x.codes, x.scales, _moments.block_size(x))
        readers = [stage[0] for stage in stages if stage and "p" in stage[0].inputs]
        errors.parameter(path, u, p.value if split else p, readers, emit_params)
        if np.size(u) == 0:
            return unchanged(p if emit_params else u)
        random_param = split and p.seed is not None
        seeds = None
        if random_param or any(map(_needs_random_bits, self.links, stored)):
            seeds = Seeds(seed_of_layer(_hash(key)), p.seed if random_param else 0, counts)
        ordered = xla.orders_writes(target_platform())
        ordered = ordered and seeds is not None and self._has_learning_rate()
        if random_param:
            p = p._replace(seed=None)
        elif not (readers or emit_params or ordered):
            p = None
        used = [moments for moments, stage in zip(stored, stages, strict=True) if stage]
        totals = [len(stage[0].totals) if stage else 0 for stage in stages]
        if any(totals):
            zero = jnp.zeros((1,) * np.ndim(u), real_dtype(*_moments.dtypes((u, p, stored))))
            used.append((TotalLeaf(zero),) * sum(totals))
        sharding = known_shardings.get().get(key)
        execute_leaf = BACKENDS[self.implementation]
        settings = Settings(stages, layout, execute_leaf, emit_params, by_addition, sharding)
        operands = Operands(u, operands.grad, p, used, operands.scalars, None)
        output, new = run_leaf(operands, seeds, settings=settings)
        news = iter(new)
        moments = [
            next(news) if stage else moments for moments, stage in zip(stored, stages, strict=True)
        ]
        terms = iter(next(news, ()))
        sums = [[jnp.sum(next(terms).values) for _ in range(n)] for n in totals]
        return SteppedLeaf(output, moments, sums)


def _needs_random_bits(link: Link, moments: tuple[Stored, ...]) -> bool:
    pairs = zip(link.rule.moments.values(), moments, strict=True)
    return any(_moments.needs_random_bits(x) for declared, x in pairs if not declared.exact)


def _next_scalars(
    link: Link, state: State, step: _StepScalars, sums: Sequence[Sequence[jax.Array]]
) -> dict[str, jax.Array]:
    """Return a link's scalars after a step, given its sums over each leaf."""
    rule = link.rule
    if not rule.scalars:
        return {}
    dtype = _dtype_of_scalars(link, state)
    totals = [jnp.zeros([], dtype)] * len(rule.totals)
    for leaf in filter(None, sums):
        totals = [total + x.astype(dtype) for total, x in zip(totals, leaf, strict=True)]
    named = dict(zip(rule.totals, parts.total(totals), strict=True))
    new = rule.next_scalars({**step.cast(dtype), **named})
    errors.scalars(rule, new)
    return {name: jnp.asarray(new[name], getattr(state, name).dtype) for name in rule.scalars}


def _dtype_of_scalars(link: Link, state: State) -> np.dtype:
    return arithmetic_dtype(*(getattr(state, name).dtype for name in link.rule.scalars))


def _hash(key: Key) -> np.uint32:
    path, repeated = key
    return np.uint32(zlib.crc32((f"{path}#{repeated}" if repeated else path).encode()))


class SteppedLeaf(NamedTuple):
    """The results of one leaf's step."""

    output: PyTree
    moments: Sequence[tuple[Stored, ...]]
    """The moments of each link."""
    sums: Sequence[Sequence[jax.Array]]
    """Each link's sums over the leaf; empty if the link doesn't act on the leaf."""


class Tree:
    """The leaves of an update tree, with their paths; None and Flax boxes are leaves."""

    def __init__(self, tree: PyTree):
        self.tree = tree
        boxed, self.treedef = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: x is None or is_box(x)
        )
        self.leaves = [(path, unbox(x)) for path, x in boxed]
        self.keys = keys(path for path, _ in boxed)

    def like(self, what: str, tree: PyTree) -> list[PyTree]:
        """Return another tree's leaves in this tree's order; all None if `tree` is None."""
        return [unbox(x) for x in self._boxes(what, tree)]

    def with_leaves(self, leaves: Sequence[PyTree], like: PyTree = None) -> PyTree:
        """Return a tree of these leaves, in the boxes of `like` or of the updates."""
        boxes = self._boxes("state", self.tree if like is None else like)
        return self.treedef.unflatten(map(rebox, boxes, leaves))

    def moment(self, moment: PyTree) -> list[Stored]:
        """Return the leaves of a moment, as stored."""
        if not _moments.is_in_trees(moment):
            return self.like("state", moment)
        shapes = [np.shape(u) for _, u in self.leaves]
        arrays = zip(*(self.like("state", tree) for tree in moment), strict=True)
        stored = functools.partial(_moments.stored_leaf, type(moment))
        return [stored(*x, shape=shape) for x, shape in zip(arrays, shapes, strict=True)]

    def with_moment(self, leaves: Sequence[Stored], moment: PyTree) -> PyTree:
        """Return `moment` with new leaves."""
        if not _moments.is_in_trees(moment):
            return self.with_leaves(leaves, moment)
        old = zip(*(self.like("state", tree) for tree in moment), strict=True)
        arrays = [_moments.arrays_of(x, xs) for x, xs in zip(leaves, old, strict=True)]
        trees = [self.with_leaves([x[k] for x in arrays], t) for k, t in enumerate(moment)]
        return type(moment)(*trees)

    def _boxes(self, what: str, tree: PyTree) -> list[PyTree]:
        if tree is None:
            return [None] * len(self.leaves)
        try:
            return self.treedef.flatten_up_to(tree)
        except ValueError:
            raise errors.structure(what, self.tree, tree) from None


class _StepScalars(NamedTuple):
    """The scalars of a link in one step, shared by all leaves."""

    t: PyTree
    operands: dict[str, Value]
    counts: dict[str, PyTree]

    @classmethod
    def of(cls, link: Link, state: State, known: Mapping[str, PyTree]) -> _StepScalars:
        before = [getattr(state, name) for name in link.counts]
        counts = {n: optax.safe_increment(c) for n, c in zip(link.counts, before, strict=True)}
        operands = link.operands(before[0] if before else None, known)
        scalars = {name: getattr(state, name) for name in link.rule.scalars}
        return cls(next(iter(counts.values()), None), {**operands, **scalars}, counts)

    def cast(self, dtype: jax.typing.DTypeLike) -> dict[str, PyTree]:
        """Return the scalars, the hyperparameters, and the step `t` by name, in one dtype."""
        values = {**self.operands, **({} if self.t is None else {"t": self.t})}
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), values)


def _warn_if_nothing_is_lossy(name: str, link: Link, state: State, params: PyTree) -> None:
    """Warn if `storage` names a lossy format that fits no leaf.

    Under a mask, as in `groups`, don't warn: the format may fit a hidden leaf.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    masked = link.mask is not None or any(isinstance(x, optax.MaskedNode) for x in leaves)
    if masked or _policy.is_function(link.storage):
        return
    moments = [getattr(state, moment) for moment in link.rule.moments]
    in_trees = [m for m in moments if _moments.is_in_trees(m)]
    stored = [x for moment in in_trees for x in _moments.leaves(moment, params).values()]
    if stored and not any(map(_moments.is_lossy, stored)):
        warnings.warn(
            f"{name}: storage={_policy.describe_storage(link.storage)} must fit a leaf (real, at "
            f"least {MIN_SIZE} elements, with a last axis longer than 1 to be quantized, or two "
            f"axes to be reduced), but fits none of {len(leaves)} leaves; omit storage, or pass a "
            f"function that returns the format, storage=lambda path, leaf: ...",
            stacklevel=4,
        )


def _flags(mask: Mask, updates: PyTree) -> list[bool]:
    """Return one bool per leaf from an Optax mask, which is a prefix tree or a function."""
    tree = mask_tree(mask, updates)
    if tree is None and jax.tree.leaves(updates) and not jax.tree_util.all_leaves([updates]):
        raise errors.mask(tree, updates, no_tree=True)
    flags: list[bool] = []

    def spread(flag: PyTree, subtree: PyTree) -> None:
        if not (flag is None or isinstance(flag, (bool, np.bool_, jax.Array))):
            raise errors.mask(tree, updates, no_tree=True)
        flags.extend([bool(flag)] * len(jax.tree.leaves(subtree, is_leaf=_is_none)))

    try:
        jax.tree.map(spread, tree, updates, is_leaf=_is_none)
    except ValueError:
        raise errors.mask(tree, updates) from None
    return flags


def mask_tree(mask: Mask, tree: PyTree) -> PyTree:
    """Return the mask of a tree, by calling it if it is a function."""
    if not _is_mask_function(mask):
        return mask
    errors.mask_function(mask)
    return mask(tree)


def _is_mask_function(mask: Mask) -> TypeGuard[Callable[[optax.Updates], PyTree]]:
    """Whether a mask is a function rather than a callable tree, such as an Equinox module."""
    return callable(mask) and all(map(callable, jax.tree.leaves(mask)))


def _is_none(x: PyTree) -> bool:
    return x is None

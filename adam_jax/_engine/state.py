"""Optax's state classes, and functions that read the state of any chain."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.paths import search
from adam_jax._util.typing import KeyPath, PyTree
from adam_jax.storage import _moments
from adam_jax.storage._moments import Stored

State: TypeAlias = Any
"""The state of one transformation, a NamedTuple."""


def _state_of(tx: optax.GradientTransformation) -> type[State]:
    """Return the class of tx's state, which Optax doesn't export; nothing is computed."""
    return type(jax.eval_shape(tx.init, ()))


RmsCounted = _state_of(optax.scale_by_rms(bias_correction=True))
RStdDevCounted = _state_of(optax.scale_by_stddev(bias_correction=True))
NovogradState = _state_of(optax.scale_by_novograd())
WeightDecaySchedule = _state_of(optax.add_decayed_weights(lambda count: 0.0))

OPTAX_STATES: dict[type[State], tuple[str, ...]] = {
    optax.ScaleByAdamState: ("mu", "nu"),
    optax.ScaleByAmsgradState: ("mu", "nu", "nu_max"),
    optax.ScaleByBeliefState: ("mu", "nu"),
    optax.ScaleByLionState: ("mu",),
    optax.ScaleByAdanState: ("m", "v", "n", "g"),
    optax.ScaleByRmsState: ("nu",),
    RmsCounted: ("nu",),
    optax.ScaleByRStdDevState: ("mu", "nu"),
    RStdDevCounted: ("mu", "nu"),
    NovogradState: ("mu", "nu"),
    optax.TraceState: ("trace",),
    optax.contrib.ScaleByAdemamixState: ("m1", "m2", "nu"),
    optax.contrib.ScaleBySimplifiedAdEMAMixState: ("m", "n"),
    optax.contrib.ProdigyState: ("exp_avg", "exp_avg_sq", "grad_sum", "params0"),
}
"""The fields of Optax's states that are moments; other fields are step counts and scalars."""

_DEFAULTS: dict[tuple[str, ...], type[State]] = {
    ("mu",): optax.ScaleByLionState,
    ("nu",): RmsCounted,
    ("mu", "nu"): optax.ScaleByAdamState,
    ("mu", "nu", "nu_max"): optax.ScaleByAmsgradState,
}


def state_class(
    moments: tuple[str, ...], counted: bool, scalars: tuple[str, ...] = ()
) -> type[State]:
    """Return Optax's NamedTuple class with these moments and a step count, or make one.

    Without moments and scalars, the state has a step count only if `counted`.
    """
    if scalars:
        return _rule_state_class(moments, scalars)
    if not moments:
        return optax.ScaleByScheduleState if counted else optax.EmptyState
    return _DEFAULTS.get(moments) or _rule_state_class(moments, ())


@functools.cache
def _rule_state_class(moments: tuple[str, ...], scalars: tuple[str, ...]) -> type[State]:
    fields = [(name, PyTree) for name in ("count", *moments, *scalars)]
    made: PyTree = NamedTuple("ScaleByRuleState", fields)
    # pickle finds a class by its module and name, but this class isn't a module attribute
    made.__reduce__ = lambda self: (functools.partial(_remake, scalars=scalars), (moments, *self))
    made._moments = moments  # a field name can't begin with _
    return made


def _remake(moments: tuple[str, ...], *fields: PyTree, scalars: tuple[str, ...] = ()) -> PyTree:
    return _rule_state_class(moments, scalars)(*fields)


def moment_fields(state: PyTree) -> tuple[str, ...]:
    """Return the names of the moments in one transformation's state."""
    return getattr(type(state), "_moments", OPTAX_STATES.get(type(state), ()))


def count_fields(state: type[State], others: Iterable[str]) -> tuple[str, ...]:
    """Return the fields of a state class that count steps: all except moments and scalars."""
    return tuple(f for f in state._fields if f not in others)


def moments(state: PyTree) -> dict[str, PyTree]:
    """Return the moments in an optimizer's state as float32 trees, from any storage format.

    Args:
      state: the state of an adam_jax or Optax optimizer, or of a chain with one; also
        `nnx.Optimizer.opt_state`.

    Returns:
      a dict such as {"mu": tree, "nu": tree}. Each tree has the parameters' structure and shapes,
      in float32 (float64 and complex leaves keep their dtype). A `storage.mean` has size 1 along
      its axes, and NovoGrad's nu is a number per leaf.

    Raises:
      ValueError: the state has no moments, or several with one name; the error shows their paths.

    >>> import adam_jax, jax.numpy as jnp
    >>> tx = adam_jax.adamw(1e-3)
    >>> adam_jax.moments(tx.init({"w": jnp.ones(2)}))["nu"]
    {'w': Array([0., 0.], dtype=float32)}
    """
    found: dict[str, PyTree] = {}
    places: dict[str, list[str]] = {}
    for path, s in named_tuples(state):
        for name in moment_fields(s):
            found[name] = getattr(s, name)
            at = jax.tree_util.keystr(
                (*path, jax.tree_util.GetAttrKey(name)), simple=True, separator="/"
            )
            places.setdefault(name, []).append(at)
    several = [at for paths in places.values() if len(paths) > 1 for at in paths]
    if several or not found:
        raise ValueError(
            f"moments: the state must have one moment of each name, got "
            f"{'no moments' if not found else 'several'}"
            f"{' (' + ', '.join(several) + ')' if several else ''}; "
            f"pass the state of one optimizer with moments, e.g. state[0]"
        )
    return {name: _read(moment) for name, moment in found.items()}


def step_count(state: PyTree) -> jax.Array:
    """Return the number of steps that an optimizer has made, from its state or a chain's.

    Args:
      state: a state with a step count anywhere inside; also `nnx.Optimizer.opt_state`.

    Returns:
      an int32 scalar: the count next to the moments or, without one, the state's first count.

    Raises:
      ValueError: the state has no step count.

    >>> import adam_jax, jax.numpy as jnp
    >>> int(adam_jax.step_count(adam_jax.adam(1e-3).init({"w": jnp.ones(2)})))
    0
    """
    states = [s for _, s in named_tuples(state)]
    with_moments = [s for s in states if moment_fields(s)]
    for s in (*with_moments, *states):
        counts = [f for f in getattr(s, "_fields", ()) if f in ("count", "t", "step_count")]
        if counts:
            return jax.tree.leaves(getattr(s, counts[0]))[0]  # NNX puts it in a Variable
    raise ValueError(
        "step_count: the state must have a step count, got none (plain sgd has none); "
        "count in the training loop, or use optax.inject_hyperparams"
    )


def reset_step_count(state: PyTree, pattern: str | None = None) -> PyTree:
    """Return an optimizer's state with its step counts set to 0 and its moments unchanged.

    Bias correction restarts with old moments, so Adam's next step is (1 - b2)^½/(1 - b1) times as
    long, 0.32 by default. Larger gradients at a new target then don't cause a large step. Schedules
    of the moments' hyperparameters, such as b2, restart, too, except in `tunable` and
    `optax.inject_hyperparams`. Schedules of the learning rate and of weight decay continue, and so
    do the counts of wrappers such as `master_weights`. Exceptions: all schedules of `prodigy`
    restart, and so does the weight decay of `novograd`, as in Optax. Rules with a special first
    step (`adan`, `adopt`, `grokfast`, `novograd`) repeat it.
    Source: Ellis et al. (2024), Adam on Local Time (Adam-Rel): in reinforcement learning, reset the
    count whenever the target changes, such as at each new batch of rollouts in PPO.

    Args:
      state: the state of an adam_jax or Optax optimizer, or of a chain with one; also
        `nnx.Optimizer.opt_state`.
      pattern: a regular expression, searched in the labels of `groups` (or `optax.partition`), for
        the groups to reset; None for all.

    Returns:
      a state of the same types.

    Raises:
      ValueError: no step count is next to moments (plain sgd has none), no group matches, or the
        pattern isn't a regular expression.

    >>> import adam_jax, jax.numpy as jnp
    >>> tx, params = adam_jax.adam(1e-3), {"w": jnp.ones(2)}
    >>> _, state = tx.update(params, tx.init(params))
    >>> int(step_count(state)), int(step_count(reset_step_count(state)))
    (1, 0)
    """
    matches = None if pattern is None else search("reset_step_count", pattern)
    found: list[str] = []

    def reset(path: KeyPath, node: PyTree) -> PyTree:
        moments = moment_fields(node)
        others = count_fields(type(node), moments) if moments else ()
        counts = [name for name in others if _is_integer(getattr(node, name))]  # not Prodigy's d
        labels = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not counts or not (matches is None or any(map(matches, labels))):
            return node
        found.extend(counts)
        return node._replace(**{k: jax.tree.map(jnp.zeros_like, getattr(node, k)) for k in counts})

    new = jax.tree_util.tree_map_with_path(
        reset, state, is_leaf=lambda node: bool(moment_fields(node))
    )
    if not found:
        of, other = "", ""
        if pattern is not None:
            of, other = f" in a group whose label matches {pattern!r}", ", or another pattern"
        raise ValueError(
            f"reset_step_count: the state must have a step count next to moments{of}, got none; "
            f"pass the state of an optimizer such as adamw{other}"
        )
    return new


def _is_integer(count: PyTree) -> bool:
    return all(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(count))


def named_tuples(state: PyTree) -> list[tuple[KeyPath, State]]:
    """Return a state's NamedTuples and their paths, outermost first, except those in moments."""
    found = []

    def visit(path: KeyPath, node: PyTree) -> bool:
        if hasattr(node, "_fields"):
            found.append((path, node))
        return bool(moment_fields(node))

    jax.tree_util.tree_flatten_with_path(state, is_leaf=visit, is_leaf_takes_path=True)
    return found


def stored_moments(state: PyTree) -> Iterator[tuple[str, PyTree]]:
    """Yield the name and the stored tree of every moment in a state."""
    for _, s in named_tuples(state):
        for name in moment_fields(s):
            yield name, getattr(s, name)


def _read(moment: PyTree) -> PyTree:
    """Decode a moment to a tree of arrays."""

    def read(stored: Stored) -> jax.Array:
        return _moments.read(stored, arithmetic_dtype(*_moments.dtypes(stored)))

    tree = moment[0] if _moments.is_in_trees(moment) else moment
    return _moments.with_leaves(tree, [read(x) for x in _moments.leaves(moment).values()])

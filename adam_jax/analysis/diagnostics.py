"""Measurements of a running optimizer, kept in its state, and storage errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import rules
from adam_jax._engine import parts
from adam_jax._engine.hyperparams import Computed, evaluate
from adam_jax._engine.state import NovogradState, moment_fields, named_tuples, stored_moments
from adam_jax._engine.transformation import (
    Transformation,
    describe,
    is_exact,
    links_of,
    transformation_of,
)
from adam_jax._util import errors
from adam_jax._util.numerics import abs_sq, arithmetic_dtype, debias
from adam_jax._util.paths import Key, by_key, leaves_with_path, path_string, search
from adam_jax._util.typing import KeyPath, PyTree
from adam_jax.analysis import plotting
from adam_jax.analysis._table import text_table
from adam_jax.storage import _moments
from adam_jax.storage._formats import code_of
from adam_jax.storage._moments import Stored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDGES = 2.0 ** np.arange(-10, 3.5, 0.5)
"""The edges between signal-to-noise bins; the first bin starts at 0, and the last is open."""

NO_SIGNAL = {rules.adamax, rules.adopt, rules.laprop}
"""Rules whose nu isn't an average of squares, or whose mu is already divided by √nu."""

Measures: TypeAlias = dict[str, dict[str, jax.Array]]
"""Values by measure, then by group."""

Groups: TypeAlias = Mapping[str, Callable[[str], bool]]
"""By group, whether a path belongs to it."""

Settings: TypeAlias = dict[str, dict[str, PyTree]]
"""Hyperparameters by group of the optimizer."""

Leaves: TypeAlias = Mapping[Key, jax.Array]
"""Arrays by the key of their leaf."""

Sums: TypeAlias = dict[str, jax.Array]
"""Sums over the leaves of each group."""

Pair: TypeAlias = tuple[Mapping[Key, Stored], Mapping[Key, Stored], jax.Array]
"""Stored mu and nu by key, and the factor from mu²/nu to m̂²/v̂."""


class RecordState(NamedTuple):
    """The state of `record`. It holds only arrays, so any checkpointer can save it."""

    step: jax.Array
    """The number of updates made."""
    measured_at: jax.Array
    """The step of the values, counted from 1; 0 before the first."""
    values: Measures
    """Float32 scalars, or for a histogram, the shares in its bins."""
    inner_state: optax.OptState


def record(
    tx: optax.GradientTransformation, groups: Mapping[str, str] | None = None, every: int = 10
) -> Transformation:
    """Measure an optimizer's steps by parameter group, once in `every` updates.

    For each group, it records the norm of the gradient that `tx` receives (before clipping), the
    norm of the update divided by the norm of the weights, and, if the state has mu and nu, a
    histogram of |m̂|/√v̂. This ratio is near 1 if gradients agree from step to step, and near 0 if
    they are noise. It records the learning rate of each of `adam_jax.groups`, or of the whole `tx`.
    It doesn't change the updates.

    It reads the learning rate, b1, and b2 from adam_jax transformations, and from states that
    contain them (`tunable`, `optax.inject_hyperparams`). For others, and for `prodigy`, it records
    no learning rate and omits bias correction. All updates of a step are in memory at once, which
    isn't necessary otherwise. (`python -m benchmarks.diagnostics` measures the cost.)

    Args:
      tx: any whole optimizer with its clipping. Put `record` around it, and inside `zero1`,
        `optax.MultiSteps`, `optax.apply_if_finite`, and `master_weights`, whose updates include the
        rounding of the parameters.
      groups: by name, a regular expression, searched in paths such as "layers/0/kernel". Groups may
        overlap. By default, there is one group, "all".
      every: >= 1, the number of updates per measurement; the first update is measured.

    Returns:
      an Optax transformation whose state is a `RecordState` around the state of `tx`.

    Raises:
      ValueError: every is below 1; a group's pattern isn't a regular expression or, at init,
        matches no parameter; at update, params are missing.

    >>> import adam_jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = record(adam_jax.adamw(1e-3), groups={"kernels": "kernel"}, every=1)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> values = read(state)
    >>> values["gradient_norm/kernels"], round(values["update_ratio/kernels"], 6)
    (2.0, 0.001)
    """
    with errors.error_context("record"):
        errors.transformation("tx", tx, "record(tx)")
        errors.mapping("groups", groups or {}, "groups={'biases': 'bias'}")
        errors.integer_at_least(1, "every", every)
    every = int(every)  # a NumPy integer may change the dtype of the count
    patterns = groups or {"all": ""}
    searches = {name: search("record", p) for name, p in patterns.items()}
    inner = optax.with_extra_args_support(tx)
    # measure in two parts, so that the gradients can be freed before the second
    sum_gradients = _if_due(functools.partial(_squares, searches))
    sum_step = _if_due(functools.partial(_sum_step, searches))

    def init(params: optax.Params) -> RecordState:
        paths = [path for path, _ in _leaves(params)]
        for name, p in patterns.items():
            if paths and not any(map(searches[name], paths)):
                raise ValueError(
                    f"record: groups[{name!r}]={p!r} matches no parameter; the paths are "
                    f"{', '.join(paths[:8])}{', …' * (len(paths) > 8)}"
                )
        step, state = jnp.zeros([], jnp.int32), inner.init(params)
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        values = {
            "gradient_norm": {name: zeros([]) for name in searches},
            "learning_rate": {name: zeros([]) for name in _rates(_settings(tx, state, step))},
            "update_ratio": {name: zeros([]) for name in searches},
        }
        ratio = not NO_SIGNAL.intersection(link.rule for _, link in links_of(tx))
        if ratio and any(_has_mu_and_nu(s) for _, s in named_tuples(state)):
            values["signal_to_noise"] = {name: zeros(len(EDGES) + 1) for name in searches}
        return RecordState(step, jnp.zeros_like(step), values, state)

    def update(
        updates: optax.Updates,
        state: RecordState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, RecordState]:
        if params is None:
            raise ValueError(
                "record: params must be the weights, got None; "
                "pass them, tx.update(grads, state, params)"
            )
        with errors.error_context("record"):
            errors.made_by_init(state, RecordState)
        due = state.step % every == 0
        step = jnp.asarray(optax.safe_increment(state.step))
        after = dict(state.values)
        squares = sum_gradients(due, _leaves(updates))
        updates, new = inner.update(updates, state.inner_state, params, **extra)
        settings = _settings(tx, new, state.step)
        pairs = list(_pairs(new, settings, step)) if "signal_to_noise" in after else []
        sums = parts.total((squares, *sum_step(due, _leaves(updates), _leaves(params), pairs)))
        measured = {"learning_rate": _rates(settings), **_measures(*sums)}
        values = {k: _where(due, measured[k], last) for k, last in after.items()}
        return updates, RecordState(step, jnp.where(due, step, state.measured_at), values, new)

    text = f"record({describe(tx)}, every={every})"
    return transformation_of((tx,), init, update, text, exact=is_exact(tx))


def _if_due(measure: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Make a function of (due, *operands) that measures if due, else returns zeros."""

    def measured(due: jax.Array, *operands: PyTree) -> PyTree:
        types = jax.eval_shape(measure, *operands)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
        return jax.lax.cond(due, lambda: measure(*operands), lambda: zeros)

    return jax.jit(measured)


def _where(due: jax.Array, new: PyTree, last: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(due, x, y), new, last)


def _squares(groups: Groups, leaves: Leaves) -> Sums:
    return _sums(groups, {key: _square(x) for key, x in leaves.items()})


def _sum_step(
    groups: Groups, updates: Leaves, params: Leaves, pairs: list[Pair]
) -> tuple[Sums, Sums, Sums]:
    """Return the squares of updates and of weights, and the counts for a histogram."""
    counts = {key: _counts(mu[key], nu[key], scale) for mu, nu, scale in pairs for key in mu}
    histogram = _sums(groups, counts, len(EDGES) + 2) if pairs else {}
    return _squares(groups, updates), _squares(groups, params), histogram


def _measures(gradients: Sums, updates: Sums, weights: Sums, counts: Sums) -> Measures:
    """Return the values of sums over all parameters."""
    return {
        "gradient_norm": jax.tree.map(jnp.sqrt, gradients),
        "update_ratio": jax.tree.map(
            lambda u, p: jnp.where(u > 0, jnp.sqrt(u) / jnp.sqrt(p), 0),  # inf if weights are 0
            updates,
            weights,
        ),
        "signal_to_noise": {
            name: (x[:-1] - x[1:]) / jnp.maximum(x[0], 1) for name, x in counts.items()
        },
    }


@jax.jit  # one trace for all leaves of a shape
def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(abs_sq(x.astype(arithmetic_dtype(x.dtype)))).astype(jnp.float32)


def _sums(groups: Groups, values: Leaves, *shape: int) -> Sums:
    """Return the sum over the leaves of each group."""
    zero = jnp.zeros(shape, jnp.float32)
    return {
        name: sum((x for (path, _), x in values.items() if contains(path)), zero)
        for name, contains in groups.items()
    }


@jax.jit
def _counts(mu: Stored, nu: Stored, scale: jax.Array) -> jax.Array:
    """Return the element count, the counts above each edge of |m̂|/√v̂, and a 0."""
    m, v = _decoded(mu), _decoded(nu)
    square = abs_sq(m) * scale.astype(v.dtype)
    above = [(square > v * edge**2).astype(jnp.int32) for edge in EDGES.tolist()]

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [x + y for x, y in zip(a, b, strict=True)]

    # one reduction for all edges reads the moments once, and XLA stores none of its operands
    zeros = [jnp.int32(0)] * len(above)
    counts = jax.lax.reduce(above, zeros, add, tuple(range(v.ndim)))
    return jnp.stack([jnp.float32(v.size), *counts, jnp.float32(0)], dtype=jnp.float32)


def _settings(tx: optax.GradientTransformation, state: PyTree, count: jax.Array) -> Settings:
    """Return the known learning rates, b1, and b2 of a step, by group of the optimizer.

    `count` is the number of earlier steps. Values in a state are from its last step.
    """
    carriers = [(label or "all", link.hyperparams) for label, link in links_of(tx)]
    carriers += [(_label(path), getattr(s, "hyperparams", {})) for path, s in named_tuples(state)]
    found: Settings = {}
    for label, values in carriers:
        known = {k: values[k] for k in ("learning_rate", "b1", "b2") if k in values}
        known = {k: v for k, v in known.items() if not isinstance(v, Computed)}
        found.setdefault(label, {}).update(evaluate(known, count))
    return found


def _label(path: KeyPath) -> str:
    """Return the optimizer group of a part of the state."""
    return next((str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)), "all")


def _rates(settings: Settings) -> dict[str, jax.Array]:
    return {
        label: jnp.asarray(values["learning_rate"], jnp.float32)
        for label, values in settings.items()
        if "learning_rate" in values
    }


def _pairs(state: PyTree, settings: Settings, step: jax.Array) -> Iterator[Pair]:
    t = step.astype(jnp.float32)
    for path, s in named_tuples(state):
        if _has_mu_and_nu(s):
            own = settings.get(_label(path), {})
            known = "b1" in own and "b2" in own
            scale = debias(1.0, own["b1"], t) ** 2 / debias(1.0, own["b2"], t) if known else 1.0
            mu, nu = (parts.own(_moments.leaves(moment)) for moment in (s.mu, s.nu))
            yield mu, nu, jnp.asarray(scale, jnp.float32)


def _has_mu_and_nu(state: PyTree) -> bool:
    per_element = not isinstance(state, NovogradState)
    return {"mu", "nu"} <= set(moment_fields(state)) and per_element


def _leaves(tree: PyTree) -> Leaves:
    """Return the floating-point leaves by their keys."""
    leaves = parts.own(by_key(tree)).items()
    return {key: x for key, x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)}


def read(state: PyTree) -> dict[str, Any]:
    """Return the last measurements of `record` as a flat dict for any logger.

    Args:
      state: a state that contains the state of `record`; also `nnx.Optimizer.opt_state`.

    Returns:
      "step" (from 1; 0 before the first), "learning_rate/all" (or one for each of
      `adam_jax.groups`), "gradient_norm/<group>", and "update_ratio/<group>" as numbers, and
      "signal_to_noise/<group>": the float32 shares of elements in `EDGES`'s `len(EDGES) + 1` bins.

    Raises:
      ValueError: the state has no measurements, or measurements of several `record`s.
    """
    found = [s for _, s in named_tuples(state) if isinstance(s, RecordState)]
    if len(found) != 1:
        raise ValueError(
            f"read: the state must have the measurements of one diagnostics.record, got "
            f"{len(found)}; wrap the optimizer once, tx = diagnostics.record(tx)"
        )
    trees = {"step": found[0].measured_at}, found[0].values
    leaves = [(path_string(path), x) for tree in trees for path, x in leaves_with_path(tree)]
    return {name: x if x.ndim else x.item() for name, x in jax.device_get(leaves)}


def plot(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw learning rates, norms, ratios, and signal-to-noise over the steps.

    Args:
      history: the results of `read` during training.

    Returns:
      a Matplotlib figure on a white background: `figure.savefig("diagnostics.png")`.

    Raises:
      ValueError: there is nothing to draw.
      ModuleNotFoundError: Matplotlib is missing.
    """
    rows = {row["step"]: row for row in history if row["step"] > 0}
    if not rows:
        raise ValueError("plot: history has no measurements; append diagnostics.read(state) to it")
    series: dict[str, dict[str, np.ndarray]] = {}
    for key in next(iter(rows.values())):
        measure, _, group = key.partition("/")
        series.setdefault(measure, {})[group] = np.stack([row[key] for row in rows.values()])
    return plotting.draw_diagnostics(series.pop("step")[""], series, EDGES)


class StorageError(NamedTuple):
    """The storage error of one leaf of one moment."""

    moment: str
    leaf: str
    kept_in: str
    error: float | None
    """The RMS error relative to the RMS of the exact moment; None without `exact`."""
    zeros: float
    """The share of elements that are stored as 0."""
    saturated: float
    """The share of codes at the ends of their range, including each block's maximum."""


class StorageErrors(tuple[StorageError, ...]):
    """A row for each leaf of each moment; print it for the table."""

    def __str__(self) -> str:
        rows = [("", "leaf", "kept in", "error", "zeros", "ends")]
        for row in self:
            error = "" if row.error is None else f"{row.error:.2e}"
            shares = f"{row.zeros:.2%}", f"{row.saturated:.2%}"
            rows.append((row.moment, row.leaf, row.kept_in, error, *shares))
        return text_table(rows, "<8 <0 <10 >9 >7 >7")


def storage_error(state: PyTree, exact: PyTree = None) -> StorageErrors:
    """Compare the moments in a state with exact moments, and count zero and saturated codes.

    To see the effect of a format on a running state, convert the state:
    `storage_error(convert_state(state, tx_int8, params), state)`.

    Args:
      state: the state of an optimizer, in any storage; also `nnx.Optimizer.opt_state`.
      exact: the state of the same optimizer after the same gradients in float32 (or another
        storage), to compare with.

    Returns:
      a `StorageErrors`: a row for each leaf of each moment; it prints as a table.

    Raises:
      ValueError: a state has no moments, or the moments differ between states.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> grads = {"w": jax.random.normal(jax.random.key(0), (64, 128))}
    >>> run = lambda tx: tx.update(grads, tx.init(grads))[1]
    >>> coded, exact = (run(adam_jax.adam(1e-3, storage=s)) for s in ("int8", "float32"))
    >>> [f"{row.moment} {row.kept_in} {row.error:.0e}" for row in storage_error(coded, exact)]
    ['mu int8 1e-02', 'nu uint8 5e-03']
    """
    kept = _by_leaf(state)
    right = dict.fromkeys(kept) if exact is None else _by_leaf(exact)
    if right.keys() != kept.keys():
        only = ", ".join("/".join(key[:2]) for key in sorted(right.keys() ^ kept.keys())[:8])
        raise ValueError(
            f"storage_error: one of the states has no {only}; pass states of the same parameters"
        )
    return StorageErrors(
        StorageError(*key[:2], *_errors(stored, right[key])) for key, stored in kept.items()
    )


def _by_leaf(state: PyTree) -> dict[tuple[str, str, int], Stored]:
    """Return the stored leaves, by moment and key."""
    found = {
        (name, *key): stored
        for name, moment in stored_moments(state)
        for key, stored in _moments.leaves(moment).items()
    }
    if not found:
        raise ValueError("storage_error: the state must have moments, got no moments")
    return found


def _decoded(stored: Stored) -> jax.Array:
    return _moments.read(stored, arithmetic_dtype(*_moments.dtypes(stored)))


def _errors(stored: Stored, exact: Stored | None) -> tuple[str, float | None, float, float]:
    x = _decoded(stored)
    error = None
    if exact is not None:
        right = _moments.read(exact, x.dtype)
        square = jnp.mean(abs_sq(right))
        error = float(jnp.sqrt(jnp.mean(abs_sq(x - right)) / jnp.where(square > 0, square, 1)))
    codes = _moments.first_array(stored)
    ends = 0.0
    code = code_of(codes.dtype)
    if code is not None:
        ends = float(jnp.mean(jnp.abs(code.decode(codes)) == 1))
    return str(codes.dtype), error, float(jnp.mean(x == 0)), ends

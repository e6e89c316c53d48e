"""What an optimizer is doing: measures kept in its state, and what storage costs in exactness."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import rules, storage
from adam_jax._engine import hyperparams
from adam_jax._engine.state import moment_fields, named_tuples, stored_moments
from adam_jax._engine.transformation import Transformation, is_last, labelled_parts, made_of, told
from adam_jax._util import errors
from adam_jax._util.declare import Rule
from adam_jax._util.numerics import abs_sq, arithmetic_dtype, debias
from adam_jax._util.paths import Key, by_key, search
from adam_jax.analysis.compare import looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGES = 2.0 ** np.arange(-10, 3.5, 0.5)
"""Of the bins of signal-to-noise; the first bin is all below (and 0), the last all above."""

NO_SIGNAL = {rules.adamax, rules.adopt, rules.laprop}
"""Their nu is no average of squares, or their mu has been divided by its root already."""


class RecordState(NamedTuple):
    """The state of `record`: arrays only, so that it is saved and restored as any other."""

    step: jax.Array
    """Updates made."""
    measured_at: jax.Array
    """The step, counted from 1, that the values are of; 0 before the first."""
    values: dict[str, dict[str, jax.Array]]
    """By measure, then by group: float32 scalars, and shares in bins for a histogram."""
    inner_state: optax.OptState


def record(
    tx: optax.GradientTransformation, groups: Mapping[str, str] | None = None, every: int = 10
) -> Transformation:
    """Measures, at every so many updates, what an optimizer does to groups of parameters.

    Per group: the norm of the gradient as `tx` is given it (before clipping), the norm of the
    update over that of the weights, and how |m̂|/√v̂ is spread (where the state has mu and nu):
    near 1 gradients agree from step to step, near 0 they are noise. Per group of `tx`
    (`adam_jax.groups`, or all): the learning rate. The updates are those of `tx`.

    Learning rate, b1 and b2 are looked up in our transformations and in states that carry them
    (`tunable`, `optax.inject_hyperparams`). Elsewhere there is no learning rate, and the moments
    are taken as they are, without bias correction. While a step runs, its updates lie in memory
    as a whole, which they need not do otherwise. (`python -m benchmarks.diagnostics` has the cost.)

    Args:
      tx: the whole optimizer with its clipping, ours or another. `record` goes around it, and
        inside of `zero1`, `optax.MultiSteps`, `optax.apply_if_finite` and `master_weights`, whose
        own updates are those of rounded parameters.
      groups: by name, a regular expression, searched in paths such as "layers/0/kernel". Groups may
        overlap. By default one, "all".
      every: >= 1, updates between two measurements; the first update is measured.

    Returns:
      an Optax transformation whose state is `RecordState`, around that of `tx`.

    Raises:
      ValueError: every is below 1; a group's pattern is no regular expression or, at init, finds
        no parameter; at update, there are no params.

    >>> import adam_jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = record(adam_jax.adamw(1e-3), groups={"kernels": "kernel"}, every=1)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> values = read(state)
    >>> values["gradient_norm/kernels"], round(values["update_ratio/kernels"], 6)
    (2.0, 0.001)
    """
    with errors.naming("record"):
        errors.transformation("tx", tx, "record(tx)")
        errors.mapping("groups", groups or {}, "groups={'biases': 'bias'}")
    patterns = tuple((groups or {"all": ""}).items())
    searches = {name: search("record", p) for name, p in patterns}
    if not (isinstance(every, int) and every >= 1):
        raise ValueError(f"record: every must be an integer >= 1, got {every!r}")
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> RecordState:
        paths = [path for path, _ in _leaves(params)]
        for name, p in patterns:
            if paths and not any(map(searches[name], paths)):
                raise ValueError(
                    f"record: groups[{name!r}]={p!r} matches no parameter; the paths are "
                    f"{', '.join(paths[:8])}{', …' * (len(paths) > 8)}"
                )
        count: Any = jnp.zeros([], jnp.int32)
        state = inner.init(params)
        names = {
            "gradient_norm": searches,
            "learning_rate": _rates(_settings(tx, state, count)),
            "update_ratio": searches,
        }
        values = {measure: {name: _zeros() for name in of} for measure, of in names.items()}
        if _has_signal(tx, state):
            values["signal_to_noise"] = {name: _zeros(len(EDGES) + 1) for name in searches}
        return RecordState(count, jnp.zeros_like(count), values, state)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, RecordState]:
        if params is None:
            raise ValueError(
                "record: an update is measured by the size of its weights; "
                "pass them, tx.update(grads, state, params)"
            )
        due = state.step % every == 0
        step: Any = optax.safe_increment(state.step)
        after = dict(state.values)
        # in two parts, so that gradients need not outlive the step
        norms = _norms_if(due, after.pop("gradient_norm"), _leaves(updates), groups=patterns)
        updates, new = inner.update(updates, state.inner_state, params, **extra)
        settings = _settings(tx, new, state.step)
        pairs = list(_pairs(new, settings, step)) if "signal_to_noise" in after else []
        given = _rates(settings), _leaves(updates), _leaves(params), pairs
        values = {"gradient_norm": norms, **_rest_if(due, after, *given, groups=patterns)}
        at: Any = jnp.where(due, step, state.measured_at)
        return updates, RecordState(step, at, values, new)

    text = f"record({told(tx)}, every={every})"
    return made_of((tx,), init, update, text, last=is_last(tx))


Groups: TypeAlias = tuple[tuple[str, str], ...]
"""Names and patterns."""


@functools.partial(jax.jit, static_argnames="groups")
def _norms_if(due: Any, last: Any, leaves: dict[Key, Any], *, groups: Groups) -> Any:
    """The norms of groups of leaves where they are due, else the last ones."""
    return jax.lax.cond(due, lambda: _norms(groups, leaves), lambda: last)


@functools.partial(jax.jit, static_argnames="groups")
def _rest_if(
    due: Any, last: Any, rates: Any, updates: Any, params: Any, pairs: Any, *, groups: Groups
) -> Any:
    """What is measured after a step where it is due, else the last values."""

    def measure() -> Any:
        values = {
            "learning_rate": rates,
            "update_ratio": jax.tree.map(
                lambda u, p: jnp.where(u > 0, u / p, 0),  # inf for weights that are all 0
                _norms(groups, updates),
                _norms(groups, params),
            ),
        }
        return values | ({"signal_to_noise": _spread(groups, pairs)} if pairs else {})

    return jax.lax.cond(due, measure, lambda: last)


def _norms(groups: Groups, leaves: dict[Key, Any]) -> dict[str, jax.Array]:
    squares = {key: _square(x) for key, x in leaves.items()}
    return {name: jnp.sqrt(sum(_of(p, squares), _zeros())) for name, p in groups}


@jax.jit  # one trace for all leaves of a shape
def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(abs_sq(x.astype(arithmetic_dtype(x.dtype)))).astype(jnp.float32)


def _spread(groups: Groups, pairs: Any) -> dict[str, jax.Array]:
    """The shares of elements in each bin of |m̂|/√v̂."""
    counts: dict[Key, Any] = {}
    for mu, nu, scale in pairs:
        counts |= {key: _counts(mu[key], nu[key], scale) for key in mu}
    totals = {name: sum(_of(p, counts), _zeros(len(EDGES) + 2)) for name, p in groups}
    return {name: (x[:-1] - x[1:]) / jnp.maximum(x[0], 1) for name, x in totals.items()}


@jax.jit
def _counts(mu: Any, nu: Any, scale: jax.Array) -> jax.Array:
    """How many elements there are, how many above each edge, and 0."""
    m, v = (storage.decode(x, arithmetic_dtype(*storage.dtypes(x))) for x in (mu, nu))
    square = abs_sq(m) * scale.astype(v.dtype)
    above = [(square > v * edge**2).astype(jnp.int32) for edge in EDGES.tolist()]
    zeros = [jnp.int32(0)] * len(above)
    # one reduction for all edges: a single pass, and XLA writes none of its operands
    add: Any = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]  # noqa: E731
    counts = jax.lax.reduce(above, zeros, add, tuple(range(v.ndim)))
    return jnp.stack([jnp.float32(v.size), *counts, jnp.float32(0)], dtype=jnp.float32)


def _settings(tx: Any, state: Any, count: Any) -> dict[str, dict[str, Any]]:
    """Learning rate, b1 and b2 of a step, by the optimizer's own groups, as far as they are known.

    `count` is the number of steps before it; a state that carries them has those of its last step.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, link in labelled_parts(tx):
        known = {k: link.hyperparams[k] for k in _asked(link.rule) if k in link.hyperparams}
        found.setdefault(label or "all", {}).update(hyperparams.operands(known, count))
    for path, s in named_tuples(state):
        carried = getattr(s, "hyperparams", {})
        known = {k: carried[k] for k in ("learning_rate", "b1", "b2") if k in carried}
        found.setdefault(_label(path), {}).update(hyperparams.operands(known, count))
    return found


def _asked(rule: Rule) -> tuple[str, ...]:
    return ("learning_rate",) if rule is rules.descend else ("b1", "b2") if rule.moments else ()


def _label(path: tuple[Any, ...]) -> str:
    """The group of an optimizer that a part of its state belongs to."""
    keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    return keys[0] if keys else "all"


def _rates(settings: dict[str, dict[str, Any]]) -> dict[str, jax.Array]:
    return {
        label: jnp.asarray(values["learning_rate"], jnp.float32)
        for label, values in settings.items()
        if "learning_rate" in values
    }


def _pairs(state: Any, settings: dict[str, dict[str, Any]], step: jax.Array) -> Iterator[Any]:
    """mu and nu by path, as they are stored, with what makes (mu/√nu)² that of m̂/√v̂."""
    t = step.astype(jnp.float32)
    for path, s in named_tuples(state):
        if _is_pair(s):
            own = settings.get(_label(path), {})
            known = "b1" in own and "b2" in own
            scale = debias(1.0, own["b1"], t) ** 2 / debias(1.0, own["b2"], t) if known else 1.0
            yield storage.leaves(s.mu), storage.leaves(s.nu), jnp.asarray(scale, jnp.float32)


def _has_signal(tx: Any, state: Any) -> bool:
    parts = [link.rule for _, link in labelled_parts(tx)]
    return not set(parts) & NO_SIGNAL and any(_is_pair(s) for _, s in named_tuples(state))


def _is_pair(state: Any) -> bool:
    return {"mu", "nu"} <= set(moment_fields(state))


def _leaves(tree: Any) -> dict[Key, Any]:
    """Return the floating-point leaves by their keys."""
    leaves = by_key(tree).items()
    return {key: x for key, x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)}


def _of(pattern: str, leaves: dict[Key, Any]) -> list[Any]:
    return [x for (path, _), x in leaves.items() if re.search(pattern, path)]


def _zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def read(state: chex.ArrayTree) -> dict[str, Any]:
    """What `record` measured last, as a flat dict for any logger.

    Args:
      state: a state with `record`'s anywhere inside; also `nnx.Optimizer.opt_state`.

    Returns:
      "step" (from 1; 0 before the first), "learning_rate/all", "gradient_norm/<group>" and
      "update_ratio/<group>" as numbers, and "signal_to_noise/<group>": float32, the shares of
      elements in the bins between `EDGES`.

    Raises:
      ValueError: the state has no measures, or several `record`s'.
    """
    found: list[Any] = [s for _, s in named_tuples(state) if isinstance(s, RecordState)]
    if len(found) != 1:
        raise ValueError(
            f"read: the state must have the measures of one diagnostics.record, it has those of "
            f"{len(found)}; wrap the optimizer, tx = diagnostics.record(tx), once"
        )
    at, values = jax.device_get((found[0].measured_at, found[0].values))
    flat = {
        f"{measure}/{group}": jax.tree.leaves(x)[0]  # nnx keeps it in a Variable
        for measure, groups in values.items()
        for group, x in groups.items()
    }
    numbers = {"step": jax.tree.leaves(at)[0], **flat}
    return {name: x if np.ndim(x) else x.item() for name, x in numbers.items()}


def plot(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws learning rates, norms, ratios and signal-to-noise over the steps.

    Args:
      history: what `read` returned, again and again during training.

    Returns:
      a Matplotlib figure, on white whatever the style: `figure.savefig("diagnostics.png")`.

    Raises:
      ValueError: there is nothing to draw.
      ModuleNotFoundError: Matplotlib is missing.
    """
    rows = {row["step"]: row for row in history if row["step"] > 0}
    if not rows:
        raise ValueError("plot: history has no measurements; append diagnostics.read(state) to it")
    with errors.needing_extra("plot"):
        from matplotlib import style
        from matplotlib.figure import Figure
    series: dict[str, dict[str, np.ndarray]] = {}
    for key in next(iter(rows.values())):
        measure, _, group = key.partition("/")
        if group:
            series.setdefault(measure, {})[group] = np.stack([row[key] for row in rows.values()])
    spread = series.pop("signal_to_noise", {})
    series = {measure: series[measure] for measure in UNITS if measure in series}
    with style.context("default"):
        size = (3.8 * max(len(series), len(spread)), 6.4 if spread else 3.2)
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        parts = figure.subfigures(2 if spread else 1, squeeze=False)[:, 0]
        panels = parts[0].subplots(1, len(series), squeeze=False)[0]
        for axes, (measure, lines) in zip(panels, series.items(), strict=True):
            _draw_lines(axes, measure, np.array(list(rows)), lines)
        if spread:
            _draw_spread(parts[1], np.array(list(rows)), spread)
        figure.draw_without_rendering()  # ticks take their style when they are made
    return figure


UNITS = {
    "learning_rate": "learning rate η",
    "gradient_norm": "norm of the gradient",
    "update_ratio": "‖update‖ / ‖weights‖",
}


def _draw_lines(
    axes: Axes, measure: str, steps: np.ndarray, lines: Mapping[str, np.ndarray]
) -> None:
    for (group, values), look in zip(lines.items(), looks(), strict=False):
        positive = (values > 0) & np.isfinite(values)  # of what a logarithm can show
        axes.plot(steps, np.where(positive, values, np.nan), label=group, **look)
    axes.set(xlabel="step", ylabel=UNITS[measure], yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_spread(part: Any, steps: np.ndarray, spread: Mapping[str, np.ndarray]) -> None:
    """A picture for each group: the histogram over the steps."""
    panels = part.subplots(1, len(spread), sharey=True, squeeze=False)[0]
    # the first steps, where all are near 1, would leave the rest in the dark
    top = max(float(np.quantile(shares.max(axis=1), 0.9)) for shares in spread.values())
    bins = np.array([EDGES[0] / 2**0.5, *EDGES, EDGES[-1] * 2**0.5])
    ends = np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)
    drawn = None
    for axes, (group, shares) in zip(panels, spread.items(), strict=True):
        drawn = axes.pcolormesh(ends, bins, shares.T, vmin=0, vmax=top)
        axes.set(title=group, xlabel="step", yscale="log")
    panels[0].set_ylabel("|m̂| / √v̂")
    part.colorbar(drawn, ax=panels, label="share of elements")


class StorageError(NamedTuple):
    """What storage does to one leaf of one moment."""

    moment: str
    leaf: str
    kept_in: str
    error: float | None
    """The root of the mean squared error over that of the mean square; None without `exact`."""
    zeros: float
    """The share of elements that are kept as 0."""
    saturated: float
    """The share of codes at the end of their range; each block's largest value is there."""


class StorageErrors(tuple[StorageError, ...]):
    """Rows for each leaf of each moment; print it for the table."""

    def __str__(self) -> str:
        width = max((len(row.leaf) for row in self), default=0)
        lines = [f"{'':<8} {'leaf':<{width}} {'kept in':<10} {'error':>9} {'zeros':>7} {'ends':>7}"]
        for row in self:
            error = "" if row.error is None else f"{row.error:.2e}"
            lines.append(
                f"{row.moment:<8} {row.leaf:<{width}} {row.kept_in:<10} {error:>9} "
                f"{row.zeros:>7.2%} {row.saturated:>7.2%}"
            )
        return "\n".join(lines)


def storage_error(state: chex.ArrayTree, exact: chex.ArrayTree | None = None) -> StorageErrors:
    """How far the moments in a state are from exact ones, and where their codes end.

    To know what a format would do to a running state, convert it:
    `storage_error(convert_state(state, tx_int8, params), state)`.

    Args:
      state: the state of an optimizer, in any storage; also `nnx.Optimizer.opt_state`.
      exact: the state of the same optimizer after the same gradients in float32 (or another
        storage): what to compare with.

    Returns:
      a `StorageErrors`: a row for each leaf of each moment; it prints as a table.

    Raises:
      ValueError: a state has no moments, or the two have different ones.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> grads = {"w": jax.random.normal(jax.random.key(0), (64, 128))}
    >>> run = lambda tx: tx.update(grads, tx.init(grads))[1]
    >>> coded, exact = (run(adam_jax.adam(1e-3, storage=s)) for s in ("int8", "float32"))
    >>> [f"{row.moment} {row.kept_in} {row.error:.0e}" for row in storage_error(coded, exact)]
    ['mu int8 1e-02', 'nu uint8 5e-03']
    """
    kept, right = _by_leaf(state), None if exact is None else _by_leaf(exact)
    if right is not None and right.keys() != kept.keys():
        only = ", ".join("/".join(key[:2]) for key in sorted(right.keys() ^ kept.keys())[:8])
        raise ValueError(f"storage_error: one of the two states has no {only}")
    return StorageErrors(
        StorageError(*key[:2], *_errors(stored, None if right is None else right[key]))
        for key, stored in kept.items()
    )


def _by_leaf(state: Any) -> dict[tuple[str, str, int], Any]:
    """Return what is stored, by moment and key of the leaf."""
    found = {
        (name, *key): stored
        for name, moment in stored_moments(state)
        for key, stored in storage.leaves(moment).items()
    }
    if not found:
        raise ValueError("storage_error: the state holds no moments")
    return found


def _errors(stored: Any, exact: Any) -> tuple[str, float | None, float, float]:
    x = storage.decode(stored, arithmetic_dtype(*storage.dtypes(stored)))
    error = None
    if exact is not None:
        right = storage.decode(exact, x.dtype)
        square = jnp.mean(abs_sq(right))
        error = float(jnp.sqrt(jnp.mean(abs_sq(x - right)) / jnp.where(square > 0, square, 1)))
    codes = storage.codes_of(stored)
    ends = 0.0
    if storage.is_coded(stored):
        ends = float(jnp.mean(jnp.abs(storage.CODES[codes.dtype].decode(codes)) == 1))
    return str(codes.dtype), error, float(jnp.mean(x == 0)), ends

"""Optimizers against each other on a user's own problem: learning rate × seed in one program."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._util import errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHUNKS = 20  # in which a run is cut, so that the bar moves and the step time has a median

# Okabe & Ito's colours, which the colour-blind can tell apart; without their yellow, which
# disappears on white. Dashes carry on where the colours end.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")


def looks() -> Iterator[dict[str, Any]]:
    """How to draw one line after the other."""
    each = ({"color": c, "ls": d} for d, c in itertools.product(DASHES, COLOURS))
    return itertools.cycle(each)


@dataclasses.dataclass(frozen=True)
class Best:
    """What an optimizer reached at its best learning rate."""

    index: int  # into the learning rates
    learning_rate: float
    mean: float  # of the final losses over the seeds
    deviation: float  # their standard deviation; NaN for one seed


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` measured; print it for the table.

    Attributes:
      losses: by name, the training losses as an array [learning rate, seed, step].
      learning_rates: as they were given.
      seeds: as they were given.
      state_bytes: by name, the size of one run's optimizer state.
      seconds: by name, the median time of a step of all runs together, compilation left out.
    """

    losses: Mapping[str, np.ndarray]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    state_bytes: Mapping[str, int]
    seconds: Mapping[str, float]

    def final(self, name: str) -> np.ndarray:
        """The mean losses of the last tenth of the steps, [learning rate, seed]; inf if diverged.

        Args:
          name: an optimizer's, as `compare` was given it.
        """
        losses = self.losses[name]
        last = losses[..., -max(1, losses.shape[-1] // 10) :].mean(axis=-1)
        return np.where(np.isfinite(last), last, np.inf)

    def best(self, name: str) -> Best | None:
        """The learning rate with the lowest final loss in the mean over the seeds.

        Args:
          name: an optimizer's, as `compare` was given it.

        Returns:
          the learning rate and its final loss; None where each has a seed that diverged.
        """
        final = self.final(name)
        index = int(final.mean(axis=1).argmin())
        if not np.isfinite(final[index]).all():
            return None
        mean, deviation = float(final[index].mean()), _deviation(final[index])
        return Best(index, self.learning_rates[index], mean, float(deviation))

    def table(self) -> str:
        """One line for each optimizer: best learning rate, final loss, state, time, remarks."""
        runs = len(self.learning_rates) * len(self.seeds)
        header = ("", "best η", "final loss", "state", f"step of {runs} runs")
        rows = [header, *(self._row(name) for name in self.losses)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{row[0]:<{widths[0]}}"
            + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        remarks = ["", *map(self._remarks, self.losses)]
        lines = [f"{a}  {b}".rstrip() for a, b in zip(lines, remarks, strict=True)]
        return "\n".join([*lines, "", self._legend()])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.losses)}>"

    def plot(self) -> Figure:
        """Draws the final losses over the learning rates, and the losses at the best one.

        Returns:
          a Matplotlib figure, on white whatever the style: `figure.savefig("compare.png")`.

        Raises:
          ModuleNotFoundError: Matplotlib is missing.
        """
        with errors.needing_extra("compare: plot"):
            from matplotlib import style
            from matplotlib.figure import Figure
        with style.context("default"):
            figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
            left, right = figure.subplots(1, 2)
            for name, look in zip(self.losses, looks(), strict=False):
                self._draw_rates(left, name, look)
                self._draw_curve(right, name, look)
            self._finish(left, right)
            figure.draw_without_rendering()  # ticks take their style when they are made
        return figure

    def _row(self, name: str) -> tuple[str, ...]:
        best = self.best(name)
        rate, loss = "—", "diverged"
        if best is not None:
            rate, loss = f"{best.learning_rate:g}", f"{best.mean:.4g}"
            if not math.isnan(best.deviation):
                loss += f" ± {best.deviation:.1g}"
        return name, rate, loss, f"{self.state_bytes[name]:,} bytes", _time(self.seconds[name])

    def _remarks(self, name: str) -> str:
        final, best = self.final(name), self.best(name)
        rates = self.learning_rates
        remarks = []
        if best and len(set(rates)) > 1 and best.learning_rate in (min(rates), max(rates)):
            remarks.append("at the edge: widen learning_rates")
        if diverged := int(np.isinf(final).sum()):
            remarks.append(f"{diverged} of {final.size} runs diverged")
        return "; ".join(remarks)

    def _legend(self) -> str:
        steps = next(iter(self.losses.values())).shape[-1]
        last = max(1, steps // 10)
        mean = "s.d. over" if len(self.seeds) > 1 else "no s.d.:"
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        return (
            f"final loss: mean of the last {last} of {steps} steps, ± {mean} {seeds}; "
            f"η from {min(self.learning_rates):g} to {max(self.learning_rates):g}"
        )

    def _draw_rates(self, axes: Axes, name: str, look: Mapping[str, Any]) -> None:
        order = np.argsort(self.learning_rates)
        rates, final = np.array(self.learning_rates)[order], self.final(name)[order]
        diverged = np.asarray(np.isinf(final).any(axis=1))
        mean = np.where(diverged, np.nan, final.mean(axis=1))
        axes.plot(rates, mean, marker="o", ms=4, label=name, **look)
        if len(self.seeds) > 1:
            _band(axes, rates, mean, _deviation(np.where(diverged[:, None], np.nan, final)), look)
        axes.plot(
            rates[diverged],
            0.97 + 0 * rates[diverged],
            "x",
            color=look["color"],
            transform=axes.get_xaxis_transform(),
        )

    def _draw_curve(self, axes: Axes, name: str, look: Mapping[str, Any]) -> None:
        best = self.best(name)
        if best is None:
            axes.plot([], [], label=f"{name}: diverged", **look)
            return
        losses = _smooth(self.losses[name][best.index], self._window)
        steps = np.arange(self._window, self._window + losses.shape[-1])
        axes.plot(steps, losses.mean(axis=0), label=f"{name}, η = {best.learning_rate:g}", **look)
        if len(self.seeds) > 1:
            _band(axes, steps, losses.mean(axis=0), _deviation(losses.T), look)

    @property
    def _window(self) -> int:
        return max(1, next(iter(self.losses.values())).shape[-1] // 50)

    def _finish(self, left: Axes, right: Axes) -> None:
        over = f", mean ± s.d. over {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        window = f", running mean of {self._window} steps" if self._window > 1 else ""
        left.set(xscale="log", xlabel="learning rate η", ylabel="final training loss")
        left.set_title(f"Final loss (×: diverged){over}", fontsize=10)
        right.set(xlabel="step", ylabel="training loss")
        right.set_title(f"At the best learning rate{window}", fontsize=10)
        starts = np.stack([losses[..., 0].mean() for losses in self.losses.values()])
        # a single 0 (a loss that underflowed) is no reason to give up the logarithm
        positive = all(np.nanmin(losses) >= 0 for losses in self.losses.values())
        for axes in (left, right):
            if positive:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        # what ends far above its start would press all others together
        start = float(np.max(starts, initial=-np.inf, where=np.isfinite(starts)))
        bottom, top = left.get_ylim()
        if bottom < start < top:
            left.set_ylim(bottom, start * 1.5 if positive else start + 0.5 * (start - bottom))


def compare(
    constructors: Mapping[str, Callable[[Any], optax.GradientTransformation]],
    *,
    init: Callable[[chex.PRNGKey], Any],
    loss: Callable[[Any, Any], chex.Array],
    batches: Any,
    learning_rates: Sequence[float],
    seeds: int | Sequence[int] = 3,
    progress: bool = True,
) -> Comparison:
    """Trains with each optimizer, from each seed at each learning rate, and compares the losses.

    All runs of an optimizer are one compiled program, vectorised over learning rate and seed, so
    that its memory is that of all of them. Every run sees the same batches in the same order;
    seeds differ in where they start. The loss is that of the parameters that are trained, at each
    step's batch (Schedule-Free's average may be better than that).

    Args:
      constructors: by name, functions of a learning rate that return an optimizer: ours, Optax's,
        your own, a functools.partial of one. The learning rate is traced: to schedule it, scale a
        schedule by it, `lambda lr: adamw(lambda step: lr * schedule(step))`.
      init: makes the parameters from a PRNG key; any pytree.
      loss: (params, batch) → scalar, differentiated by the parameters.
      batches: a pytree of arrays whose leading axis is the steps: one slice of each is a batch.
        What is too large for that may stay outside, with its indices as batches; randomness in
        the loss (dropout) takes its keys from here, too.
      learning_rates: those to try.
      seeds: how many, or which, for init.
      progress: whether a bar for each optimizer shows how far it is.

    Returns:
      a `Comparison`: its text is a table, its `plot()` a Matplotlib figure.

    Raises:
      ValueError, TypeError: an argument is not as described; it is named.
      ModuleNotFoundError: tqdm is missing, and progress is True.

    >>> import adam_jax, functools, jax, jax.numpy as jnp
    >>> comparison = adam_jax.compare(
    ...     {"adamw": adam_jax.adamw, "sgd": functools.partial(adam_jax.sgd, momentum=0.9)},
    ...     init=lambda key: jax.random.normal(key, (3,)),
    ...     loss=lambda w, batch: jnp.mean((batch @ w - 1) ** 2),
    ...     batches=jax.random.normal(jax.random.key(0), (50, 16, 3)),
    ...     learning_rates=[0.01, 0.1, 1.0],
    ...     progress=False,
    ... )
    >>> comparison.losses["sgd"].shape
    (3, 3, 50)
    >>> comparison.best("adamw").learning_rate
    0.1
    """
    problem = Problem(
        init, loss, *_batches(batches), _learning_rates(learning_rates), _seeds(seeds)
    )
    _check_constructors(constructors)
    _check_loss(problem)
    runs = {name: _train(problem, name, make, progress) for name, make in constructors.items()}
    return Comparison(
        losses={name: run.losses for name, run in runs.items()},
        learning_rates=problem.learning_rates,
        seeds=problem.seeds,
        state_bytes={name: run.state_bytes for name, run in runs.items()},
        seconds={name: run.seconds for name, run in runs.items()},
    )


class Problem(NamedTuple):
    """What all optimizers have in common."""

    init: Callable[[chex.PRNGKey], Any]
    loss: Callable[[Any, Any], chex.Array]
    batches: Any
    steps: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]


class Runs(NamedTuple):
    """All runs of one optimizer."""

    losses: np.ndarray
    state_bytes: int
    seconds: float


def _train(problem: Problem, name: str, make: Callable[[Any], Any], progress: bool) -> Runs:
    """Trains with one optimizer, from all seeds at all learning rates."""
    rates = jnp.array(problem.learning_rates, jnp.float32)
    keys = jnp.stack([jax.random.key(seed) for seed in problem.seeds])
    runs = len(problem.learning_rates) * len(problem.seeds)
    size = -(-problem.steps // CHUNKS)
    start, chunk = _functions(problem, name, make)
    losses, seconds = [], []
    with _noting(name), _bar(name, problem.steps, progress) as advance:
        carry = jax.jit(start)(rates, keys)
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(carry[1])) // runs
        program = None
        for first in range(0, problem.steps, size):
            # The last chunk is as long as the others, so that one program serves all: it repeats
            # the last batch, and what comes of that is cut off.
            indices = np.minimum(np.arange(first, first + size), problem.steps - 1)
            given = (carry, rates, problem.batches, indices.astype(np.int32))
            program = program or jax.jit(chunk, donate_argnums=0).lower(*given).compile()
            before = time.perf_counter()
            carry, values = program(*given)
            losses.append(np.asarray(values, np.float32))
            seconds.append((time.perf_counter() - before) / size)
            advance(min(size, problem.steps - first), losses[-1])
    every = np.concatenate(losses, axis=-1)[..., : problem.steps]
    return Runs(every, state_bytes, float(np.median(seconds)))


def _functions(
    problem: Problem, name: str, make: Callable[[Any], Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What starts all runs, and what takes some steps with all of them."""

    def optimizer(rate: chex.Array) -> optax.GradientTransformationExtraArgs:
        tx = make(rate)
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(
                f"compare: constructors[{name!r}] must return an optax.GradientTransformation, "
                f"returned {type(tx).__name__}"
            )
        return optax.with_extra_args_support(tx)

    def start(rate: chex.Array, key: chex.PRNGKey) -> tuple[Any, optax.OptState]:
        params = problem.init(key)
        return params, optimizer(rate).init(params)

    def chunk(carry: Any, rate: chex.Array, batches: Any, indices: chex.Array) -> tuple[Any, Any]:
        tx = optimizer(rate)

        def step(carry: Any, index: chex.Array) -> tuple[Any, chex.Array]:
            params, state = carry
            batch = jax.tree.map(lambda x: x[index], batches)
            value, gradients = jax.value_and_grad(problem.loss)(params, batch)
            updates, state = tx.update(gradients, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, carry, indices)

    # over the seeds within, over the learning rates without; the batches are common to all
    return (
        jax.vmap(jax.vmap(start, (None, 0)), (0, None)),
        jax.vmap(jax.vmap(chunk, (0, None, None, None)), (0, 0, None, None)),
    )


def _batches(batches: Any) -> tuple[Any, int]:
    """The batches as arrays, and the number of steps."""
    if not jax.tree.leaves(batches):
        raise ValueError("compare: batches must hold arrays with a leading axis of steps, got none")
    arrays = jax.tree.map(jnp.asarray, batches)
    shapes = [x.shape for x in jax.tree.leaves(arrays)]
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "compare: all arrays in batches must have the same leading axis, one slice for each "
            f"step, got the shapes {', '.join(map(str, shapes))}"
        )
    return arrays, shapes[0][0]


def _learning_rates(rates: Sequence[float]) -> tuple[float, ...]:
    try:
        found = tuple(float(rate) for rate in rates)
    except TypeError:
        raise TypeError(
            f"compare: learning_rates must be a sequence of numbers, got {rates!r}; "
            f"for a single one write [0.001]"
        ) from None
    if not found or not all(0 < rate < math.inf for rate in found):
        raise ValueError(f"compare: learning_rates must be one number > 0 or more, got {rates!r}")
    return found


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    found = range(seeds) if isinstance(seeds, int) else seeds
    if (
        not isinstance(found, Iterable)
        or not (found := tuple(found))
        or not all(isinstance(seed, (int, np.integer)) for seed in found)
    ):
        raise ValueError(
            f"compare: seeds must be a number >= 1 or a sequence of integers, got {seeds!r}"
        )
    return tuple(map(int, found))


def _check_constructors(constructors: Any) -> None:
    if not isinstance(constructors, Mapping) or not constructors:
        raise TypeError(
            'compare: constructors must be a dict such as {"adamw": adam_jax.adamw}, '
            f"got {constructors!r}"
        )
    for name, make in constructors.items():
        if not callable(make):
            made = isinstance(make, optax.GradientTransformation)
            raise TypeError(
                f"compare: constructors[{name!r}] must be a function of a learning rate, got "
                f"{'a finished optimizer' if made else repr(make)}; "
                f"write {{{name!r}: lambda lr: adam_jax.adamw(lr)}}"
            )


def _check_loss(problem: Problem) -> None:
    if not callable(problem.init):
        raise TypeError(
            f"compare: init must be a function of a PRNG key that returns parameters, got "
            f"{type(problem.init).__name__}; write init=lambda key: params"
        )
    params = jax.eval_shape(problem.init, jax.random.key(0))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), problem.batches)
    value = jax.eval_shape(problem.loss, params, batch)
    leaf = isinstance(value, jax.ShapeDtypeStruct) and value.shape == ()
    if not leaf or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"compare: loss must return a floating-point scalar, returned {value}; "
            f"take the mean, and leave out what else it returns"
        )


@contextlib.contextmanager
def _noting(name: str) -> Iterator[None]:
    """Errors from a user's functions say which optimizer was being run."""
    try:
        yield
    except Exception as error:
        note = f"compare: while training with {name!r}"
        if isinstance(error, jax.errors.JAXTypeError):
            note += (
                "; its learning rate is traced, so that Python cannot branch on it: scale a "
                "schedule by it instead, lambda lr: adamw(lambda step: lr * schedule(step))"
            )
        error.add_note(note)
        raise


@contextlib.contextmanager
def _bar(name: str, steps: int, progress: bool) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A progress bar, advanced by a number of steps and their losses."""
    if not progress:
        yield lambda count, losses: None
        return
    with errors.needing_extra("compare: the progress bar (unless progress=False)"):
        from tqdm import tqdm
    with tqdm(total=steps, desc=name, unit="step") as bar:

        def advance(count: int, losses: np.ndarray) -> None:
            last = losses[..., count - 1]
            bar.set_postfix(loss=f"{np.min(last, initial=np.inf, where=np.isfinite(last)):.4g}")
            bar.update(count)

        yield advance


def _deviation(final: np.ndarray) -> np.ndarray:
    """The standard deviation over the last axis, that of the seeds; NaN for one."""
    if final.shape[-1] == 1:
        return np.full(final.shape[:-1], np.nan)
    return final.std(axis=-1, ddof=1)


def _smooth(losses: np.ndarray, window: int) -> np.ndarray:
    """The running mean along the last axis, shorter by window - 1."""
    return np.lib.stride_tricks.sliding_window_view(losses, window, axis=-1).mean(axis=-1)


def _band(
    axes: Axes, x: np.ndarray, mean: np.ndarray, deviation: np.ndarray, look: Mapping[str, Any]
) -> None:
    axes.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=0.2, lw=0)


def _time(seconds: float) -> str:
    scale, unit = next(
        (pair for pair in ((1.0, "s"), (1e-3, "ms")) if seconds >= pair[0]), (1e-6, "µs")
    )
    return f"{seconds / scale:.3g} {unit}"

"""Comparison of optimizers on a user's problem, with one program per optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._util import errors
from adam_jax._util.typing import PyTree
from adam_jax.analysis import plotting
from adam_jax.analysis._table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tqdm import tqdm

CHUNKS = 20  # program calls per run, to update the progress bar and take a median time

Constructor: TypeAlias = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Best:
    """An optimizer's result at its best learning rate."""

    index: int  # into the learning rates
    learning_rate: float
    mean: float  # of the final losses over the seeds
    deviation: float  # their standard deviation; NaN for one seed


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """The measurements of `compare`; print it for the table.

    Attributes:
      losses: by name, the training losses as an array [learning rate, seed, step].
      learning_rates: as given to `compare`.
      seeds: as given to `compare`.
      state_bytes: by name, the size of one run's optimizer state.
      seconds: by name, the median time of one step of all runs, without compilation.
    """

    losses: dict[str, np.ndarray]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    state_bytes: dict[str, int]
    seconds: dict[str, float]

    def final(self, name: str) -> np.ndarray:
        """Return the mean losses of the last tenth of the steps, [learning rate, seed].

        Runs that diverged have inf.

        Args:
          name: the name of an optimizer.
        """
        last = self.losses[name][..., -self._last_steps :].mean(axis=-1)
        return np.where(np.isfinite(last), last, np.inf)

    def best(self, name: str) -> Best | None:
        """Return the learning rate with the lowest final loss, averaged over the seeds.

        Args:
          name: the name of an optimizer.

        Returns:
          the learning rate and its final loss, or None if every learning rate has a diverged seed.
        """
        final = self.final(name)
        index = int(final.mean(axis=1).argmin())
        if not np.isfinite(final[index]).all():
            return None
        deviation = final[index].std(ddof=1) if len(self.seeds) > 1 else math.nan
        return Best(index, self.learning_rates[index], float(final[index].mean()), float(deviation))

    def table(self) -> str:
        """Return one line for each optimizer: best learning rate, loss, state, time, remarks."""
        runs = len(self.learning_rates) * len(self.seeds)
        rows = [("", "best η", "final loss", "state", f"step of {runs} runs", "")]
        for name in self.losses:
            best, rate, loss = self.best(name), "—", "diverged"
            if best:
                rate, loss = f"{best.learning_rate:g}", f"{best.mean:.4g}"
                loss += f" ± {best.deviation:.1g}" if len(self.seeds) > 1 else ""
            size, seconds = f"{self.state_bytes[name]:,} bytes", _time(self.seconds[name])
            rows.append((name, rate, loss, size, seconds, self._remarks(name, best)))
        return f"{text_table(rows, '<0 >0 >0 >0 >0 <0', '  ')}\n\n{self._legend()}"

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.losses)}>"

    def plot(self) -> Figure:
        """Draw the final losses over the learning rates, and the losses at the best one.

        Returns:
          a Matplotlib figure on a white background: `figure.savefig("compare.png")`.

        Raises:
          ModuleNotFoundError: Matplotlib is missing.
        """
        return plotting.draw_comparison(self)

    @property
    def _steps(self) -> int:
        return next(iter(self.losses.values())).shape[-1]

    @property
    def _last_steps(self) -> int:
        return max(1, self._steps // 10)

    def _remarks(self, name: str, best: Best | None) -> str:
        final, rates = self.final(name), self.learning_rates
        remarks = []
        if best and len(set(rates)) > 1 and best.learning_rate in (min(rates), max(rates)):
            remarks.append("at the edge: widen learning_rates")
        if diverged := int(np.isinf(final).sum()):
            remarks.append(f"{diverged} of {final.size} runs diverged")
        return "; ".join(remarks)

    def _legend(self) -> str:
        seeds = f"± s.d. over {len(self.seeds)} seeds" if len(self.seeds) > 1 else "1 seed"
        return (
            f"final loss: mean of the last {self._last_steps} of {self._steps} steps, {seeds}; "
            f"η from {min(self.learning_rates):g} to {max(self.learning_rates):g}"
        )


def compare(
    constructors: Mapping[str, Constructor],
    *,
    init: Callable[[jax.Array], optax.Params],
    loss: Callable[[PyTree, PyTree], jax.Array],
    batches: PyTree,
    learning_rates: Sequence[float],
    seeds: int | Sequence[int] = 3,
    progress: bool = True,
) -> Comparison:
    """Train with each optimizer, from each seed at each learning rate, and compare the losses.

    All runs of an optimizer are one compiled program, vectorized over learning rates and seeds, so
    it needs memory for all of them. Every run uses the same batches in the same order; seeds differ
    in the initial parameters. The loss at each step is the loss of the trained parameters on that
    step's batch (Schedule-Free's averaged parameters may have a lower loss).

    Args:
      constructors: by name, functions of a learning rate that return an optimizer: ours, Optax's,
        your own, or a functools.partial of one. The learning rate is traced; to schedule it,
        multiply a schedule by it: `lambda lr: adamw(lambda step: lr * schedule(step))`.
      init: returns the parameters, any pytree, for a PRNG key.
      loss: (params, batch) → scalar, differentiated with respect to the parameters.
      batches: a pytree of arrays with a leading axis of steps; one slice of each is a batch. If
        the data is too large, close over it in the loss, and pass indices. If the loss is random
        (dropout), pass its keys in the batches.
      learning_rates: the learning rates to try.
      seeds: the number of seeds, or the seeds, for init.
      progress: whether to show a progress bar for each optimizer.

    Returns:
      a `Comparison`, which prints as a table; its `plot()` returns a Matplotlib figure.

    Raises:
      ValueError, TypeError: an argument is invalid; the message names it.
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
    problem = Problem(init, loss, _batches(batches), _learning_rates(learning_rates), _seeds(seeds))
    _check_constructors(constructors)
    _check_loss(problem)
    result = Comparison({}, problem.learning_rates, problem.seeds, {}, {})
    for name, make in constructors.items():
        with _note_optimizer(name):
            measured = _train(problem, name, make, progress)
        result.losses[name], result.state_bytes[name], result.seconds[name] = measured
    return result


class Problem(NamedTuple):
    """The arguments that all optimizers share."""

    init: Callable[[jax.Array], optax.Params]
    loss: Callable[[PyTree, PyTree], jax.Array]
    batches: PyTree
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]


def _train(
    problem: Problem, name: str, make: Constructor, progress: bool
) -> tuple[np.ndarray, int, float]:
    """Return the losses, state bytes, and median seconds of all runs with one optimizer."""
    rates = jnp.array(problem.learning_rates, jnp.float32)
    keys = jnp.stack([jax.random.key(seed) for seed in problem.seeds])
    steps = len(jax.tree.leaves(problem.batches)[0])
    size = -(-steps // CHUNKS)
    # One program runs all chunks, so they have equal sizes: the last chunk repeats the last batch,
    # and the extra losses are dropped.
    chunks = np.arange(-(-steps // size) * size, dtype=np.int32).reshape(-1, size)
    chunks = np.minimum(chunks, steps - 1)
    losses, seconds = [], []
    bar = _progress_bar(name, steps) if progress else None
    with bar or contextlib.nullcontext():
        start, take_steps = _functions(problem, name, make)
        carry = jax.jit(start)(rates, keys)
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(carry[1])) // (rates.size * keys.size)
        program = jax.jit(take_steps, donate_argnums=0)
        program = program.lower(carry, rates, problem.batches, chunks[0]).compile()
        for indices in chunks:
            before = time.perf_counter()
            carry, values = program(carry, rates, problem.batches, indices)
            losses.append(np.asarray(values, np.float32))
            seconds.append((time.perf_counter() - before) / size)
            if bar is not None:
                count = int(indices[-1] - indices[0]) + 1
                last = losses[-1][..., count - 1]
                lowest = np.min(last, initial=np.inf, where=np.isfinite(last))
                bar.set_postfix(loss=f"{lowest:.4g}")
                bar.update(count)
    return np.concatenate(losses, axis=-1)[..., :steps], state_bytes, float(np.median(seconds))


def _functions(
    problem: Problem, name: str, make: Constructor
) -> tuple[Callable[..., PyTree], Callable[..., PyTree]]:
    """Return a function that starts all runs, and one that takes some steps with them."""

    def optimizer(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        tx = make(rate)
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(
                f"compare: constructors[{name!r}] must return an optax.GradientTransformation, "
                f"returned {type(tx).__name__}"
            )
        return optax.with_extra_args_support(tx)

    def start(rate: jax.Array, key: jax.Array) -> tuple[optax.Params, optax.OptState]:
        params = problem.init(key)
        return params, optimizer(rate).init(params)

    def take_steps(carry: PyTree, rate: jax.Array, batches: PyTree, indices: jax.Array) -> PyTree:
        tx = optimizer(rate)

        def step(carry: PyTree, index: jax.Array) -> PyTree:
            params, state = carry
            batch = jax.tree.map(lambda x: x[index], batches)
            value, gradients = jax.value_and_grad(problem.loss)(params, batch)
            updates, state = tx.update(gradients, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, carry, indices)

    # vmap over seeds inside and learning rates outside; all runs share the batches
    start = jax.vmap(jax.vmap(start, (None, 0)), (0, None))
    return start, jax.vmap(jax.vmap(take_steps, (0, None, None, None)), (0, 0, None, None))


def _batches(batches: PyTree) -> PyTree:
    """Return the batches as arrays."""
    arrays = jax.tree.map(jnp.asarray, batches)
    shapes = [x.shape for x in jax.tree.leaves(arrays)]
    if not shapes:
        raise ValueError("compare: batches must hold arrays with a leading axis of steps, got none")
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "compare: all arrays in batches must have the same leading axis, one slice for each "
            f"step, got the shapes {', '.join(map(str, shapes))}"
        )
    return arrays


def _learning_rates(rates: Sequence[float]) -> tuple[float, ...]:
    try:
        found = tuple(float(rate) for rate in rates)
    except TypeError:
        raise TypeError(
            f"compare: learning_rates must be a sequence of numbers, got {rates!r}; "
            f"for a single one, write [0.001]"
        ) from None
    if not found or not all(0 < rate < math.inf for rate in found):
        raise ValueError(f"compare: learning_rates must be 1 or more numbers > 0, got {rates!r}")
    return found


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    found = np.arange(seeds) if isinstance(seeds, int) else np.asarray(seeds)
    if found.ndim != 1 or not found.size or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"compare: seeds must be a number >= 1 or a sequence of integers, got {seeds!r}"
        )
    return tuple(found.tolist())


def _check_constructors(constructors: Mapping[str, Constructor]) -> None:
    if not isinstance(constructors, Mapping) or not constructors:
        raise TypeError(
            'compare: constructors must be a dict such as {"adamw": adam_jax.adamw}, '
            f"got {constructors!r}"
        )
    for name, make in constructors.items():
        if not callable(make):
            got = "a finished optimizer" if errors.is_transformation(make) else repr(make)
            raise TypeError(
                f"compare: constructors[{name!r}] must be a function of a learning rate, got "
                f"{got}; write {{{name!r}: lambda lr: adam_jax.adamw(lr)}}"
            )


def _check_loss(problem: Problem) -> None:
    if not callable(problem.init):
        raise TypeError(
            f"compare: init must be a function of a PRNG key that returns parameters, got "
            f"{type(problem.init).__name__}; write init=lambda key: params"
        )
    params = jax.eval_shape(problem.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], problem.batches))
    value = jax.eval_shape(problem.loss, params, batch)
    scalar = isinstance(value, jax.ShapeDtypeStruct) and value.shape == ()
    if not scalar or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"compare: loss must return a floating-point scalar, returned {value}; "
            f"take the mean, and leave out other outputs"
        )


@contextlib.contextmanager
def _note_optimizer(name: str) -> Generator[None, None, None]:
    """Add the name of the optimizer to errors from the user's functions."""
    try:
        yield
    except Exception as error:
        note = f"compare: while training with {name!r}"
        if isinstance(error, jax.errors.JAXTypeError):
            note += (
                "; its learning rate is traced, so Python can't branch on it; scale a schedule "
                "by it instead: lambda lr: adamw(lambda step: lr * schedule(step))"
            )
        error.add_note(note)
        raise


def _progress_bar(name: str, steps: int) -> tqdm[NoReturn]:
    with errors.needing_extra("compare: the progress bar (unless progress=False)"):
        from tqdm import tqdm
    return tqdm(total=steps, desc=name, unit="step")


def _time(seconds: float) -> str:
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{scale * seconds:.3g} {unit}"

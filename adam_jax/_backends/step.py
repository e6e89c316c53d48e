"""The step of a leaf: types for its operands, its results, and a `Part`."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from adam_jax._util.typing import PyTree
from adam_jax.storage._moments import BlockAbsmax, Stored, is_quantized, is_reduced, is_stored_apart
from adam_jax.storage._random_bits import Position, positions

Means: TypeAlias = Sequence[jax.Array]
"""The means that one call of `mean` returns, one per array, or one per entry of its batch axes."""

Moments: TypeAlias = Sequence[tuple[Stored, ...]]
"""The moments of each rule that acts on the leaf."""


class Operands(NamedTuple):
    """The operands of a step; the first four have the shape of the leaf, or of a part of it."""

    update: jax.Array
    """The gradient, or the direction of another transformation."""
    grad: jax.Array | None
    """The gradient, if `update` is a direction."""
    param: PyTree
    """The parameter, a SplitParam, or None."""
    moments: Moments
    scalars: jax.Array
    """Every rule's step count and hyperparameters, packed."""
    seeds: jax.Array | None
    """The seeds of random bits, packed; None if nothing is rounded stochastically."""


class Result(NamedTuple):
    """The results of a step."""

    output: PyTree
    """The update, or the new parameter."""
    moments: Moments


class Aliased(enum.Enum):
    """The operand whose buffer a step's output reuses."""

    UPDATE = "update"
    PARAM = "param"

    def of(self, operands: Operands) -> PyTree:
        """Return the aliased operand."""
        return operands.update if self is Aliased.UPDATE else operands.param


class Part(NamedTuple):
    """The relation of a step's arrays to the whole leaf."""

    mean: Callable[[Sequence[jax.Array], int], Means]
    """(arrays, n) → means over the whole leaf, or over each entry of its first n axes."""
    position: Callable[[], Position]
    """Returns the positions of the elements in the leaf, for random bits."""
    block_absmax: BlockAbsmax | None = None
    """Computes block maxima, if this part needs its own function."""


class Step(Protocol):
    """The step of one leaf, or of a part of it; every backend runs the same function."""

    @property
    def aliased(self) -> Aliased: ...

    @property
    def uses_mean(self) -> bool: ...

    @property
    def batch_axes(self) -> int:
        """Return the number of leading batch axes; each of their entries has its own means."""
        ...

    @property
    def platform(self) -> str: ...

    def __call__(
        self, operands: Operands, part: Part
    ) -> tuple[PyTree, Callable[[jax.Array | None], Moments]]:
        """Return the output, and a function from seeds to the encoded new moments."""
        ...


def complete(step: Step, operands: Operands, part: Part) -> Result:
    """Run a step and encode its moments."""
    output, encode = step(operands, part)
    return Result(output, encode(operands.seeds))


def mean_sizes(step: Step, operands: Operands) -> list[int]:
    """Return the number of arrays that a step passes to each call of `mean`."""
    sizes: list[int] = []

    def mean(xs: Sequence[jax.Array], batch_axes: int) -> Means:
        del batch_axes
        sizes.append(len(xs))
        return [jnp.mean(x) for x in xs]

    if step.uses_mean:
        without_bits = operands._replace(seeds=None)
        part = Part(mean, functools.partial(positions, operands.update.shape))
        jax.eval_shape(lambda given: step(given, part)[0], without_bits)
    return sizes


def next_averaged(
    step: Step, operands: Operands, part: Part, known: Sequence[Means]
) -> Sequence[jax.Array]:
    """Return the arrays passed to a step's first call of `mean` without a known result."""
    calls: list[Sequence[jax.Array]] = []

    def mean(xs: Sequence[jax.Array], batch_axes: int) -> Means:
        del batch_axes
        calls.append(xs)
        unknown = len(calls) > len(known)
        return [jnp.zeros_like(x, shape=()) for x in xs] if unknown else known[len(calls) - 1]

    step(operands, part._replace(mean=mean))
    return calls[len(known)]


def known_mean(means: Sequence[Means]) -> Callable[[Sequence[jax.Array], int], Means]:
    """Return a `mean` function that returns precomputed means, in order."""
    known = iter(means)
    return lambda xs, batch_axes: next(known)


class Extent(NamedTuple):
    """The axes of an array, compared to its leaf's."""

    span: int = 1
    """Leaf columns per array column: the block size for scales, else 1."""
    reduced: tuple[int, ...] = ()
    """The axes that have size 1 because the array holds means over them."""


def extents(tree: PyTree, shape: Sequence[int]) -> list[Extent]:
    """Return the extents of the arrays of a leaf of this shape, or of a part of one."""

    def of(x: PyTree) -> list[Extent]:
        if is_quantized(x):
            return [Extent(), Extent(x.elements_per_scale)]
        if is_reduced(x):
            return [Extent(1, _reduced_axes(array.shape, shape)) for array in x]
        return [Extent()]

    return [extent for x in jax.tree.leaves(tree, is_leaf=is_stored_apart) for extent in of(x)]


def _reduced_axes(shape: Sequence[int], leaf_shape: Sequence[int]) -> tuple[int, ...]:
    pairs = enumerate(zip(shape, leaf_shape, strict=True))
    return tuple(k for k, (size, n) in pairs if size != n)

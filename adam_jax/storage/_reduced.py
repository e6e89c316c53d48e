"""Formats with fewer elements than the parameter: means of a moment over axes.

An exponential average is linear, so the mean of the averages is the average of the means. A moment
stored this way is an approximation. The step computes its direction from the new moment before
reducing it, and `Moment.at_least` clamps decoded moments.

Reduced axes have size 1, so that a parameter's PartitionSpec fits, and shapes determine how to read
a leaf.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adam_jax._util.typing import PyTree


class Factored(NamedTuple):
    """A moment as the outer product of its row means and column means, divided by the mean.

    Both fields are trees like the parameters. For a leaf of shape (…, n, m), rows have shape
    (…, n, 1), and columns (…, 1, m). A leaf that isn't factored has its values (or codes) in
    `rows`, and ones (or scales) in `columns`.
    Source: Shazeer & Stern (2018), Adafactor, Algorithm 1.
    """

    rows: PyTree
    columns: PyTree


class Mean(NamedTuple):
    """A moment as its means over axes, in a tree like the parameters."""

    values: PyTree


class FactoredLeaf(NamedTuple):
    """One leaf of a factored moment."""

    rows: jax.Array
    columns: jax.Array


class MeanLeaf(NamedTuple):
    """One leaf of a moment that is stored as a mean."""

    values: jax.Array


class NumberLeaf(NamedTuple):
    """One leaf of a moment with one number per leaf, or per entry of the leaf's first axes."""

    values: jax.Array


class TotalLeaf(NamedTuple):
    """The sum of an array over a whole leaf, not part of a state; every axis has size 1."""

    values: jax.Array


ReducedLeaf = FactoredLeaf | MeanLeaf | NumberLeaf | TotalLeaf


@dataclasses.dataclass(frozen=True, repr=False)
class Reduction:
    """A format that stores means over axes; see `mean`.

    Attributes:
      name: the name shown in a repr.
      axes: for each stored array, the axes that it is a mean over.
    """

    name: str
    axes: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        return self.name

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the shapes of the arrays that store a leaf."""
        reduced = [{axis % len(shape) for axis in axes} for axes in self.axes]
        return [tuple(1 if k in r else n for k, n in enumerate(shape)) for r in reduced]

    def fits(self, leaf: PyTree) -> bool:
        """Whether a leaf is real and has at least two axes, among them the reduced ones."""
        ndim = jnp.ndim(leaf)
        exist = all(-ndim <= axis < ndim for axes in self.axes for axis in axes)
        return ndim >= 2 and exist and jnp.size(leaf) > 0 and not jnp.iscomplexobj(leaf)

    def bytes_per_element(self, shape: Sequence[int]) -> float:
        """Return the size of a stored float32 leaf, in bytes per element."""
        return 4 * sum(map(math.prod, self.shapes(shape))) / math.prod(shape)


FACTORED = Reduction("factored", ((-1,), (-2,)))


def mean(axis: int | Sequence[int]) -> Reduction:
    """Return the format that stores the mean of a non-negative moment over axes.

    `mean(-1)` keeps one number per row, like SlimAdam and Adam-mini for some leaves. Leaves with
    fewer than two axes or without the axis aren't reduced, nor are leaves with fewer than 4096
    elements, unless a storage function returns this format.

    Args:
      axis: an axis, or several.

    Raises:
      TypeError: if an axis isn't an integer.
      ValueError: if there is no axis, or one is given twice.

    >>> import adam_jax, jax.numpy as jnp
    >>> tx = adam_jax.adamw(1e-3, storage={"nu": adam_jax.storage.mean(-1)})
    >>> tx.init({"w": jnp.ones((64, 128))})[0].nu.values["w"].shape
    (64, 1)
    """
    try:
        axes = tuple(map(operator.index, axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError:
        message = f"mean: axis must be an integer or a tuple of integers, got {axis!r}"
        raise TypeError(message) from None
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"mean: axis must be one axis or several different ones, got {axis!r}")
    return Reduction(f"mean({axis})", (axes,))


def is_factored(rows: jax.Array, columns: jax.Array) -> bool:
    """Whether the arrays at one leaf of a `Factored` moment are row means and column means."""
    if rows.ndim < 2 or rows.ndim != columns.ndim or rows.shape[:-2] != columns.shape[:-2]:
        return False
    one_element = rows.shape[-2] == columns.shape[-1] == 1  # values with a placeholder
    return rows.shape[-1] == columns.shape[-2] == 1 and not one_element


def normalize(stored: ReducedLeaf) -> ReducedLeaf:
    """Divide row means by their mean, so that the leaf is their product with the column means."""
    if not isinstance(stored, FactoredLeaf):
        return stored
    return stored._replace(rows=divide_by_mean(stored.rows, -2))


def divide_by_mean(x: jax.Array, axis: int) -> jax.Array:
    """Divide x ≥ 0 by its mean over an axis; where the mean is 0, the quotient is 0."""
    total = jnp.mean(x, axis=axis, keepdims=True)
    return jnp.where(total == 0, 0, x / jnp.where(total == 0, 1, total))


def decode(normalized: ReducedLeaf, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Decode a normalized leaf; axes that are reduced in all its arrays keep size 1."""
    if not isinstance(normalized, FactoredLeaf):
        return normalized.values.astype(dtype)
    return normalized.rows.astype(dtype) * normalized.columns.astype(dtype)


def encode(x: jax.Array, stored: ReducedLeaf) -> ReducedLeaf:
    """Return the means of x in the shapes of `stored`."""
    new = means(sums(x, stored), x.shape)
    return type(stored)(*(a.astype(b.dtype) for a, b in zip(new, stored, strict=True)))


def number_leaf(x: PyTree, ndim: int, dtype: jax.typing.DTypeLike) -> NumberLeaf:
    """Return a leaf's number as a `NumberLeaf` with `ndim` axes, adding axes of size 1."""
    return NumberLeaf(jnp.reshape(x, (*x.shape, *[1] * (ndim - x.ndim))).real.astype(dtype))


def sums(x: jax.Array, stored: ReducedLeaf) -> ReducedLeaf:
    """Return the sums of x, or of a part of a leaf, in the shapes of `stored`."""
    return type(stored)(*(sum_to(x, array.shape) for array in stored))


def sum_to(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Sum x over the axes that have size 1 in `shape`."""
    axes = tuple(k for k, (n, size) in enumerate(zip(x.shape, shape, strict=True)) if n != size)
    return jnp.sum(x, axis=axes, keepdims=True)


def means(totals: ReducedLeaf, shape: Sequence[int]) -> ReducedLeaf:
    """Divide sums over a leaf of this shape by the number of elements in each sum."""
    if isinstance(totals, TotalLeaf):
        return totals
    size = math.prod(shape)
    return type(totals)(*(x / (size // x.size) for x in totals))

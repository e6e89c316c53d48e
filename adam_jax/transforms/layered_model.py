"""The forward and the backward pass of a model with stacked layers, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from adam_jax._util import errors
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.typing import PyTree
from adam_jax.transforms.layered import layer_of

Function: TypeAlias = Callable[..., PyTree]


class Context(NamedTuple):
    """The argument `ctx` of the model's functions."""

    index: jax.Array | None  # type: ignore[assignment]  # tuple has a method of that name
    """The index of the layer; None in `first` and `last`."""
    key: jax.Array | None
    """A random key for this function, layer, and microbatch; None without a key."""
    shared: PyTree
    """The argument `shared` of the step."""


class Model(NamedTuple):
    """The functions of a model; each takes a `Context` as its last argument."""

    first: Function
    layer: Function
    last: Function
    has_aux: bool
    microbatches: int


class Forward(NamedTuple):
    """The results of a forward pass, and the inputs of the backward pass."""

    value: PyTree
    """The loss, or (loss, aux)."""
    inputs: PyTree
    """The input of each layer, stacked along axis 0."""
    outer_gradient: PyTree
    """The gradient of the outer parameters in `last`."""
    cotangent: PyTree
    """The gradient of the last layer's output."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """A model and its operands in one step, except the parameters."""

    model: Model
    count: int
    """The number of layers."""
    batch: PyTree
    key: jax.Array | None
    shared: PyTree

    def forward(self, outer: PyTree, layers: PyTree) -> Forward:
        """Return the loss, its gradients at the end of the model, and the input of each layer."""
        h = self._first(outer)
        errors.floating("the result of first", h)
        _, auxiliary = jax.eval_shape(self._layer, jnp.int32(0), layer_of(layers, 0), h)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), auxiliary)

        def through(carry: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
            h, total = carry
            out, auxiliary = self._layer(index, layer_of(layers, index), h)
            return (out, jax.tree.map(jnp.add, total, auxiliary)), h

        (h, auxiliary), inputs = jax.lax.scan(through, (h, zero), jnp.arange(self.count))
        context = self._context(None, self.count + 1)

        def last(outer: PyTree, h: PyTree) -> tuple[jax.Array, PyTree]:
            value = self.model.last(outer, h, self.batch, context)
            loss, aux = value if self.model.has_aux else (value, None)
            errors.loss(loss)
            return loss, aux

        loss, pull, aux = jax.vjp(last, outer, h, has_aux=True)
        gradient, cotangent = pull(jnp.ones_like(loss))
        if auxiliary is not None:
            loss = loss + auxiliary.astype(loss.dtype)
        value = (loss, aux) if self.model.has_aux else loss
        return Forward(value, inputs, gradient, cotangent)

    def layer_gradient(
        self, index: jax.Array, layer: PyTree, h: PyTree, cotangent: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Return the gradients of a layer's parameters and of its input."""
        if self.model.microbatches == 1:
            return self._pull(self._context(index, index), layer, h, cotangent)

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
            k, h, cotangent = part
            gradient, cotangent = self._pull(self._context(index, index, k), layer, h, cotangent)
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, gradient), cotangent

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, arithmetic_dtype(p.dtype)), layer)
        total, cotangents = jax.lax.scan(add, zeros, self._microbatches(h, cotangent))
        gradient = jax.tree.map(lambda x, p: x.astype(p.dtype), total, layer)
        return gradient, _merged(cotangents)

    def first_gradient(self, outer: PyTree, cotangent: PyTree) -> PyTree:
        """Return the gradient of the outer parameters in `first`."""
        return jax.vjp(self._first, outer)[1](cotangent)[0]

    def _first(self, outer: PyTree) -> PyTree:
        return self.model.first(outer, self.batch, self._context(None, self.count))

    def _layer(self, index: jax.Array, layer: PyTree, h: PyTree) -> tuple[PyTree, PyTree]:
        """Return a layer's output and auxiliary loss, or None if it has none."""
        if self.model.microbatches == 1:
            return self._outputs(self._context(index, index), layer, h)

        def one(part: PyTree) -> tuple[PyTree, PyTree]:
            k, h = part
            return self._outputs(self._context(index, index, k), layer, h)

        out, auxiliary = jax.lax.map(one, self._microbatches(h))
        return _merged(out), jax.tree.map(lambda x: jnp.sum(x, axis=0), auxiliary)

    def _pull(
        self, context: Context, layer: PyTree, h: PyTree, cotangent: PyTree
    ) -> tuple[PyTree, PyTree]:
        def outputs(layer: PyTree, h: PyTree) -> tuple[PyTree, PyTree]:
            return self._outputs(context, layer, h)

        (_, auxiliary), pull = jax.vjp(outputs, layer, h)
        return pull((cotangent, jax.tree.map(jnp.ones_like, auxiliary)))

    def _outputs(self, context: Context, layer: PyTree, h: PyTree) -> tuple[PyTree, PyTree]:
        """Return a microbatch's output and its share of the auxiliary loss, or None."""
        out, auxiliary = self.model.layer(layer, h, context), None
        if jax.tree.structure(out) != jax.tree.structure(h):
            errors.with_auxiliary_loss(out, h)
            out, auxiliary = out[0], out[1] / self.model.microbatches
        errors.same_types("the result of layer", out, h)
        return out, auxiliary

    def _context(self, index: jax.Array | None, *place: jax.typing.ArrayLike) -> Context:
        """Return the context of a function, with a key for its place in the model."""
        if self.key is None:
            return Context(index, None, self.shared)
        return Context(index, functools.reduce(jax.random.fold_in, place, self.key), self.shared)

    def _microbatches(self, *trees: PyTree) -> PyTree:
        """Return the index of each microbatch and its part of each tree, stacked along axis 0.

        A microbatch takes every k-th element of axis 0, so that devices that shard this axis
        exchange nothing.
        """
        k = self.model.microbatches
        errors.microbatches(k, trees[0])

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)

        return jnp.arange(k), *(jax.tree.map(split, tree) for tree in trees)


def _merged(microbatches: PyTree) -> PyTree:
    """Return the whole batch from microbatches that are stacked along axis 0."""

    def merge(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(merge, microbatches)

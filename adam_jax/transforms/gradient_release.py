"""Training steps that hold the gradient of one layer at a time.

A scan over layers returns the gradient of the whole stack, which is the largest temporary buffer of
a training step. Here, a loop in reverse computes the gradient of one layer, steps this layer in
place, and passes the cotangent on to the layer before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from adam_jax._engine import parts
from adam_jax._engine.apply import apply
from adam_jax._engine.leaf import target_platform
from adam_jax._engine.state import named_tuples
from adam_jax._engine.transformation import describe
from adam_jax._util import errors
from adam_jax._util.numerics import sum_of_squares
from adam_jax._util.partition_specs import drop_indivisible, known_mesh
from adam_jax._util.paths import is_box, leaves_with_path, path_string, unbox
from adam_jax._util.typing import KeyPath, PyTree
from adam_jax.transforms import separable
from adam_jax.transforms.layered import (
    LAYERS,
    OUTER,
    SHARED,
    Layout,
    Leaves,
    layer_of,
    with_layer,
)
from adam_jax.transforms.layered_model import Forward, Function, Model, Pass
from adam_jax.transforms.previous_norm import PreviousNormState


class GradientReleaseState(NamedTuple):
    """The state of a `gradient_release` step."""

    inner_state: optax.OptState
    """The state of `tx`, with leaves of layers stacked along axis 0."""
    gradient_norm: jax.Array
    """The global norm of the last step's gradient, before clipping."""
    layer_gradient_norms: jax.Array
    """The norm of each layer's gradient in the last step."""


@dataclasses.dataclass(frozen=True)
class GradientRelease:
    """The result of `gradient_release`: a training step, and `init` for its state."""

    tx: optax.GradientTransformation
    model: Model
    two_pass: bool

    def __repr__(self) -> str:
        return f"gradient_release({describe(self.tx)})"

    def init(self, params: PyTree) -> GradientReleaseState:
        """Return the state before the first step, with storage formats chosen layer by layer."""
        with errors.error_context("gradient_release"):
            return init_layerwise(self.tx, params, two_pass=self.two_pass)

    def __call__(
        self,
        params: PyTree,
        state: GradientReleaseState,
        batch: PyTree,
        *,
        key: jax.Array | None = None,
        shared: PyTree = None,
    ) -> tuple[PyTree, GradientReleaseState, PyTree]:
        """Return the new parameters, the new state, and the loss, or (loss, aux) with `has_aux`.

        Args:
          params: {"outer": ..., "layers": ...}, as at init.
          state: the state; donate it and `params` when jitting the step.
          batch: passed to `first` and `last`.
          key: a random key, from which each function gets its own in `ctx.key`.
          shared: passed to all functions as `ctx.shared`, such as rotary tables and masks. It gets
            no gradient.
        """
        with errors.error_context("gradient_release"):
            errors.made_by_init(state, GradientReleaseState)
            run = Pass(self.model, _layer_count(params), batch, key, shared)
            return _step(self, run, params, state)


def gradient_release(
    tx: optax.GradientTransformation,
    *,
    first: Function,
    layer: Function,
    last: Function,
    has_aux: bool = False,
    remat: Callable[..., Any] | None = None,
    microbatches: int = 1,
    two_pass: bool = False,
) -> GradientRelease:
    """Make a training step that never holds the gradient of more than one layer.

    The forward pass keeps the input of each layer. The backward pass recomputes one layer at a
    time, steps it with `adam_jax.apply`, and updates parameters and state in place if they are
    donated.

    It equals a step with `jax.vmap(tx.update)` over the layers, in which `tx` steps each layer by
    itself. Means over a leaf, such as a trust ratio, are over one layer, and storage formats
    depend on the size of one layer. There is one step count. Each layer has its own random bits.

    Args:
      tx: any Optax transformation that doesn't need the gradient of all parameters at once.
      first: (outer, batch, ctx) → h, such as an embedding. `h` is an array or a tree of
        floating-point arrays. `outer` is `params["outer"]`.
      layer: (layer, h, ctx) → h, or (h, auxiliary loss). `layer` is one layer of
        `params["layers"]`, whose leaves are stacked along axis 0.
      last: (outer, h, batch, ctx) → loss. If `first` and `last` use the same leaf, its gradients
        add up. `ctx` is a `Context` with `index`, `key`, and `shared`. A function that doesn't need
        it can omit it.
      has_aux: whether `last` returns (loss, aux).
      remat: a policy of `jax.checkpoint_policies`, for what one layer's backward pass keeps; by
        default, all intermediate values of one layer.
      microbatches: the number of slices of h, along axis 0, that a layer processes one after the
        other; it must divide the axis. Gradients of slices add up. Auxiliary losses are averaged.
        `first` and `last` get the whole batch.
      two_pass: whether to run the backward pass twice, first to compute the gradient's norm. Then
        `tx` may depend on this norm, and on whether the gradient is finite.

    Returns:
      an object `step`: `state = step.init(params)`, and `params, state, loss = step(params, state,
      batch)`. `state.gradient_norm` and `state.layer_gradient_norms` have the last step's norms.

    Raises:
      TypeError: tx isn't a transformation.
      ValueError: at init, tx needs the gradient of all parameters, or accumulates gradients.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> step = gradient_release(
    ...     adam_jax.adamw(1e-3),
    ...     first=lambda outer, batch: batch["x"] @ outer["in"],
    ...     layer=lambda layer, h: h + jnp.tanh(h @ layer["kernel"]),
    ...     last=lambda outer, h, batch: jnp.mean((h @ outer["out"] - batch["y"]) ** 2),
    ... )
    >>> outer = {"in": jnp.ones((2, 8)), "out": jnp.ones((8, 1))}
    >>> params = {"outer": outer, "layers": {"kernel": jnp.zeros((12, 8, 8))}}
    >>> state = step.init(params)
    >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.ones((4, 1))}
    >>> params, state, loss = jax.jit(step, donate_argnums=(0, 1))(params, state, batch)
    >>> float(loss), state.layer_gradient_norms.shape
    (225.0, (12,))
    """
    with errors.error_context("gradient_release"):
        errors.transformation("tx", tx, "gradient_release(tx, first=..., layer=..., last=...)")
        errors.integer_at_least(1, "microbatches", microbatches)
    layer = _with_context(layer, 2)
    if remat is not None:
        layer = jax.checkpoint(layer, policy=remat)
    model = Model(_with_context(first, 2), layer, _with_context(last, 3), has_aux, microbatches)
    return GradientRelease(tx, model, two_pass)


def init_layerwise(
    tx: optax.GradientTransformation, params: PyTree, *, two_pass: bool = False
) -> GradientReleaseState:
    """Check that tx can step layer by layer, and return its state."""
    count = _layer_count(params)
    shapes = jax.eval_shape(lambda p: {**p, LAYERS: layer_of(p[LAYERS], 0)}, params)
    with known_mesh(shapes):
        separable.check(tx, shapes, two_pass=two_pass)
        layout = Layout.of(jax.eval_shape(tx.init, shapes), shapes)

    def init(params: PyTree) -> list[PyTree]:
        def init_layer(layer: PyTree) -> list[PyTree]:
            return layout.treedef.flatten_up_to(tx.init({**params, LAYERS: layer}))

        axes = [0 if part == LAYERS else None for part in layout.parts]
        return jax.vmap(init_layer, out_axes=axes)(params[LAYERS])

    given = dict(leaves_with_path(params))
    made = zip(layout.owners, jax.eval_shape(init, params), strict=True)
    shardings = [
        jax.tree.map(functools.partial(_sharding_like, given.get(owner)), x) for owner, x in made
    ]
    leaves = jax.jit(init, out_shardings=shardings)(params)
    norm, norms = jnp.zeros([], jnp.float32), jnp.zeros(count, jnp.float32)
    return GradientReleaseState(layout.treedef.unflatten(leaves), norm, norms)


def _step(
    release: GradientRelease, run: Pass, params: PyTree, state: GradientReleaseState
) -> tuple[PyTree, GradientReleaseState, PyTree]:
    """Run the forward and the backward pass, step all layers, then the outer parameters."""
    forward = run.forward(params[OUTER], params[LAYERS])
    square = functools.partial(_square_of_gradient, run, forward, params)
    inner = state.inner_state
    if not release.two_pass:
        inner = _with_first_norm(inner, square)
    stepper = _Stepper.of(release.tx, params, inner, square() if release.two_pass else None)
    errors.layers_of_state(run.count, stepper.state_leaves[LAYERS])
    layers, states, cotangent, squares, sums = _step_layers(run, forward, stepper)
    first = run.first_gradient(params[OUTER], cotangent)
    gradient = jax.tree.map(jnp.add, forward.outer_gradient, first)
    summed = iter(jax.tree.map(lambda x: jnp.sum(x, axis=0), sums))

    def total(sums: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, sums, next(summed))

    square = sum_of_squares(gradient)
    stepper = stepper.with_layers(layers, states)
    old = params[OUTER], stepper.state_leaves[OUTER]
    outer, leaves = stepper.step(OUTER, gradient, *old, square, parts.Part(total=total))
    new = GradientReleaseState(
        stepper.state.join({**leaves, LAYERS: states}),
        jnp.sqrt(square + jnp.sum(squares)).astype(jnp.float32),
        jnp.sqrt(squares).astype(jnp.float32),
    )
    return {OUTER: outer, LAYERS: layers}, new, forward.value


def _square_of_gradient(run: Pass, forward: Forward, params: PyTree) -> jax.Array:
    """Return the sum of squares of the whole gradient, from a backward pass without steps."""

    def back(cotangent: PyTree, index: jax.Array) -> tuple[PyTree, jax.Array]:
        layer, h = layer_of((params[LAYERS], forward.inputs), index)
        gradient, cotangent = run.layer_gradient(index, layer, h, cotangent)
        return cotangent, sum_of_squares(gradient)

    cotangent, squares = jax.lax.scan(back, forward.cotangent, jnp.arange(run.count), reverse=True)
    first = run.first_gradient(params[OUTER], cotangent)
    outer = jax.tree.map(jnp.add, forward.outer_gradient, first)
    return jnp.sum(squares) + sum_of_squares(outer)


def _with_first_norm(state: PyTree, square: Callable[[], jax.Array]) -> PyTree:
    """Fill in this step's norm in each `PreviousNormState` that has no norm yet."""

    def is_previous(x: PyTree) -> bool:
        return isinstance(x, PreviousNormState)

    found = [s for _, s in named_tuples(state) if is_previous(s)]
    if not found:
        return state
    missing = functools.reduce(jnp.logical_or, [s.norm == 0 for s in found])

    def norm() -> jax.Array:
        return jnp.sqrt(square()).astype(jnp.float32)

    own = jax.lax.cond(missing, norm, lambda: jnp.zeros([], jnp.float32))

    def fill(s: PyTree) -> PyTree:
        return PreviousNormState(jnp.where(s.norm == 0, own, s.norm)) if is_previous(s) else s

    return jax.tree.map(fill, state, is_leaf=is_previous)


def _step_layers(
    run: Pass, forward: Forward, stepper: _Stepper
) -> tuple[PyTree, list[PyTree], PyTree, jax.Array, PyTree]:
    """Run the backward pass, and step each layer as soon as its gradient is known.

    Return new layers, the leaves of their state, the gradient of the first layer's input, the sum
    of squares of each layer's gradient, and the sums that `parts.total` was given, by layer.
    """

    def back(carry: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
        layers, states, cotangent = carry

        def new() -> PyTree:
            layer, state, h = layer_of((layers, states, forward.inputs), index)
            gradient, before = run.layer_gradient(index, layer, h, cotangent)
            square, sums = sum_of_squares(gradient), []

            def total(x: PyTree) -> PyTree:
                sums.append(x)
                return x

            part = parts.Part(index, total)
            layer, state = stepper.step(LAYERS, gradient, layer, state, square, part)
            return layer, state[LAYERS], before, square, sums

        layer, state, before, *found = _apart(index < run.count, new)
        new_carry = with_layer(layers, layer, index), with_layer(states, state, index), before
        return new_carry, found

    layers = stepper.tree[LAYERS]
    carry = layers, stepper.state_leaves[LAYERS], forward.cotangent
    carry, found = jax.lax.scan(back, carry, jnp.arange(run.count), reverse=True)
    return *carry, *found


def _apart(true: jax.Array, compute: Callable[[], PyTree]) -> PyTree:
    """Return compute(), on CPU in a `lax.cond` whose predicate is true.

    Without this boundary, XLA:CPU fuses reads of a buffer into writes of another, and copies whole
    buffers. On other platforms, the boundary costs a copy.
    """
    if target_platform() != "cpu":
        return compute()
    types = jax.eval_shape(compute)

    def nothing() -> PyTree:
        return jax.tree.map(lambda x: jax.lax.full(x.shape, 0, x.dtype, sharding=x.sharding), types)

    return jax.lax.cond(true, compute, nothing)


class _Stepper(NamedTuple):
    """Steps of one part of the parameters, with `MaskedNode`s in the place of the other part."""

    tx: optax.GradientTransformation
    tree: PyTree
    """The parameters."""
    params: Layout
    state: Layout
    state_leaves: Leaves
    total: jax.Array | None
    """The sum of squares of the whole gradient, if it is known."""

    @classmethod
    def of(
        cls,
        tx: optax.GradientTransformation,
        params: PyTree,
        state: PyTree,
        total: jax.Array | None,
    ) -> _Stepper:
        layout = Layout.of(state, params)
        return cls(tx, params, Layout.of(params, params), layout, layout.split(state), total)

    def with_layers(self, layers: PyTree, states: Sequence[PyTree]) -> _Stepper:
        """Return a stepper with new layers."""
        leaves = {**self.state_leaves, LAYERS: states}
        return self._replace(tree={**self.tree, LAYERS: layers}, state_leaves=leaves)

    def step(
        self,
        part: str,
        gradient: PyTree,
        params: PyTree,
        state: Sequence[PyTree],
        square: jax.Array,
        context: parts.Part,
    ) -> tuple[PyTree, Leaves]:
        """Return the new parameters of a part, and the leaves of its new state.

        `square` is the gradient's sum of squares.
        """
        given = _Leaves(_leaves(gradient), state, _leaves(params))
        shared = {SHARED: self.state_leaves[SHARED]}
        trees = [{part: leaves} for leaves in given]
        if self.total is not None:
            other = OUTER if part == LAYERS else LAYERS
            carrier, carried = self._carrier(other, self.total - square)
            trees = [{**tree, other: leaves} for tree, leaves in zip(trees, carried, strict=True)]
            context = context._replace(carrier=(path_string(carrier), 0))
        g, s, p = trees
        with parts.stepping(context):
            joined = self.params.join(g), self.state.join({**s, **shared}), self.params.join(p)
            new_params, new_state = apply(self.tx, *joined)
        structure = jax.tree.structure(params, is_leaf=is_box)
        new_leaves = self.params.split(new_params)[part]
        return structure.unflatten(new_leaves), self.state.split(new_state)

    def _carrier(self, part: str, square: jax.Array) -> tuple[KeyPath, _Leaves]:
        """Return the smallest leaf of a part, with a made-up gradient of this sum of squares.

        With it, the norm over both parts' gradients is the norm of the whole gradient.
        """
        tree, state = self.tree[part], self.state_leaves[part]
        if part == LAYERS:
            tree, state = layer_of((tree, state), 0)
        leaves = leaves_with_path({part: tree})
        owner, _ = min(leaves, key=lambda leaf: leaf[1].size)
        params = self.params.only(owner, _leaves(tree))
        gradient = jax.tree.map(functools.partial(_with_square, square), params)
        return owner, _Leaves(gradient, self.state.only(owner, state), params)


class _Leaves(NamedTuple):
    """The leaves of one part, with `MaskedNode`s for omitted leaves."""

    gradient: Sequence[PyTree]
    state: Sequence[PyTree]
    params: Sequence[PyTree]


def _with_square(square: jax.Array, like: jax.Array) -> jax.Array:
    """Return an array with this sum of squares, over several elements if the dtype is narrow."""
    left, elements = jnp.maximum(square, 0), []
    for _ in range(min(like.size, 4)):
        largest = jnp.sqrt(left) * (1 - jnp.finfo(like.dtype).eps).astype(left.dtype)
        elements.append(largest.astype(like.dtype))
        left = jnp.maximum(left - elements[-1].astype(left.dtype) ** 2, 0)
    flat = jnp.zeros(like.size, like.dtype)
    return flat.at[: len(elements)].set(jnp.stack(elements)).reshape(like.shape)


def _leaves(tree: PyTree) -> list[PyTree]:
    return jax.tree.leaves(tree, is_leaf=is_box)


def _layer_count(params: PyTree) -> int:
    """Check the parameters' structure, and return the number of layers."""
    errors.layered(params)
    return unbox(_leaves(params[LAYERS])[0]).shape[0]


def _sharding_like(param: PyTree, x: jax.ShapeDtypeStruct) -> NamedSharding | None:
    """Return a sharding like the parameter's for an array of its state; None if it has none."""
    sharding = getattr(param, "sharding", None)
    if isinstance(param, Tracer) or not isinstance(sharding, NamedSharding) or x.ndim != param.ndim:
        return None
    return NamedSharding(sharding.mesh, drop_indivisible(sharding.mesh, sharding.spec, x.shape))


def _with_context(function: Function, operands: int) -> Function:
    """Return a function that takes a context after its operands, and passes it on if wanted."""
    if errors.requires(function, operands + 1):
        return function
    return lambda *given: function(*given[:operands])

"""The step of one leaf: decode the moments, apply the rules, encode the moments."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from adam_jax._backends.step import Aliased, Moments, Operands, Part, Result, Step
from adam_jax._engine import split_params
from adam_jax._engine.split_params import SplitParam
from adam_jax._util import errors
from adam_jax._util.declare import Option, Rule
from adam_jax._util.numerics import arithmetic_dtype, real_dtype
from adam_jax._util.typing import PyTree
from adam_jax.storage import _moments
from adam_jax.storage._blockwise import QuantizedLeaf
from adam_jax.storage._moments import Stored
from adam_jax.storage._random_bits import random_bits, second_bits
from adam_jax.storage._reduced import ReducedLeaf, means, normalize, number_leaf, sums

Stages: TypeAlias = tuple[tuple[Rule, tuple[tuple[str, Option], ...]] | None, ...]
"""Rules with their options; None in place of a rule that a mask disables."""


Layout: TypeAlias = PyTree
"""The tree structure of a step's scalars; see `pack`."""


class Seeds(NamedTuple):
    """The seeds of a leaf's random bits."""

    leaf: np.uint32 | jax.Array
    """A hash of the leaf's path, mixed with the layer's index in gradient release."""
    param: PyTree
    """The parameter's seed; 0 if it isn't rounded stochastically."""
    counts: tuple[jax.Array | int, ...]
    """The step count of each rule, for its moments."""

    def packed(self) -> jax.Array:
        """Return one uint32 vector."""
        numbers = (self.leaf, self.param, *self.counts)
        return jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in numbers])


class Settings(NamedTuple):
    """The static arguments of `run_leaf`."""

    stages: Stages
    layout: Layout
    execute_leaf: Callable[[Step, Operands, NamedSharding | None], Result]
    emit_params: bool
    by_addition: bool
    """Whether `optax.apply_updates` computes the new parameter; see `round_to_param`."""
    sharding: NamedSharding | None


@functools.partial(jax.jit, static_argnames="settings")
def run_leaf(operands: Operands, seeds: Seeds | None, *, settings: Settings) -> Result:
    """Step a leaf; the trace depends only on `settings`, shapes, and dtypes.

    `operands.moments` has only the moments of rules that act on the leaf. If the rules have totals,
    it ends with a tuple of zeros, one for each total.
    """
    stages, layout, execute_leaf, emit_params, by_addition, sharding = settings
    shape, batches = np.shape(operands.update), _batch_axes(stages, operands.moments)
    step = LeafStep(stages, layout, emit_params, by_addition, shape, batches, target_platform())
    if seeds is not None:
        operands = operands._replace(seeds=seeds.packed())
    given = operands.moments
    moments = _moments.map_reduced(normalize, _with_numbers(stages, operands))
    output, moments = execute_leaf(step, operands._replace(moments=moments), sharding)

    def stored(x: ReducedLeaf, old: PyTree) -> Stored:
        if _moments.is_number(x):
            return x.values.reshape(old.shape).astype(old.dtype)
        return means(x, shape)

    return Result(output, _moments.map_reduced(stored, moments, given))


def _batch_axes(stages: Stages, moments: Moments) -> tuple[int, ...]:
    """Return the number of batch axes of each active rule: the axes of its per-leaf numbers."""
    rules = [stage[0] for stage in stages if stage is not None]
    return tuple(
        max(
            (np.ndim(x) for m, x in zip(rule.moments.values(), xs, strict=True) if m.one_per_leaf),
            default=0,
        )
        for rule, xs in zip(rules, moments, strict=False)
    )


def _with_numbers(stages: Stages, operands: Operands) -> Moments:
    """Return a leaf's moments and totals, with per-leaf numbers in a `NumberLeaf`."""
    ndim = np.ndim(operands.update)
    dtype = real_dtype(*_moments.dtypes(operands[:4]))
    rules = [stage[0] for stage in stages if stage is not None]
    moments = [
        tuple(
            number_leaf(x, ndim, dtype) if declared.one_per_leaf else x
            for declared, x in zip(rule.moments.values(), stored, strict=True)
        )
        for rule, stored in zip(rules, operands.moments, strict=False)
    ]
    return [*moments, *operands.moments[len(rules) :]]


def target_platform() -> str:
    """Return the platform that the current program is traced for: "cpu", "gpu", "tpu", ….

    An abstract device in the current mesh comes first, so that a program can be lowered for an
    absent machine. Next come `jax.default_device` and JAX's default backend. All three are part of
    `jax.jit`'s cache key.

    Arguments may still be on another platform, e.g. on the CPU of an accelerator's host.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    platform = device if isinstance(device, str) else device.platform
    # Lowering and some abstract devices use the vendor's name for "gpu".
    return "gpu" if platform in ("cuda", "rocm") else platform


class LeafStep(NamedTuple):
    """The `Step` of a leaf of this shape, or of a part of that leaf."""

    stages: Stages
    layout: Layout
    emit_params: bool
    by_addition: bool
    shape: tuple[int, ...]
    batches: tuple[int, ...]
    """The number of leading batch axes, for each rule that acts on the leaf."""
    platform: str

    @property
    def aliased(self) -> Aliased:
        return Aliased.PARAM if self.emit_params else Aliased.UPDATE

    @property
    def batch_axes(self) -> int:
        return max(self.batches, default=0)

    @property
    def uses_mean(self) -> bool:
        return any(stage is not None and "mean" in stage[0].inputs for stage in self.stages)

    def __call__(
        self, operands: Operands, part: Part
    ) -> tuple[PyTree, Callable[[jax.Array | None], Moments]]:
        """Return the update or the new parameter, and a function that encodes the moments."""
        u, g, param, stored, scalars, seeds = operands
        dtype = arithmetic_dtype(*_moments.dtypes(operands[:4]))
        hyperparams = unpack(scalars.astype(jnp.finfo(dtype).dtype), self.layout)
        received, u = u, u.astype(dtype)
        p: PyTree = None if param is None else split_params.to_arithmetic(param, dtype)
        inputs = {
            "g": u if g is None else g.astype(dtype),
            "p": p,
        }
        encoders: list[Callable[[jax.Array | None], tuple[Stored, ...]]] = []
        active = [(k, stage) for k, stage in enumerate(self.stages) if stage is not None]
        terms: list[jax.Array] = []
        per_rule = zip(active, stored[: len(active)], self.batches, strict=True)
        for (k, (rule, options)), old, batch in per_rule:
            t, hyper = hyperparams[k]
            inputs["mean"] = functools.partial(_mean, part, batch)
            inputs["size"] = float(math.prod(self.shape[batch:]))
            decoded = _decode(rule, old, hyper, dtype, u.shape)
            with _promotion(dtype):
                values = {**inputs, **hyper, **dict(options), "t": t}
                new_u, new, new_terms = _apply(rule, u, decoded, values)
            terms += new_terms
            draw = _no_bits if t is None else functools.partial(self._draw, part, 2 + k)
            encoders.append(functools.partial(_encode, self, batch, rule, new, old, u, draw, part))
            u = new_u

        if self.emit_params:
            if not isinstance(param, SplitParam):
                u = u.astype(received.dtype).astype(dtype)  # round like an emitted update
            bits = self._draw(part, 1, seeds) if split_params.needs_random_bits(param) else None
            output = split_params.round_to_param(
                param, jnp.add(p, u), bits, by_addition=self.by_addition
            )
        else:
            output = u.astype(received.dtype)
        totals = [tuple(map(sums, terms, *stored[len(active) :]))] if terms else []
        return output, lambda seeds: [*(encode(seeds) for encode in encoders), *totals]

    def _draw(
        self, part: Part, k: int, seeds: jax.Array | None, name: str = ""
    ) -> jax.Array | None:
        """Return random bits for the parameter if k = 1, else for a moment of rule k - 2."""
        if seeds is None:
            return None
        by_row = self.platform != "gpu"  # on GPU, a loop over rows costs a launch
        return random_bits(seeds[0], seeds[k], part.position(), name, by_row=by_row)


def pack(operands: PyTree) -> tuple[jax.Array, Layout]:
    """Return a step's scalars packed into one vector (a single operand), and their layout."""
    scalars, layout = jax.tree.flatten(operands)
    dtype = jnp.result_type(float)
    return jnp.stack([jnp.asarray(x, dtype) for x in (*scalars, 0)]), layout


def unpack(scalars: jax.Array, layout: Layout) -> PyTree:
    """Return the scalars packed by `pack`."""
    parts = jax.lax.split(scalars, (1,) * scalars.size)[: layout.num_leaves]
    return layout.unflatten([jax.lax.squeeze(x, (0,)) for x in parts])


def _mean(
    part: Part, batch_axes: int, x: jax.Array, *more: jax.Array
) -> jax.Array | tuple[jax.Array, ...]:
    """Return the mean of each array over the whole leaf, or over each entry of its first axes."""
    means = tuple(part.mean([x, *more], batch_axes))
    return means if more else means[0]


def _no_bits(seeds: jax.Array | None, name: str) -> None:
    del seeds, name


def _encode(
    step: LeafStep,
    batch_axes: int,
    rule: Rule,
    new: Sequence[jax.Array],
    old: Sequence[Stored],
    received: jax.Array,
    draw: Callable[[jax.Array | None, str], jax.Array | None],
    part: Part,
    seeds: jax.Array | None,
) -> tuple[Stored, ...]:
    """Encode the new moments of one rule in the formats of its old moments.

    A reduced moment is summed over its reduced axes; `run_leaf` divides the sums. For one number
    per leaf, all elements but the first are set to 0 before the sum, which is then exact.

    Only a gradient that isn't finite makes its block NaN. If the square of a finite gradient
    overflows, the largest finite number replaces Inf. A signed moment in the same blocks shows
    whether the gradient is finite. Without one, the check costs three instructions per element.
    """
    encoded: dict[str, Stored] = {}
    bits_of = _bits_of_pairs(list(rule.moments), functools.partial(draw, seeds))
    for (name, moment), x, stored in zip(rule.moments.items(), new, old, strict=True):
        random = not (moment.round_down or moment.exact) and _moments.needs_random_bits(stored)
        bits = bits_of(name) if random else None
        finite = None if moment.signed else _signed_in_same_blocks(rule, encoded, stored)
        if _moments.is_number(stored):
            encoded[name] = sums(jnp.where(_is_first(part, step.shape, batch_axes), x, 0), stored)
            continue
        if _moments.is_reduced(stored):
            # clip x so that its sum can't overflow; add NaN if the gradient isn't finite
            largest = float(jnp.finfo(x.dtype).max) / math.prod(step.shape)
            x = jnp.where(x > largest, largest, x) + 0 * jnp.abs(received)
            encoded[name] = sums(x, stored)
            continue
        if _moments.is_quantized(stored) and not moment.signed and finite is None:
            x = _moments.finite(x) + 0 * received  # 0·Inf is NaN
        options = {
            "signed": moment.signed,
            "round_down": moment.round_down,
            "saturate": finite is not None,
        }
        if _moments.is_quantized(stored) and step.platform == "cpu":
            # Scales and codes need the same x: two fused copies could round differently. On GPUs,
            # fusing saves a pass over memory, and the margin in `encode` covers an ulp.
            x = jax.lax.optimization_barrier(x)
        x = _moments.encode(x, stored, bits, part.block_absmax, **options)
        if finite is not None and _moments.is_quantized(x):
            x = _moments.with_nan_blocks(x, finite)
        encoded[name] = x
    return tuple(encoded.values())


def _is_first(part: Part, shape: tuple[int, ...], batch_axes: int) -> jax.Array:
    """Whether each element is the first of the leaf, or of an entry of its batch axes."""
    row, column, lane = part.position()
    if batch_axes:
        row = row % np.uint32(math.prod(shape[batch_axes:-1]))
    return (row == 0) & (column + lane == 0)


def _bits_of_pairs(
    names: Sequence[str], draw: Callable[[str], jax.Array | None]
) -> Callable[[str], jax.Array | None]:
    """Return a function from a moment's name to its random bits; two moments share a draw."""
    draw = functools.cache(draw)

    def bits(name: str) -> jax.Array | None:
        k = names.index(name)
        drawn = draw(names[k - k % 2])
        return second_bits(drawn) if k % 2 and drawn is not None else drawn

    return bits


def _signed_in_same_blocks(
    rule: Rule, encoded: Mapping[str, Stored], stored: Stored
) -> QuantizedLeaf | None:
    signed = (x for name, x in encoded.items() if rule.moments[name].signed)
    same = (x for x in signed if _moments.in_same_blocks(stored, x))
    return next(filter(_moments.is_quantized, same), None)


def _decode(
    rule: Rule,
    stored: Sequence[Stored],
    hyperparams: Mapping[str, jax.Array],
    dtype: jax.typing.DTypeLike,
    shape: tuple[int, ...],
) -> list[jax.Array]:
    """Decode the moments of one leaf; clamp lossy moments to their lower bounds."""
    real = jnp.finfo(dtype).dtype
    moments = [
        _moments.decode(x, dtype if moment.signed else real)
        for x, moment in zip(stored, rule.moments.values(), strict=True)
    ]
    if not _moments.any_of_other_shape([stored]):
        return moments
    moments = [jnp.broadcast_to(x, shape) for x in moments]
    bounds = rule.bounds(moments, hyperparams)
    return [
        m if bound is None or not _moments.is_lossy(x) else jnp.where(bound > m, bound, m)
        for m, bound, x in zip(moments, bounds, stored, strict=True)
    ]


def _apply(
    rule: Rule, u: jax.Array, moments: Sequence[jax.Array], values: Mapping[str, PyTree]
) -> tuple[jax.Array, Sequence[jax.Array], Sequence[jax.Array]]:
    """Return a rule's direction, its new moments, and the arrays to sum for its totals."""
    out = rule.apply(u, moments, values)
    if rule.moments or rule.totals:
        errors.returned(rule, out)
    else:
        out = (out,)
    errors.outputs(rule, u, moments, out)
    terms = [out[-1][name] for name in rule.totals]
    return out[0], out[1 : 1 + len(moments)], terms


def _promotion(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager[None]:
    """Let real coefficients multiply complex moments, which strict promotion forbids."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.numpy_dtype_promotion("standard")
    return contextlib.nullcontext()

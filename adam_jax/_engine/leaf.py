"""The step of one leaf: decode the moments, apply the rules, encode the moments."""

from __future__ import annotations

import contextlib
import functools
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
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.typing import PyTree
from adam_jax.storage import _moments
from adam_jax.storage._blockwise import QuantizedLeaf
from adam_jax.storage._moments import BlockAbsmax, Stored
from adam_jax.storage._random_bits import random_bits

Stages: TypeAlias = tuple[tuple[Rule, tuple[tuple[str, Option], ...]] | None, ...]
"""Rules with their options; None for a rule that a mask keeps off the leaf."""


Layout: TypeAlias = PyTree
"""The tree structure of a step's scalars; see `pack`."""


class Seeds(NamedTuple):
    """The seeds of the random bits of a leaf."""

    leaf: np.uint32
    """A hash of its path."""
    param: PyTree
    """The seed of its parameter, if that is rounded stochastically."""
    counts: tuple[jax.Array | int, ...]
    """The step of each rule, for its moments."""

    def packed(self) -> jax.Array:
        """Return one vector of uint32."""
        numbers = (self.leaf, self.param, *self.counts)
        return jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in numbers])


class Settings(NamedTuple):
    """What the trace of a leaf's step depends on beside shapes and dtypes."""

    stages: Stages
    layout: Layout
    execute_leaf: Callable[[Step, Operands, NamedSharding | None], Result]
    emit_params: bool
    sharding: NamedSharding | None


@functools.partial(jax.jit, static_argnames="settings")
def run_leaf(operands: Operands, seeds: Seeds | None, *, settings: Settings) -> Result:
    """Step a leaf; one trace for each shape and dtype, whatever its path and the values.

    `operands.moments` has the moments of the rules that act on the leaf.
    """
    stages, layout, execute_leaf, emit_params, sharding = settings
    size = np.size(operands.update)
    step = LeafStep(stages, layout, emit_params, size, target_platform())
    if seeds is not None:
        operands = operands._replace(seeds=seeds.packed())
    return execute_leaf(step, operands, sharding)


def target_platform() -> str:
    """Return the platform that the current program is traced for: "cpu", "gpu", "tpu", ….

    An abstract device in the current mesh decides, so that a program can be lowered for a machine
    that isn't there. Without one the answer is the platform of `jax.default_device`, else JAX's
    default backend. All of these are part of the key of `jax.jit`'s cache.

    The data may still be on another platform: an accelerator's host can run a program whose
    arguments are on its CPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    platform = device if isinstance(device, str) else device.platform
    # Devices and backends say "gpu"; lowering, and some abstract devices, say which vendor's.
    return "gpu" if platform in ("cuda", "rocm") else platform


class LeafStep(NamedTuple):
    """The step of a leaf of `size` elements, or of a part of it; see `Step`."""

    stages: Stages
    layout: Layout
    emit_params: bool
    size: int
    platform: str

    @property
    def aliased(self) -> Aliased:
        return Aliased.PARAM if self.emit_params else Aliased.UPDATE

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
            "mean": functools.partial(_mean, part),
            "size": float(self.size),
        }
        encoders: list[Callable[[jax.Array | None], tuple[Stored, ...]]] = []
        active = [(k, stage) for k, stage in enumerate(self.stages) if stage is not None]
        for (k, (rule, options)), old in zip(active, stored, strict=True):
            t, hyper = hyperparams[k]
            given = {name: t if name == "t" else inputs[name] for name in rule.inputs}
            decoded = _decode(rule, old, hyper, dtype)
            with _promotion(dtype):
                new_u, *new = _apply(rule, u, decoded, **given, **hyper, **dict(options))
            draw = _no_bits if t is None else functools.partial(_draw, part, 2 + k)
            encoders.append(functools.partial(_encode, rule, new, old, u, draw, part.block_absmax))
            u = new_u

        if self.emit_params:
            if not isinstance(param, SplitParam):
                u = u.astype(received.dtype).astype(dtype)  # as it would have been emitted
            bits = _draw(part, 1, seeds) if split_params.needs_random_bits(param) else None
            output = split_params.round_to_param(param, jnp.add(p, u), bits)
        else:
            output = u.astype(received.dtype)
        return output, lambda seeds: [encode(seeds) for encode in encoders]


def pack(operands: PyTree) -> tuple[jax.Array, Layout]:
    """Return all scalars of a step in one vector, with their layout: one operand, not ten."""
    scalars, layout = jax.tree.flatten(operands)
    dtype = jnp.result_type(float)
    return jnp.stack([jnp.asarray(x, dtype) for x in (*scalars, 0)]), layout


def unpack(scalars: jax.Array, layout: Layout) -> PyTree:
    """Return the scalars of `pack`."""
    parts = jax.lax.split(scalars, (1,) * scalars.size)[: layout.num_leaves]
    return layout.unflatten([jax.lax.squeeze(x, (0,)) for x in parts])


def _mean(part: Part, x: jax.Array, *more: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    """Return the mean of each array over the whole leaf."""
    means = tuple(part.mean([x, *more]))
    return means if more else means[0]


def _draw(part: Part, k: int, seeds: jax.Array | None, name: str = "") -> jax.Array | None:
    """Return random bits for the parameter (k = 1), or for a moment of rule k - 2."""
    return None if seeds is None else random_bits(seeds[0], seeds[k], part.position(), name)


def _no_bits(seeds: jax.Array | None, name: str) -> None:
    del seeds, name


def _encode(
    rule: Rule,
    new: Sequence[jax.Array],
    old: Sequence[Stored],
    received: jax.Array,
    draw: Callable[[jax.Array | None, str], jax.Array | None],
    block_absmax: BlockAbsmax | None,
    seeds: jax.Array | None,
) -> tuple[Stored, ...]:
    """Return the new moments of one rule as the old ones are stored.

    Only a gradient that isn't finite makes its block NaN. If the square of a finite gradient
    overflows, the largest finite number replaces Inf. A signed moment in the same blocks shows
    whether the gradient is finite. Without one, the check costs three instructions per element.
    """
    encoded: dict[str, Stored] = {}
    for (name, moment), x, stored in zip(rule.moments.items(), new, old, strict=True):
        random = moment.average and _moments.needs_random_bits(stored)
        bits = draw(seeds, name) if random else None
        finite = None if moment.signed else _signed_in_same_blocks(rule, encoded, stored)
        if _moments.is_quantized(stored) and not moment.signed and finite is None:
            x = _moments.finite(x) + 0 * received  # 0·Inf is NaN
        options = {"average": moment.average, "saturate": finite is not None}
        x = _moments.encode(x, stored, bits, block_absmax, **options)
        if finite is not None and _moments.is_quantized(x):
            x = _moments.with_nan_blocks(x, finite)
        encoded[name] = x
    return tuple(encoded.values())


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
) -> list[jax.Array]:
    """Return the moments of one leaf; a quantized one is at least what its rule declares."""
    real = jnp.finfo(dtype).dtype
    moments = [
        _moments.decode(x, dtype if moment.signed else real)
        for x, moment in zip(stored, rule.moments.values(), strict=True)
    ]
    if not any(map(_moments.is_quantized, stored)):
        return moments
    bounds = rule.bounds(moments, hyperparams)
    return [
        m if bound is None or not _moments.is_quantized(x) else jnp.where(bound > m, bound, m)
        for m, bound, x in zip(moments, bounds, stored, strict=True)
    ]


def _apply(
    rule: Rule, u: jax.Array, moments: Sequence[jax.Array], **keywords: PyTree
) -> Sequence[jax.Array]:
    """Return a rule's direction and its new moments."""
    out = rule.step(u, *moments, **keywords)
    if rule.moments:
        errors.returned(rule, out)
    out = out if rule.moments else (out,)
    errors.outputs(rule, u, moments, out)
    return out


def _promotion(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager[None]:
    """Let real coefficients multiply complex moments, which strict promotion would not."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.numpy_dtype_promotion("standard")
    return contextlib.nullcontext()

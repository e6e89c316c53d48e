"""Decoding, encoding, and initialization of stored moments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from adam_jax._util import errors
from adam_jax._util.declare import Moment, Start
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.partition_specs import drop_indivisible
from adam_jax._util.paths import Key, by_key, is_box, rebox, rebox_reduced, unbox
from adam_jax._util.typing import KeyPath, Numeric, PyTree
from adam_jax.storage import _blockwise, _dense, _reduced
from adam_jax.storage._blockwise import Code, Options, Quantized, QuantizedLeaf
from adam_jax.storage._formats import code_of, is_format
from adam_jax.storage._policy import (
    Storage,
    check_format,
    choose,
    format_of,
    is_function,
    is_reduction,
)
from adam_jax.storage._reduced import (
    Factored,
    FactoredLeaf,
    Mean,
    MeanLeaf,
    NumberLeaf,
    ReducedLeaf,
    Reduction,
    TotalLeaf,
)

Stored: TypeAlias = jax.Array | QuantizedLeaf | ReducedLeaf
"""One leaf of a moment, as stored in the state."""

BlockAbsmax: TypeAlias = Callable[[jax.Array, int], jax.Array]
"""(a part of a leaf, block size) → the largest magnitude of each whole block."""


def decode(stored: Stored, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return one leaf of a moment in the dtype of the arithmetic.

    A reduced leaf must be normalized. A decoded mean has size 1 along its axes.
    """
    if isinstance(stored, ReducedLeaf):
        return _reduced.decode(stored, dtype)
    if not isinstance(stored, QuantizedLeaf):
        return _dense.decode(stored, dtype)
    return _blockwise.decode(_code(stored), stored).astype(dtype)


def read(stored: Stored, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Decode one leaf of a moment from a state, where reduced leaves aren't normalized."""
    return decode(_reduced.normalize(stored) if is_reduced(stored) else stored, dtype)


def encode(
    x: jax.Array,
    stored: Stored,
    bits: jax.Array | None,
    block_absmax: BlockAbsmax | None = None,
    *,
    signed: bool = True,
    round_down: bool = False,
    saturate: bool = False,
) -> Stored:
    """Encode x in the format of `stored`; without random bits, round to nearest.

    If not `signed`, x must be at least 0. Positive numbers then don't become 0, except with
    `round_down`, which rounds down if the code supports it. With `saturate`, a block with Inf or
    NaN gets the largest finite scale.
    """
    if isinstance(stored, ReducedLeaf):
        return _reduced.encode(x, stored)
    if not isinstance(stored, QuantizedLeaf):
        return _dense.encode(x, stored, bits)
    uniform = jnp.float32(0.5) if bits is None else _uniform(bits)
    x = x.astype(jnp.float32)
    code = _code(stored)
    absmax = None if block_absmax is None else lambda x: block_absmax(x, code.block)
    block = stored.elements_per_scale
    options = Options(signed, round_down, saturate)
    return _without_derivative(code, block, absmax, options, x, uniform)


def _uniform(bits: jax.Array) -> jax.Array:
    """Return 23 of 32 random bits as a number in [0, 1): the fraction of a float in [1, 2)."""
    return jax.lax.bitcast_convert_type(bits >> 9 | np.uint32(0x3F800000), jnp.float32) - 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _without_derivative(
    code: Code,
    block: int,
    block_absmax: Callable[[jax.Array], jax.Array] | None,
    options: Options,
    x: jax.Array,
    uniform: jax.Array,
) -> QuantizedLeaf:
    return _blockwise.encode(code, x, uniform, block, block_absmax, options)


@_without_derivative.defjvp
def _no_derivative(code: Code, *arguments: PyTree) -> PyTree:
    del arguments
    raise errors.no_derivative(f"is quantized to {jnp.dtype(code.dtype)}")


def finite(x: jax.Array) -> jax.Array:
    """Return x with Inf replaced by the largest finite number."""
    largest = jnp.finfo(x.dtype).max
    return jnp.where(x > largest, largest, x)


def in_same_blocks(stored: Stored, other: Stored) -> bool:
    """Whether two moments of a leaf are quantized in the same blocks."""
    if not (isinstance(stored, QuantizedLeaf) and isinstance(other, QuantizedLeaf)):
        return False
    return stored.scales.shape == other.scales.shape


def with_nan_blocks(stored: QuantizedLeaf, other: QuantizedLeaf) -> QuantizedLeaf:
    """Return a moment with NaN blocks where another moment of the leaf has them."""
    scales = jnp.where(jnp.isnan(other.scales), jnp.nan, stored.scales)
    return stored._replace(scales=scales)


def stored_leaf(kind: type, *arrays: PyTree, shape: tuple[int, ...] | None = None) -> Stored:
    """Return one leaf of a moment of this class from the arrays in its trees.

    `shape` is the leaf's shape, if known. Otherwise, an axis of size 1 counts as reduced.
    """
    first = arrays[0]
    if kind is Mean:
        dense = jnp.shape(first) == shape or 1 not in jnp.shape(first)
        return first if dense else MeanLeaf(first)
    if any(x is None for x in arrays):
        return first
    if code_of(getattr(first, "dtype", None)):
        return QuantizedLeaf(*arrays)
    if kind is Factored and _reduced.is_factored(*arrays):
        return FactoredLeaf(*arrays)
    return first


def arrays_of(stored: Stored, old: Sequence[jax.Array]) -> Sequence[PyTree]:
    """Return the arrays of a leaf in a moment's trees; dense leaves keep the placeholders."""
    return tuple(stored) if isinstance(stored, tuple) else (stored, *old[1:])


def is_in_trees(moment: PyTree) -> TypeGuard[Quantized | Factored | Mean]:
    """Whether a moment is stored in several trees, or in one tree of means."""
    return isinstance(moment, (Quantized, Factored, Mean))


def leaves(moment: PyTree, params: PyTree = None) -> dict[Key, Stored]:
    """Return the stored leaves of a moment by their keys, without boxes.

    With the parameters, dense leaves with an axis of size 1 can be distinguished from means.
    """
    if not is_in_trees(moment):
        return by_key(moment)
    shapes = {key: jnp.shape(p) for key, p in by_key(params).items()}
    keys, *others = by_key(moment[0]), *map(jax.tree.leaves, moment[1:])
    kind = type(moment)
    return {
        key: stored_leaf(kind, *arrays, shape=shapes.get(key))
        for key, *arrays in zip(keys, keys.values(), *others, strict=True)
    }


def with_leaves(moment: PyTree, new: Sequence[Stored]) -> PyTree:
    """Return the moment with new leaves, stored in the same formats."""
    if not is_in_trees(moment):
        return jax.tree.unflatten(jax.tree.structure(moment), new)
    old = zip(*map(jax.tree.leaves, moment), strict=True)
    arrays = zip(*map(arrays_of, new, old), strict=True)
    trees = [
        jax.tree.unflatten(jax.tree.structure(t), x) for t, x in zip(moment, arrays, strict=True)
    ]
    return type(moment)(*trees) if new else moment


def _code(stored: QuantizedLeaf) -> Code:
    code = code_of(stored.codes.dtype)
    assert code is not None, (
        f"codes must have a registered dtype, got {stored.codes.dtype}; register its format"
    )
    return code


def shape_of(stored: Stored) -> tuple[int, ...]:
    """Return the shape of a leaf; a mean has size 1 along its axes."""
    if isinstance(stored, FactoredLeaf):
        return jnp.broadcast_shapes(*(x.shape for x in stored))
    return jnp.shape(first_array(stored))


def first_array(stored: Stored) -> jax.Array:
    """Return the codes of a quantized leaf, the first means of a reduced one, else the values."""
    return stored[0] if isinstance(stored, tuple) else stored


def whole(stored: Stored, shape: tuple[int, ...]) -> PyTree:
    """Return the shape and dtype of one leaf; `shape` has the sizes that a mean lacks."""
    if not is_reduced(stored):
        return first_array(stored)
    own = shape_of(stored)
    if isinstance(stored, MeanLeaf | NumberLeaf) and len(own) == len(shape):
        own = tuple(n if size == 1 else size for n, size in zip(shape, own, strict=True))
    return jax.ShapeDtypeStruct(own, stored[0].dtype)


def block_size(stored: Stored) -> int:
    """Return the block size of a leaf's format, or 1 if the leaf isn't quantized."""
    return _code(stored).block if isinstance(stored, QuantizedLeaf) else 1


def is_quantized(stored: Stored) -> TypeGuard[QuantizedLeaf]:
    """Whether one leaf of a moment is stored as codes and scales."""
    return isinstance(stored, QuantizedLeaf)


def is_reduced(stored: Stored) -> TypeGuard[ReducedLeaf]:
    """Whether one leaf of a moment is stored as means or as a number, or is a total."""
    return isinstance(stored, ReducedLeaf)


def is_stored_apart(stored: Stored) -> TypeGuard[QuantizedLeaf | ReducedLeaf]:
    """Whether one leaf of a moment is a tuple of arrays, not one array of the leaf's shape."""
    return is_quantized(stored) or is_reduced(stored)


def is_lossy(stored: Stored) -> TypeGuard[QuantizedLeaf | ReducedLeaf]:
    """Whether one leaf of a moment is quantized, or reduced to means."""
    return isinstance(stored, (QuantizedLeaf, FactoredLeaf, MeanLeaf))


def is_number(stored: Stored) -> TypeGuard[NumberLeaf]:
    """Whether one leaf of a moment is one number, which is exact."""
    return isinstance(stored, NumberLeaf)


def any_of_other_shape(moments: Sequence[Sequence[Stored]]) -> bool:
    """Whether any moment of a leaf is stored in arrays of other shapes than the leaf's."""
    return any(is_lossy(x) or is_number(x) for each in moments for x in each)


def any_total(moments: Sequence[Sequence[Stored]]) -> bool:
    """Whether a leaf's rules have totals."""
    return any(isinstance(x, TotalLeaf) for each in moments for x in each)


def any_lossy(moments: Sequence[Sequence[Stored]]) -> bool:
    """Whether any moment of a leaf is quantized, or reduced to means."""
    return any(is_lossy(x) for each in moments for x in each)


def any_bfloat16(moments: Sequence[Sequence[Stored]]) -> bool:
    """Whether any moment of a leaf is stored element by element in bfloat16."""
    kept = [x for each in moments for x in each if isinstance(x, jax.Array)]
    return any(x.dtype == jnp.bfloat16 for x in kept)


def map_reduced(f: Callable[..., Stored], moments: PyTree, *rest: PyTree) -> PyTree:
    """Replace each reduced leaf by f(leaf, *leaves of `rest` at the same position)."""

    def apply(x: Stored, *others: Stored) -> Stored:
        return f(x, *others) if is_reduced(x) else x

    return jax.tree.map(apply, moments, *rest, is_leaf=is_stored_apart)


def needs_random_bits(stored: PyTree) -> bool:
    """Whether encoding any of these moments uses random bits."""
    return any(x.dtype == jnp.bfloat16 or code_of(x.dtype) for x in jax.tree.leaves(stored))


def dtypes(operands: PyTree) -> list[np.dtype]:
    """Return the dtypes of a leaf's operands; a quantized moment counts as float32."""
    kept = jax.tree.leaves(operands, is_leaf=is_quantized)
    return [x.scales.dtype if is_quantized(x) else x.dtype for x in kept]


def start(
    storage: Storage, name: str, declared: Moment, params: PyTree, value: Numeric | Start
) -> PyTree:
    """Return the initial moment, in several trees if any leaf may be quantized or reduced."""
    if declared.one_per_leaf:
        return _start_per_leaf(params, value)

    def arrays(path: KeyPath, leaf: PyTree) -> list[jax.Array]:
        kept = format_of(storage, name, declared, path, leaf)
        kinds.add(type(kept) if not isinstance(kept, Reduction) else _kind(kept))
        start: PyTree = value
        if callable(value):
            start = value(leaf)
            errors.start(name, leaf, start)
        if isinstance(kept, Reduction):
            dtype = arithmetic_dtype(jnp.result_type(leaf))
            if callable(value):
                zeros = [jnp.zeros(shape, dtype) for shape in kept.shapes(leaf.shape)]
                like = FactoredLeaf(*zeros) if len(zeros) == 2 else MeanLeaf(*zeros)
                return [_shard_like(x, leaf) for x in _reduced.encode(start, like)]
            full = functools.partial(jnp.full, fill_value=start, dtype=dtype)
            return [_shard_like(full(shape), leaf) for shape in kept.shapes(leaf.shape)]
        if isinstance(kept, Code) and callable(value):
            options = Options(declared.signed, declared.round_down, saturate=False)
            x = jnp.asarray(start, jnp.float32)
            made = _blockwise.encode(kept, x, jnp.float32(0.5), kept.block, None, options)
            return [made.codes, _shard_like(made.scales, leaf)]
        if isinstance(kept, Code):
            sign = jnp.sign(jnp.asarray(start, jnp.float32))
            code = kept.encode(sign * kept.largest, jnp.float32(0))
            magnitude = jnp.abs(jnp.asarray(start, jnp.float32))
            scales = jnp.full(_blockwise.scales_shape(leaf.shape, kept.block), magnitude)
            return [jnp.full_like(leaf, code, dtype=kept.dtype), _shard_like(scales, leaf)]
        if callable(value):
            return [jnp.array(start, kept)]  # a copy, which can be donated
        return [jnp.full_like(leaf, jnp.asarray(start).astype(kept), dtype=kept)]

    kinds: set[PyTree] = set()
    boxed, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    made = [(box, arrays(path, unbox(box))) for path, box in boxed]
    kind = _class_of(storage, name, declared, kinds)
    # the axis names of the parameter's box may not fit an array of another shape
    first = [
        rebox(b, xs[0]) if jnp.shape(xs[0]) == jnp.shape(unbox(b)) else xs[0] for b, xs in made
    ]
    if kind is None:
        return treedef.unflatten(first)
    for _, xs in made:
        if len(xs) < len(kind._fields):  # a placeholder for a leaf that stays as it is
            xs.append(jnp.ones((*xs[0].shape[:-1], 1), jnp.float32))
    if kind is not Quantized:  # its scales stay unboxed, as in older states
        made = [(box, [rebox_reduced(box, x) for x in xs]) for box, xs in made]
        first = [xs[0] if is_box(xs[0]) else x for (_, xs), x in zip(made, first, strict=True)]
    others = [[xs[k] for _, xs in made] for k in range(1, len(kind._fields))]
    return kind(*map(treedef.unflatten, (first, *others)))


def _start_per_leaf(params: PyTree, value: Numeric | Start) -> PyTree:
    """Return the initial moment with one number per leaf, a function of the leaf or a constant."""

    def number(leaf: PyTree) -> jax.Array:
        dtype = arithmetic_dtype(jnp.result_type(leaf))  # complex for complex leaves, as in Optax
        x = value(jnp.asarray(leaf, dtype)) if callable(value) else value
        return _shard_like(jnp.array(x, dtype), leaf)  # a copy, which can be donated

    boxed, treedef = jax.tree.flatten(params, is_leaf=is_box)
    return treedef.unflatten([number(unbox(box)) for box in boxed])


def _shard_like(scales: jax.Array, leaf: PyTree) -> jax.Array:
    """Shard scales, means, or a number like the leaf, on axes that the mesh divides evenly.

    The sharding of a traced leaf is known on explicit mesh axes only.
    """
    traced = isinstance(leaf, Tracer)
    sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return scales
    entries = sharding.spec[: scales.ndim]
    spec = drop_indivisible(sharding.mesh, P(*entries), scales.shape)
    target = NamedSharding(sharding.mesh, spec)
    if not traced:
        return jax.device_put(scales, target)
    return jax.reshard(scales, target) if AxisType.Explicit in target.mesh.axis_types else scales


def _kind(reduction: Reduction) -> type:
    return Factored if len(reduction.axes) == 2 else Mean


def _class_of(storage: Storage, name: str, declared: Moment, kinds: set[PyTree]) -> PyTree:
    """Return the class of a moment, or None for one tree; for a function, `kinds` decides."""
    if declared.exact:
        return None
    if is_function(storage):
        if Mean in kinds and kinds & {Factored, Code}:
            raise errors.value_error(
                f"storage must give {name} one kind of format, got a mean for one leaf and codes "
                f"or factors for others; use 'factored' or 'int8' instead of the mean"
            )
        if not kinds:
            return Quantized
        order = {Factored: Factored, Mean: Mean, Code: Quantized}
        return next((order[kind] for kind in order if kind in kinds), None)
    chosen = choose(storage, name, declared)
    if is_reduction(chosen):
        return _kind(check_format(chosen))
    return Quantized if is_format(chosen) else None

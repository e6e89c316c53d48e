"""Decoding, encoding, and initialization of stored moments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from adam_jax._util import errors
from adam_jax._util.declare import Moment
from adam_jax._util.partition_specs import drop_indivisible
from adam_jax._util.paths import Key, by_key, is_box, map_with_path, unbox
from adam_jax._util.typing import KeyPath, Numeric, PyTree
from adam_jax.storage import _blockwise, _dense
from adam_jax.storage._blockwise import Code, Quantized, QuantizedLeaf
from adam_jax.storage._formats import Format, code_of, is_format
from adam_jax.storage._policy import Storage, format_of, is_function

Stored: TypeAlias = jax.Array | QuantizedLeaf
"""One leaf of a moment, as stored in the state."""

BlockAbsmax: TypeAlias = Callable[[jax.Array, int], jax.Array]
"""(magnitudes of a part of a leaf, block size) → the maximum of each whole block."""


def decode(stored: Stored, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return one leaf of a moment in the dtype of the arithmetic."""
    if not isinstance(stored, QuantizedLeaf):
        return _dense.decode(stored, dtype)
    return _blockwise.decode(_code(stored), stored).astype(dtype)


def encode(
    x: jax.Array,
    stored: Stored,
    bits: jax.Array | None,
    block_absmax: BlockAbsmax | None = None,
    *,
    average: bool = True,
    saturate: bool = False,
) -> Stored:
    """Encode x in the format of `stored`, rounding to nearest without random bits.

    A moment that isn't an average is rounded down if its code can. With `saturate`, Inf and NaN
    give their block the largest finite scale.
    """
    if not isinstance(stored, QuantizedLeaf):
        return _dense.encode(x, stored, bits)
    uniform = jnp.float32(0.5) if bits is None else _uniform(bits)
    # scales and codes must use one x: fused into both, it could round in two ways
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))
    code = _code(stored)
    absmax = None if block_absmax is None else lambda x: block_absmax(x, code.block)
    block = stored.elements_per_scale
    return _without_derivative(code, block, absmax, not average, saturate, x, uniform)


def _uniform(bits: jax.Array) -> jax.Array:
    """Return 24 of 32 random bits as a number in [0, 1)."""
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3, 4))
def _without_derivative(
    code: Code,
    block: int,
    block_absmax: Callable[[jax.Array], jax.Array] | None,
    down: bool,
    saturate: bool,
    x: jax.Array,
    uniform: jax.Array,
) -> QuantizedLeaf:
    return _blockwise.encode(code, x, uniform, block, block_absmax, down=down, saturate=saturate)


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


def stored_leaf(codes: jax.Array, scales: jax.Array | None) -> Stored:
    """Return one leaf of a `Quantized` moment: codes with scales, or values."""
    if scales is None or code_of(getattr(codes, "dtype", None)) is None:
        return codes
    return QuantizedLeaf(codes, scales)


def leaves(moment: PyTree) -> dict[Key, Stored]:
    """Return the stored leaves of a moment by their keys, without boxes."""
    if not isinstance(moment, Quantized):
        return by_key(moment)
    codes, scales = by_key(moment.codes), jax.tree.leaves(moment.scales)
    return {k: stored_leaf(x, s) for (k, x), s in zip(codes.items(), scales, strict=True)}


def with_leaves(moment: PyTree, new: Sequence[Stored]) -> PyTree:
    """Return the moment with new leaves, stored in the same formats."""
    if not isinstance(moment, Quantized):
        return jax.tree.unflatten(jax.tree.structure(moment), new)
    old = jax.tree.leaves(moment.scales)
    scales = [getattr(x, "scales", s) for x, s in zip(new, old, strict=True)]
    codes = jax.tree.unflatten(jax.tree.structure(moment.codes), map(codes_or_values, new))
    return Quantized(codes, jax.tree.unflatten(jax.tree.structure(moment.scales), scales))


def _code(stored: QuantizedLeaf) -> Code:
    code = code_of(stored.codes.dtype)
    assert code is not None, (
        f"codes must have a registered dtype, got {stored.codes.dtype}; register its format"
    )
    return code


def codes_or_values(stored: Stored) -> jax.Array:
    """Return the codes of a quantized leaf, else its values."""
    return stored.codes if isinstance(stored, QuantizedLeaf) else stored


def block_size(stored: Stored) -> int:
    """Return the block size of a leaf's format, or 1 if the leaf isn't quantized."""
    return _code(stored).block if isinstance(stored, QuantizedLeaf) else 1


def is_quantized(stored: Stored) -> TypeGuard[QuantizedLeaf]:
    """Whether one leaf of a moment is stored as codes and scales."""
    return isinstance(stored, QuantizedLeaf)


def any_quantized(moments: Sequence[Sequence[Stored]]) -> bool:
    """Whether any moment of a leaf is quantized."""
    return any(is_quantized(x) for each in moments for x in each)


def needs_random_bits(stored: PyTree) -> bool:
    """Whether encoding any of these moments uses random bits."""
    return any(x.dtype == jnp.bfloat16 or code_of(x.dtype) for x in jax.tree.leaves(stored))


def dtypes(operands: PyTree) -> list[np.dtype]:
    """Return the dtypes of a leaf's operands; a quantized moment counts as float32."""
    kept = jax.tree.leaves(operands, is_leaf=is_quantized)
    return [x.scales.dtype if is_quantized(x) else x.dtype for x in kept]


def start(storage: Storage, name: str, declared: Moment, params: PyTree, value: Numeric) -> PyTree:
    """Return the initial moment, which is `Quantized` if any leaf may be quantized."""

    def format(path: KeyPath, leaf: PyTree) -> Code | jax.typing.DTypeLike:
        chosen = format_of(storage, name, path, leaf, signed=declared.signed)
        if not isinstance(chosen, Format):
            return chosen
        return chosen.signed if declared.signed else chosen.positive

    def codes(path: KeyPath, leaf: PyTree) -> jax.Array:
        kept = format(path, leaf)
        if isinstance(kept, Code):
            code = kept.encode(jnp.sign(jnp.asarray(value, jnp.float32)), jnp.float32(0))
            return jnp.full_like(leaf, code, dtype=kept.dtype)
        return jnp.full_like(leaf, jnp.asarray(value).astype(kept), dtype=kept)

    def scales(path: KeyPath, leaf: PyTree) -> jax.Array:
        leaf = unbox(leaf)
        kept = format(path, leaf)
        if isinstance(kept, Code):
            magnitude = jnp.abs(jnp.asarray(value, jnp.float32))
            return _shard_like(
                jnp.full(_blockwise.scales_shape(leaf.shape, kept.block), magnitude), leaf
            )
        return jnp.ones((*np.shape(leaf)[:-1], 1), jnp.float32)

    tree = map_with_path(codes, params)
    if not _may_be_quantized(storage, name, tree):
        return tree
    # the axis names of the parameter's box may not fit the scales, whose shape differs
    return Quantized(tree, jax.tree_util.tree_map_with_path(scales, params, is_leaf=is_box))


def _shard_like(scales: jax.Array, leaf: PyTree) -> jax.Array:
    """Shard scales like their leaf, along the axes that the mesh divides evenly.

    The sharding of a traced leaf is known on explicit mesh axes only.
    """
    traced = isinstance(leaf, Tracer)
    sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return scales
    spec = drop_indivisible(sharding.mesh, sharding.spec, scales.shape)
    target = NamedSharding(sharding.mesh, spec)
    if not traced:
        return jax.device_put(scales, target)
    return jax.reshard(scales, target) if AxisType.Explicit in target.mesh.axis_types else scales


def _may_be_quantized(storage: Storage, name: str, codes: PyTree) -> bool:
    """Whether a moment is `Quantized`; if `storage` is a function, its results decide."""
    if is_function(storage):
        leaves = jax.tree.leaves(codes)
        return not leaves or any(code_of(leaf.dtype) for leaf in leaves)
    return is_format(storage.get(name) if isinstance(storage, Mapping) else storage)

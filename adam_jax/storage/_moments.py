"""Moments as they are stored: made, read and written, each leaf by what lies there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from adam_jax._util import errors
from adam_jax._util.declare import Moment
from adam_jax._util.partition_specs import fitting
from adam_jax._util.paths import Key, by_key, is_box, map_with_path, unbox
from adam_jax.storage import _blockwise, _dense
from adam_jax.storage._blockwise import Blocks, Code
from adam_jax.storage._formats import CODES, Format, is_format
from adam_jax.storage._policy import Storage, format_of, is_function


def decode(stored: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A moment of one leaf in the dtype of the arithmetic."""
    if not isinstance(stored, Blocks):
        return _dense.decode(stored, dtype)
    return _blockwise.decode(CODES[stored.codes.dtype], stored).astype(dtype)


def encode(
    x: jax.Array,
    stored: Any,
    bits: jax.Array | None,
    share: Callable[..., jax.Array] | None = None,
    *,
    average: bool = True,
    saturate: bool = False,
) -> Any:
    """Encode x as `stored` is stored, rounding to nearest without random bits.

    What is no average is rounded down instead, if its code can.
    `share` is for a part of a leaf: (its magnitudes, block) → the largest of each whole block.
    With `saturate` the largest finite number stands for Inf and NaN.
    """
    if not isinstance(stored, Blocks):
        return _dense.encode(x, stored, bits)
    part = jnp.float32(0.5) if bits is None else _uniform(bits)
    # one x for scales and codes: compiled into both, it could round in two ways
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))
    code = CODES[stored.codes.dtype]
    share = None if share is None else functools.partial(share, block=code.block)
    return _without_derivative(code, _blockwise.size(stored), share, not average, saturate, x, part)


def _uniform(bits: jax.Array) -> jax.Array:
    """24 bits as a number in [0, 1)."""
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3, 4))
def _without_derivative(
    code: Code, block: int, share: Any, down: bool, saturate: bool, x: jax.Array, draw: jax.Array
) -> Blocks:
    return _blockwise.encode(code, x, draw, block, share, down=down, saturate=saturate)


@_without_derivative.defjvp
def _no_derivative(
    code: Code, block: int, share: Any, down: bool, saturate: bool, primals: Any, tangents: Any
) -> Any:
    del block, share, down, saturate, primals, tangents
    raise errors.no_derivative(f"is coded in {jnp.dtype(code.dtype)}")


def finite(x: jax.Array) -> jax.Array:
    """Return x with its largest finite number for Inf."""
    largest = jnp.finfo(x.dtype).max
    return jnp.where(x > largest, largest, x)


def in_equal_blocks(stored: Any, other: Any) -> bool:
    """Whether two moments of a leaf are quantized in the same blocks."""
    return is_coded(stored) and is_coded(other) and stored.scales.shape == other.scales.shape


def marked_as(stored: Blocks, other: Blocks) -> Blocks:
    """Return a moment whose blocks are NaN where those of another moment of the leaf are."""
    return Blocks(stored.codes, jnp.where(jnp.isnan(other.scales), jnp.nan, stored.scales))


def one_leaf(codes: Any, scales: Any) -> Any:
    """One leaf of a moment in `Blocks`: codes with their scales, or its values if it is uncoded."""
    coded = scales is not None and getattr(codes, "dtype", None) in CODES
    return Blocks(codes, scales) if coded else codes


def leaves(moment: Any) -> dict[Key, Any]:
    """Return the leaves of a moment by their keys, each as it is stored, out of their boxes."""
    coded = isinstance(moment, Blocks)
    codes = by_key(moment.codes if coded else moment)
    scales = jax.tree.leaves(moment.scales) if coded else [None] * len(codes)
    return {k: one_leaf(x, s) for (k, x), s in zip(codes.items(), scales, strict=True)}


def with_leaves(moment: Any, new: Sequence[Any]) -> Any:
    """The moment with new leaves, stored as its own are."""
    if not isinstance(moment, Blocks):
        return jax.tree.unflatten(jax.tree.structure(moment), new)
    codes = jax.tree.unflatten(jax.tree.structure(moment.codes), [codes_of(x) for x in new])
    kept = jax.tree.leaves(moment.scales)
    scales = [x.scales if isinstance(x, Blocks) else s for x, s in zip(new, kept, strict=True)]
    return Blocks(codes, jax.tree.unflatten(jax.tree.structure(moment.scales), scales))


def codes_of(stored: Any) -> Any:
    """What has the leaf's shape: its codes, or its values."""
    return stored.codes if isinstance(stored, Blocks) else stored


def block_of(stored: Any) -> int:
    """How many elements share a scale in this format; 1 where nothing is coded."""
    return CODES[stored.codes.dtype].block if isinstance(stored, Blocks) else 1


def is_coded(stored: Any) -> bool:
    """Whether what is stored for one leaf is in codes."""
    return isinstance(stored, Blocks) and stored.codes.dtype in CODES


def any_coded(stored: Sequence[Sequence[Any]]) -> bool:
    """Whether any moment of a leaf's rules is in codes."""
    return any(is_coded(x) for moments in stored for x in moments)


def draws(stored: Any) -> bool:
    """Whether writing any of these moments takes random bits."""
    return any(x.dtype in (jnp.bfloat16, *CODES) for x in jax.tree.leaves(stored))


def dtypes(operands: Any) -> list[Any]:
    """The dtypes of a leaf's operands, in which a coded moment counts as float32."""
    kept = jax.tree.leaves(operands, is_leaf=lambda x: isinstance(x, Blocks))
    return [x.scales.dtype if isinstance(x, Blocks) else x.dtype for x in kept]


def start(
    storage: Storage, name: str, declared: Moment, params: Any, value: chex.Numeric
) -> chex.ArrayTree:
    """A moment of all leaves before the first step; `Blocks` where any of them may be coded."""

    def format(path: tuple[Any, ...], leaf: Any) -> Any:
        found = format_of(storage, name, path, leaf, signed=declared.signed)
        return (
            (found.signed if declared.signed else found.positive)
            if isinstance(found, Format)
            else found
        )

    def codes(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        kept = format(path, leaf)
        if isinstance(kept, Code):
            code = kept.encode(jnp.sign(jnp.asarray(value, jnp.float32)), jnp.float32(0))
            return jnp.full_like(leaf, code, dtype=kept.dtype)
        return jnp.full_like(leaf, jnp.asarray(value).astype(kept), dtype=kept)

    def scales(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        leaf = unbox(leaf)
        kept = format(path, leaf)
        if isinstance(kept, Code):
            size = jnp.abs(jnp.asarray(value, jnp.float32))
            return _shard_like(
                jnp.full(_blockwise.scales_shape(leaf.shape, kept.block), size), leaf
            )
        return jnp.ones((*np.shape(leaf)[:-1], 1), jnp.float32)

    tree = map_with_path(codes, params)
    if not _in_blocks(storage, name, tree):
        return tree
    # scales have another shape, which the axis names of the parameter's box may not fit
    return Blocks(tree, jax.tree_util.tree_map_with_path(scales, params, is_leaf=is_box))


def _shard_like(scales: jax.Array, leaf: Any) -> jax.Array:
    """Shard scales as their leaf, along the axes that the devices divide.

    A traced leaf has a known sharding on explicit mesh axes only.
    """
    traced = isinstance(leaf, Tracer)
    sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return scales
    like = NamedSharding(sharding.mesh, fitting(sharding.mesh, sharding.spec, scales.shape))
    if not traced:
        return jax.device_put(scales, like)
    return jax.reshard(scales, like) if AxisType.Explicit in like.mesh.axis_types else scales


def _in_blocks(storage: Storage, name: str, codes: Any) -> bool:
    """Whether a moment lies in `Blocks`: known without leaves, but for a function of them."""
    if is_function(storage):
        leaves = jax.tree.leaves(codes)
        return not leaves or any(leaf.dtype in CODES for leaf in leaves)
    return is_format(storage.get(name) if isinstance(storage, Mapping) else storage)

"""bfloat16 parameters that lose nothing: a rounded value, and the bits below it.

A bfloat16 number is the upper half of a float32. The lower half can be kept as a residual of 16
bits (then both together are the float32) or of 8, or be rounded stochastically. The update is
emitted as a float32 difference, because Optax's protocol has nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adam_jax._util.numerics import TINY
from adam_jax._util.typing import PyTree


class SplitParam(NamedTuple):
    """A bfloat16 parameter that loses nothing in a step."""

    value: jax.Array
    residual: jax.Array | None
    """The lower bits of the float32: int16, or int8 for their upper half; None to round."""
    seed: jax.Array | None
    """A uint32 scalar that random bits depend on; None if nothing is rounded stochastically."""


def to_float32(params: PyTree) -> PyTree:
    """Return parameters with split ones in float32, which has all their bits."""
    if not any_split(params):
        return params
    return jax.tree.map(
        lambda p: to_arithmetic(p, jnp.float32) if is_split(p) else p, params, is_leaf=is_split
    )


def upcast_updates(updates: PyTree, params: PyTree) -> PyTree:
    """Cast updates to float32 for split parameters, so that they aren't rounded."""
    if not any_split(params):
        return updates
    return jax.tree.map(
        lambda p, u: u.astype(jnp.float32) if is_split(p) and u is not None else u,
        params,
        updates,
        is_leaf=is_split,
    )


def any_split(params: PyTree) -> bool:
    """Whether a tree has a split parameter."""
    return any(map(is_split, jax.tree.leaves(params, is_leaf=is_split)))


def is_split(x: PyTree) -> bool:
    """Whether this is a split parameter."""
    return isinstance(x, SplitParam)


def value(p: PyTree) -> PyTree:
    """Return the parameter as the model has it."""
    return p.value if isinstance(p, SplitParam) else p


def needs_random_bits(p: PyTree) -> bool:
    """Whether rounding to the parameter takes random bits."""
    return isinstance(p, SplitParam) and (p.residual is None or p.residual.dtype == jnp.int8)


def to_arithmetic(p: PyTree, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the parameter in the dtype of the arithmetic, with all its bits."""
    if not isinstance(p, SplitParam) or p.residual is None:
        return value(p).astype(dtype)
    low = p.residual.astype(jnp.int32) << _dropped_bits(p.residual.dtype)
    return _float(_bits(p.value.astype(jnp.float32)) + low).astype(dtype)


def round_to_param(p: PyTree, new: jax.Array, random: jax.Array | None) -> PyTree:
    """Return the parameter with the value `new`, split as p is, from 32 random bits per element."""
    if not isinstance(p, SplitParam):
        return new.astype(p.dtype)
    bits = _bits(jnp.where(jnp.abs(new) < TINY, 0, new))
    dropped = 16 if p.residual is None else _dropped_bits(p.residual.dtype)
    if random is not None:  # up with a probability that makes the result right on average
        below = (1 << dropped) - 1
        drawn = (random >> (32 - dropped)).astype(jnp.int32)  # the high bits are independent
        bits = jnp.where(jnp.isfinite(new), (bits + drawn) & ~below, bits)
    nearest = _float((bits + 0x8000) & ~0xFFFF)
    before = p.value.astype(jnp.float32)
    rounded = _to_nearest_even(before + (jnp.where(jnp.isfinite(new), nearest, new) - before))
    split = p._replace(value=rounded.astype(jnp.bfloat16))
    if p.residual is None:
        return split
    return split._replace(residual=_residual(bits, rounded, p.residual.dtype))


def _residual(bits: jax.Array, rounded: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the residual `bits - rounded`, clipped to int16, in a dtype."""
    ends = jnp.iinfo(jnp.int16)
    same_side = (bits ^ _bits(rounded)) >= 0
    residual = jnp.where(same_side, bits - _bits(rounded), ends.min)
    exact = (rounded == 0) | ~jnp.isfinite(rounded)
    residual = jnp.where(exact, 0, jnp.clip(residual, ends.min, ends.max))
    return (residual >> _dropped_bits(dtype)).astype(dtype)


def residual_as(residual: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return a residual in another dtype, rounded to nearest within its range."""
    bits = residual.astype(jnp.int32) << _dropped_bits(residual.dtype)
    nearest = (bits + (1 << _dropped_bits(dtype) >> 1)) >> _dropped_bits(dtype)
    return jnp.minimum(nearest, jnp.iinfo(dtype).max).astype(dtype)


def _dropped_bits(dtype: jax.typing.DTypeLike) -> int:
    """Return how many of the 16 bits below a parameter a residual drops."""
    return 16 - 8 * jnp.dtype(dtype).itemsize


def _to_nearest_even(x: jax.Array) -> jax.Array:
    """Return x rounded to bfloat16, without a pair of casts, which XLA may leave out."""
    bits = _bits(x)
    nearest = _float((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF)
    return jnp.where(jnp.isfinite(x), nearest, x)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

"""float32 parameters split into a bfloat16 value and a residual.

A bfloat16 number is the upper half of a float32. A residual keeps the lower half in 16 bits, which
is exact, or in 8. Without a residual, the value is rounded stochastically. Updates are emitted as
float32 differences, because Optax's protocol can't return parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adam_jax._util.numerics import TINY
from adam_jax._util.typing import PyTree


class SplitParam(NamedTuple):
    """A bfloat16 parameter with a residual, a seed, or both."""

    value: jax.Array
    residual: jax.Array | None
    """The float32's bits minus the value's, as int16, or their upper half as int8; or None."""
    seed: jax.Array | None
    """The uint32 seed of random bits; None if nothing is rounded stochastically."""


def to_float32(params: PyTree) -> PyTree:
    """Cast split parameters to float32, which keeps all their bits."""
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
    """Whether x is a split parameter."""
    return isinstance(x, SplitParam)


def value(p: PyTree) -> PyTree:
    """Return the parameter that the model uses."""
    return p.value if isinstance(p, SplitParam) else p


def needs_random_bits(p: PyTree) -> bool:
    """Whether rounding to this parameter needs random bits."""
    return isinstance(p, SplitParam) and (p.residual is None or p.residual.dtype == jnp.int8)


def to_arithmetic(p: PyTree, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the parameter in `dtype`, with all its bits."""
    if not isinstance(p, SplitParam) or p.residual is None:
        return value(p).astype(dtype)
    low = p.residual.astype(jnp.int32) << _dropped_bits(p.residual.dtype)
    return _float(_bits(p.value.astype(jnp.float32)) + low).astype(dtype)


def round_to_param(
    p: PyTree, new: jax.Array, random: jax.Array | None, *, by_addition: bool = False
) -> PyTree:
    """Round `new` to the format of p, to nearest or with 32 random bits per element.

    With `by_addition`, the value is what `optax.apply_updates` computes from a float32 difference,
    and the residual is relative to it.
    """
    if not isinstance(p, SplitParam):
        return new.astype(p.dtype)
    exact = bits = _bits(jnp.where(jnp.abs(new) < TINY, 0, new))
    is_finite = jnp.isfinite(new)
    dropped = 16 if p.residual is None else _dropped_bits(p.residual.dtype)
    if random is not None:  # round up with the probability that makes the mean exact
        bits += (random >> (32 - dropped)).astype(jnp.int32)  # the high bits are best mixed
    # adding `half` rounds to nearest, so that the residual is in [-half, half)
    half = 0 if p.residual is None else 0x8000
    shifted = jnp.where(is_finite, bits, exact & ~0xFFFF) + half
    value = _float(shifted & ~0xFFFF)
    if by_addition:
        before = p.value.astype(jnp.float32)
        value = _to_nearest_even(before + (jnp.where(is_finite, value, new) - before))
    split = p._replace(value=value.astype(jnp.bfloat16))
    if p.residual is None:
        return split
    if by_addition:
        return split._replace(residual=_residual(bits, value, p.residual.dtype))
    return split._replace(residual=((shifted ^ half) >> dropped).astype(p.residual.dtype))


def _residual(bits: jax.Array, rounded: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the residual `bits - rounded`, clipped to int16, in `dtype`."""
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
    """Return how many of the 16 lower bits a residual drops."""
    return 16 - 8 * jnp.dtype(dtype).itemsize


def _to_nearest_even(x: jax.Array) -> jax.Array:
    """Return x rounded to bfloat16, without a pair of casts, which XLA may remove."""
    bits = _bits(x)
    nearest = _float((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF)
    return jnp.where(jnp.isfinite(x), nearest, x)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

"""How a parameter is read, and how it takes an update: plain, or narrow without losing anything.

A bfloat16 number is the upper half of a float32. What lies below it can be kept beside it, in 16
bits (then both together are the float32) or in 8, or be decided by chance. The update that lands on
the result is emitted as a float32 difference, because that is all that Optax's protocol has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_jax._util.numerics import TINY


class Narrow(NamedTuple):
    """A bfloat16 parameter of which the engine is to lose nothing."""

    value: Any
    rest: Any
    """The bits of the float32 below it: int16, int8 for their upper half; None to round by draw."""
    draw: Any
    """A uint32 scalar that random bits depend on; None where nothing is drawn."""


def full(params: Any) -> Any:
    """Parameters with all their bits: Narrow ones in float32, the others as they are."""
    if not any_narrow(params):
        return params
    return jax.tree.map(
        lambda p: read(p, jnp.float32) if is_narrow(p) else p, params, is_leaf=is_narrow
    )


def widened(updates: Any, params: Any) -> Any:
    """Updates in float32 where the parameter is Narrow, lest they be rounded on their way."""
    if not any_narrow(params):
        return updates
    return jax.tree.map(
        lambda p, u: u.astype(jnp.float32) if is_narrow(p) and u is not None else u,
        params,
        updates,
        is_leaf=is_narrow,
    )


def any_narrow(params: Any) -> bool:
    return any(map(is_narrow, jax.tree.leaves(params, is_leaf=is_narrow)))


def is_narrow(x: Any) -> bool:
    return isinstance(x, Narrow)


def value(p: Any) -> Any:
    """The parameter as the model has it."""
    return p.value if is_narrow(p) else p


def draws(p: Any) -> bool:
    """Whether landing takes random bits."""
    return is_narrow(p) and (p.rest is None or p.rest.dtype == jnp.int8)


def read(p: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The parameter in the dtype of the arithmetic, with all its bits."""
    if not is_narrow(p) or p.rest is None:
        return value(p).astype(dtype)
    low = p.rest.astype(jnp.int32) << _cut(p.rest.dtype)
    return _float(_bits(p.value.astype(jnp.float32)) + low).astype(dtype)


def land(p: Any, new: jax.Array, draws: jax.Array | None) -> Any:
    """The parameter after a step to `new`, kept as p is; draws are 32 random bits per element."""
    if not is_narrow(p):
        return new.astype(p.dtype)
    bits = _bits(jnp.where(jnp.abs(new) < TINY, 0, new))
    cut = 16 if p.rest is None else _cut(p.rest.dtype)
    if draws is not None:  # up with the probability that makes it right on average
        below = (1 << cut) - 1
        drawn = (draws >> (32 - cut)).astype(jnp.int32)  # the high bits are independent
        bits = jnp.where(jnp.isfinite(new), (bits + drawn) & ~below, bits)
    nearest = _float((bits + 0x8000) & ~0xFFFF)
    before = p.value.astype(jnp.float32)
    landed = _to_nearest_even(before + (jnp.where(jnp.isfinite(new), nearest, new) - before))
    landed_value = landed.astype(jnp.bfloat16)
    if p.rest is None:
        return p._replace(value=landed_value)
    return p._replace(value=landed_value, rest=_rest(bits, landed, p.rest))


def _rest(bits: jax.Array, landed: jax.Array, like: jax.Array) -> jax.Array:
    """What leads from the number that was landed on to these bits, as far as it reaches."""
    ends = jnp.iinfo(jnp.int16)
    same_side = (bits ^ _bits(landed)) >= 0
    rest = jnp.where(same_side, bits - _bits(landed), ends.min)
    rest = jnp.where((landed == 0) | ~jnp.isfinite(landed), 0, jnp.clip(rest, ends.min, ends.max))
    return (rest >> _cut(like.dtype)).astype(like.dtype)


def rest_as(rest: jax.Array, dtype: Any) -> jax.Array:
    """What is kept below a parameter in another width, to the nearest that it reaches."""
    bits = rest.astype(jnp.int32) << _cut(rest.dtype)
    nearest = (bits + (1 << _cut(dtype) >> 1)) >> _cut(dtype)
    return jnp.minimum(nearest, jnp.iinfo(dtype).max).astype(dtype)


def _cut(dtype: Any) -> int:
    """How many of the 16 bits below a parameter are not kept."""
    return 16 - 8 * jnp.dtype(dtype).itemsize


def _to_nearest_even(x: jax.Array) -> jax.Array:
    """x as it would come back from bfloat16; a pair of casts XLA may leave out."""
    bits = _bits(x)
    nearest = _float((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF)
    return jnp.where(jnp.isfinite(x), nearest, x)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

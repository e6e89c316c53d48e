"""Moments kept element by element in a floating-point dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def default(leaf_dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The parameter's dtype, as in Optax; float32 where squares of gradients would underflow."""
    narrow = jnp.finfo(leaf_dtype).minexp > jnp.finfo(jnp.bfloat16).minexp
    return jnp.float32 if narrow else leaf_dtype


def decode(stored: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The moment in the dtype of the arithmetic."""
    if jnp.iscomplexobj(stored) and not jnp.issubdtype(dtype, jnp.complexfloating):
        stored = stored.real  # nu of a complex leaf is real, but Optax stores it as complex
    return stored.astype(dtype)


def encode(x: jax.Array, stored: jax.Array, bits: jax.Array | None) -> jax.Array:
    """x in the dtype of `stored`: rounded stochastically to bfloat16, where there are bits.

    To the nearest, an average would stop moving once (1 - b)·change is below half an ulp: at
    b2 = 0.999 and above bfloat16's nu would never decay.
    """
    if stored.dtype == jnp.bfloat16 and bits is not None and x.dtype != jnp.bfloat16:
        return stochastic_bfloat16(x.astype(jnp.float32), bits)
    return x.astype(stored.dtype)


def stochastic_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 → bfloat16, up with the probability that makes it right on average."""
    x = jnp.where(jnp.isnan(x), jnp.nan, x)  # the NaN that stays one when bits are added
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = (pattern + (bits & 0xFFFF)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)

"""Moments stored element by element in a floating-point dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def default(leaf_dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """Return the leaf's dtype as in Optax, or float32 if squares of gradients would underflow."""
    narrow = jnp.finfo(leaf_dtype).minexp > jnp.finfo(jnp.bfloat16).minexp
    return jnp.float32 if narrow else leaf_dtype


def decode(stored: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the moment in the dtype of the arithmetic."""
    if jnp.iscomplexobj(stored) and not jnp.issubdtype(dtype, jnp.complexfloating):
        stored = stored.real  # Optax stores the real nu of a complex leaf as complex
    return stored.astype(dtype)


def encode(x: jax.Array, stored: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Cast x to the dtype of `stored`, rounding stochastically to bfloat16 if given bits.

    With round to nearest, an average would stop changing once (1 - b)·change is below half an ulp:
    from b2 = 0.999 on, nu in bfloat16 would never decay.
    """
    if stored.dtype == jnp.bfloat16 and bits is not None and x.dtype != jnp.bfloat16:
        return stochastic_bfloat16(x.astype(jnp.float32), bits)
    return x.astype(stored.dtype)


def stochastic_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 stochastically, so that the expected value is x."""
    x = jnp.where(jnp.isnan(x), jnp.nan, x)  # this NaN stays NaN when bits are added
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = (pattern + (bits >> 16)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)

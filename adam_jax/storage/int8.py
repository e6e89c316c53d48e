"""8-bit codes by square roots: fine near zero, where most of a block lies.

Rounding is stochastic and unbiased in the moment's own value, so that an average keeps following
however slowly it moves. In benchmarks/ it is measured beside the other codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adam_jax.storage.blocks import Code


def _levels(y: jax.Array, draw: jax.Array, n: int) -> jax.Array:
    """q of 0 ≤ y ≤ 1, with (q/n)² equal to y on average."""
    w = y * n**2
    q = jnp.floor(jnp.sqrt(w))
    return jnp.minimum(jnp.where(draw * (2 * q + 1) < w - q * q, q + 1, q), n)


def _encode_signed(y: jax.Array, draw: jax.Array) -> jax.Array:
    q = _levels(jnp.abs(y), draw, 127)
    return jnp.where(y < 0, -q, q).astype(jnp.int32).astype(jnp.int8)  # via int32: it vectorizes


def _decode_signed(codes: jax.Array) -> jax.Array:
    q = codes.astype(jnp.float32)
    return _exact_ends(q * jnp.abs(q), 127)


def _encode_positive(y: jax.Array, draw: jax.Array) -> jax.Array:
    q = _levels(y, draw, 255)
    # nothing above zero becomes zero: a step would be m/ε where nu is 0 and mu is not
    return jnp.where(y > 0, jnp.maximum(q, 1), q).astype(jnp.int32).astype(jnp.uint8)


def _decode_positive(codes: jax.Array) -> jax.Array:
    q = codes.astype(jnp.float32)
    return _exact_ends(q * q, 255)


def _exact_ends(square: jax.Array, n: int) -> jax.Array:
    """square / n², and ±1 for ±n² even where XLA multiplies the scale by 1/n² first."""
    return jnp.where(jnp.abs(square) == n**2, jnp.sign(square), square * (1 / n**2))


SIGNED = Code(jnp.int8, _encode_signed, _decode_signed)
POSITIVE = Code(jnp.uint8, _encode_positive, _decode_positive)

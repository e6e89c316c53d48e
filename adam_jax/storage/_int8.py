"""8-bit codes by square roots: fine near zero, where most of a block lies.

Rounding is stochastic and unbiased in the moment's own value, so that an average keeps following
however slowly it moves. In benchmarks/ it is measured beside the other codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.storage._blockwise import Code, at_least, at_most


def _levels(y: jax.Array, draw: jax.Array, n: int) -> jax.Array:
    """q of 0 ≤ y ≤ 1, with (q/n)² equal to y on average."""
    w = y * n**2
    q = jnp.floor(jnp.sqrt(w))
    return jnp.where(draw * (2 * q + 1) < w - q * q, q + 1, q)


def _encode_signed(y: jax.Array, draw: jax.Array) -> jax.Array:
    q = _levels(jnp.abs(y), draw, 127)
    return _whole(jnp.where(y < 0, -q, q)).astype(jnp.int8)


def _decode_signed(codes: jax.Array) -> jax.Array:
    q = codes.astype(jnp.float32)
    return _exact_ends(q * jnp.abs(q), 127)


def _encode_positive(y: jax.Array, draw: jax.Array) -> jax.Array:
    q = _levels(y, draw, 255)
    # nothing above zero becomes zero: a step would be m/ε where nu is 0 and mu is not
    return _whole(at_least(q, jnp.where(y > 0, 1.0, 0.0))).astype(jnp.uint8)


def _round_down_positive(y: jax.Array) -> jax.Array:
    return _whole(jnp.floor(jnp.sqrt(y * 255**2))).astype(jnp.uint8)


def _decode_positive(codes: jax.Array) -> jax.Array:
    q = codes.astype(jnp.float32)
    return _exact_ends(q * q, 255)


def _exact_ends(square: jax.Array, n: int) -> jax.Array:
    """square / n², and exactly ±1 for ±n²: a quotient a hair too large, and cut off."""
    inverse = np.nextafter(np.float32(1 / n**2), np.float32(1))
    return at_most(at_least(square * inverse, -1), 1)


def _whole(q: jax.Array) -> jax.Array:
    """Whole numbers as integers, in one addition: the last bits of 1.5 · 2²³ + q."""
    return jax.lax.bitcast_convert_type(q + 1.5 * 2.0**23, jnp.int32)


SIGNED = Code(jnp.int8, _encode_signed, _decode_signed)
POSITIVE = Code(jnp.uint8, _encode_positive, _decode_positive, round_down=_round_down_positive)

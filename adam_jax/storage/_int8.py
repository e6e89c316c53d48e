"""8-bit codes of square roots, which are precise near zero, where most of a block's values are.

Stochastic rounding is unbiased in the moment's own value, so that slowly changing averages keep
changing. benchmarks/ compares these codes with others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax.storage._blockwise import Code, bits_of, floats_of


def _round_sqrt(y: jax.Array, draw: jax.Array) -> jax.Array:
    """Round √y to an integer whose square is y on average, for y ≥ 0."""
    q = jnp.floor(jnp.sqrt(y))
    above = q + 1
    return jnp.where(draw * (q + above) < y - q * q, above, q)  # above² - q² = q + above


def _encode_signed(y: jax.Array, draw: jax.Array) -> jax.Array:
    q = _round_sqrt(jnp.abs(y), draw)
    sign = bits_of(y) & np.int32(-(2**31))
    return _to_low_bits(floats_of(bits_of(q) | sign)).astype(jnp.int8)


def _decode_signed(codes: jax.Array) -> jax.Array:
    q = codes.astype(jnp.float32)
    return q * jnp.abs(q) * np.float32(1 / 127**2)  # exactly ±1 for ±127


def _encode_positive(y: jax.Array, draw: jax.Array) -> jax.Array:
    return _to_low_bits(_round_sqrt(y, draw)).astype(jnp.uint8)


def _round_down_positive(y: jax.Array) -> jax.Array:
    return _to_low_bits(jnp.floor(jnp.sqrt(y))).astype(jnp.uint8)


def _decode_positive(codes: jax.Array) -> jax.Array:
    q = codes.astype(jnp.float32)
    return q * q * np.float32(1 / 255**2)  # exactly 1 for 255


def _to_low_bits(q: jax.Array) -> jax.Array:
    """Return integers whose low bits are the whole number q, by one addition of 1.5 · 2²³."""
    return bits_of(q + 1.5 * 2.0**23)


SIGNED = Code(jnp.int8, _encode_signed, _decode_signed, largest=127.0**2)
POSITIVE = Code(
    jnp.uint8,
    _encode_positive,
    _decode_positive,
    round_down=_round_down_positive,
    # no positive number becomes zero: where nu is 0 and mu isn't, a step is mu/ε
    least=1 + 2.0**-20,
    largest=255.0**2,
)

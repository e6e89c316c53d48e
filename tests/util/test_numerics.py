"""Decay rates and bias corrections keep their digits in float32."""

from __future__ import annotations

import decimal
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax
from adam_jax._util.numerics import averaging_length, debias, decay_rate, momentum_product

RATES = (0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999, 0.999999)
STEPS = (1, 2, 3, 5, 6, 10, 100, 1000, 10**5)
decimal.getcontext().prec = 60


def exact(b, t):
    return 1 - Decimal(b) ** t


@pytest.mark.parametrize("b", RATES)
def test_bias_correction_has_all_digits(b):
    for t in STEPS:
        got = float(debias(jnp.float32(1), decay_rate(b), jnp.float32(t)))
        assert got == pytest.approx(float(1 / exact(b, t)), rel=5e-7)


@pytest.mark.parametrize("b", RATES[1:])
def test_averaging_length_has_all_digits(b):
    final = 2 / (1 - Decimal(b)) - 1
    for t in STEPS:
        expected = final - 2 * t * Decimal(b) ** t / exact(b, t)
        rho, rho_inf = averaging_length(decay_rate(b), jnp.float32(t))
        # where little is averaged yet, ρ is small against ρ_∞ and the naive form has no digit left
        np.testing.assert_allclose([rho, rho_inf], [float(expected), float(final)], rtol=3e-6)


@pytest.mark.parametrize("momentum_decay", [0.0, 0.004, 1.0])
def test_momentum_product_equals_the_product(momentum_decay):
    t = np.arange(1, 400)
    expected = np.cumprod(0.9 * (1 - 0.5 * 0.96 ** (t * momentum_decay)))
    got = jax.vmap(lambda t: momentum_product(decay_rate(0.9), momentum_decay, t))(jnp.float32(t))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-9)
    with jax.enable_x64(True):
        exact = jax.vmap(lambda t: momentum_product(0.9, momentum_decay, t))(jnp.float64(t))
    np.testing.assert_allclose(exact, expected, rtol=1e-12)


def test_a_decay_rate_is_a_number_that_keeps_its_complement():
    b, x = decay_rate(0.999999), jnp.float32(2.0)
    assert float(1 - b) == pytest.approx(1e-6, rel=1e-9)
    np.testing.assert_allclose(
        [b * x, x * b, b + x, x + b, b - x, x - b, x / b, b / x, jnp.sqrt(b), 1 * b**2, 2 - b],
        [v(0.999999, 2.0) for v in NUMBERS],
        rtol=1e-6,
    )


NUMBERS = (
    lambda b, x: b * x,
    lambda b, x: x * b,
    lambda b, x: b + x,
    lambda b, x: x + b,
    lambda b, x: b - x,
    lambda b, x: x - b,
    lambda b, x: x / b,
    lambda b, x: b / x,
    lambda b, x: b**0.5,
    lambda b, x: b**2,
    lambda b, x: 2 - b,
)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_traced_rate_that_became_one_is_clamped(dtype):
    b = jax.jit(decay_rate)(jnp.asarray(0.99999999, dtype))
    assert b.value < 1 and b.complement > 0 and jnp.isfinite(b.log)


def test_square_root_has_a_derivative_at_zero():
    x = jnp.array([0.0, 4.0])
    np.testing.assert_allclose(jax.vmap(jax.grad(adam_jax.sqrt))(x), [0.0, 0.25])
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(adam_jax.sqrt)))(x), [0.0, -1 / 32])


def test_powers_keep_their_complement_too():
    b = decay_rate(0.999999)
    assert float(1 - b ** jnp.float32(1)) == pytest.approx(1e-6, rel=1e-6)
    assert float(1.0 - b) == pytest.approx(1e-6, rel=1e-6)
    assert bool(b > 0) and bool(b < 1) and float(-b) < 0 < float(abs(b)) and float(2**b) > 1

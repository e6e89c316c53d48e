"""Decay rates, bias corrections, and square roots stay accurate in float32."""

from __future__ import annotations

import decimal
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from helpers import RULES, defaults, gradients_with_everything, run_reference, updates_over

RATES = (0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999, 0.999999)
STEPS = (1, 2, 3, 5, 6, 10, 100, 1000, 10**5)
decimal.getcontext().prec = 60


def exact(b, t):
    return 1 - Decimal(b) ** t


@pytest.mark.parametrize("b", RATES)
def test_bias_correction_keeps_all_digits(b):
    for t in STEPS:
        got = float(adam_jax.debias(jnp.float32(1), b, jnp.float32(t)))
        assert got == pytest.approx(float(1 / exact(b, t)), rel=5e-7)


@pytest.mark.parametrize("b", RATES[2:])
def test_the_averaging_length_of_radam_is_accurate(b):
    """Where little is averaged yet, the naive form cancels: ρ is small against ρ_∞."""
    tx = adam_jax.scale_by_radam(b1=0.0, b2=b, eps=0.0)
    final = 2 / (1 - Decimal(b)) - 1
    for t in STEPS:
        rho = final - 2 * t * Decimal(b) ** t / exact(b, t)
        if rho < 5:  # it is not rectified yet
            continue
        rectified = (rho - 4) * (rho - 2) * final / ((final - 4) * (final - 2) * rho)
        expected = (rectified * exact(b, t) / (1 - Decimal(b))).sqrt()  # of a gradient of 1
        state = optax.tree_utils.tree_set(tx.init(jnp.float32(0)), count=jnp.int32(t - 1))
        got, _ = tx.update(jnp.float32(1), state)
        assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_the_momentum_product_of_nadam_is_accurate():
    g = gradients_with_everything(400)
    decays = (0.0, 0.004, 1.0)

    def run(momentum_decay):
        given = {**defaults("nadam_scheduled"), "momentum_decay": momentum_decay}
        tx = adam_jax.scale_by_rule(RULES["nadam_scheduled"], **given)
        return updates_over(tx, g.astype(np.float32))

    for got, decay in zip(jax.vmap(run)(jnp.array(decays)), decays, strict=True):
        expected = run_reference("nadam_scheduled", g, momentum_decay=decay)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


FORMULAS = (
    lambda b, x: b * x,
    lambda b, x: x * b,
    lambda b, x: b + x,
    lambda b, x: x + b,
    lambda b, x: b - x,
    lambda b, x: x - b,
    lambda b, x: x / b,
    lambda b, x: b / x,
    lambda b, x: x**b,
    lambda b, x: 1 * b**2,
    lambda b, x: -b,
    lambda b, x: abs(b),
    lambda b, x: jnp.sqrt(b),
    lambda b, x: jnp.where((b > 0) & (b < 1), 1.0, 0.0),
    # these would lose their digits if b were only a float32 number
    lambda b, x: 1e6 * (1 - b),
    lambda b, x: 1e6 * (1.0 - b),
    lambda b, x: 1e6 * (1 - b**1),
)


def test_a_decay_rate_works_as_a_number_and_its_complement_is_accurate():
    """Step by a user's rule whose gradient selects the formula."""

    @adam_jax.rule()
    def selected(g, *, b1, x):
        return sum(jnp.where(g == k, f(b1, x), 0.0) for k, f in enumerate(FORMULAS))

    tx = adam_jax.scale_by_rule(selected, b1=0.999999, x=2.0)
    g = jnp.arange(float(len(FORMULAS)))
    got, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(got, [f(0.999999, 2.0) for f in FORMULAS], rtol=1e-6)


def test_a_traced_rate_that_rounded_up_to_one_gives_finite_steps():
    rates = [jnp.asarray(0.99999999, dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)]
    assert all(b == 1 for b in rates)

    @jax.jit
    def first(b):
        tx = adam_jax.scale_by_adam(b2=b)
        return tx.update(jnp.ones(3), tx.init(jnp.ones(3)))[0]

    for b in rates:
        np.testing.assert_allclose(first(b), 1.0, rtol=1e-5)


def test_the_square_root_has_a_derivative_of_zero_at_zero():
    x = jnp.array([0.0, 4.0])
    np.testing.assert_allclose(jax.vmap(jax.grad(adam_jax.sqrt))(x), [0.0, 0.25])
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(adam_jax.sqrt)))(x), [0.0, -1 / 32])

"""Claims of papers about these methods, as programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax


def trajectory(tx, gradients):
    """Return the updates of a transformation for given gradients."""
    gradients = jnp.asarray(gradients, jnp.float32)
    return np.asarray(
        jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(gradients[0]), gradients)[1]
    )


def gradients(steps=50, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, 6)).astype(np.float32)


def test_without_b1_adam_is_corrected_rmsprop():
    rms = adam_jax.scale_by_rms(decay=0.99, eps_in_sqrt=False, bias_correction=True)
    adam = adam_jax.scale_by_adam(b1=0.0, b2=0.99)
    np.testing.assert_allclose(
        trajectory(adam, gradients()), trajectory(rms, gradients()), rtol=1e-6
    )


def test_without_memory_adam_is_sign_descent():
    adam = adam_jax.scale_by_adam(b1=0.0, b2=0.0, eps=0.0)
    np.testing.assert_allclose(trajectory(adam, gradients()), np.sign(gradients()), rtol=1e-6)


def test_with_a_large_eps_adam_is_momentum():
    eps, b1 = 1e6, 0.9
    g = gradients()
    mu, expected = np.zeros(6), []
    for t, x in enumerate(g, start=1):
        mu = b1 * mu + (1 - b1) * x
        expected.append(mu / (1 - b1**t))
    got = trajectory(adam_jax.scale_by_adam(b1=b1, eps=eps), g) * eps
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [-30, -3, 12])
def test_scaling_gradients_by_a_power_of_two_changes_no_bit(power):
    tx = adam_jax.scale_by_adam(eps=0.0)
    np.testing.assert_array_equal(
        trajectory(tx, gradients() * np.float32(2.0**power)), trajectory(tx, gradients())
    )


def test_the_first_step_without_bias_correction_is_too_large():
    # with bias correction, the first step is 1; without it, the step is `excess`
    for decay, excess in [(0.99, 10.0), (0.999, 31.6), (0.9999, 100.0)]:
        plain = adam_jax.scale_by_rms(decay=decay, eps=0.0)
        fair = adam_jax.scale_by_rms(decay=decay, eps=0.0, bias_correction=True)
        g = np.ones((1, 1), np.float32)
        np.testing.assert_allclose(trajectory(plain, g), excess, rtol=1e-3)
        np.testing.assert_allclose(trajectory(fair, g), 1.0, rtol=1e-6)


def test_steps_without_bias_correction_stay_too_large_for_many_steps():
    with jax.enable_x64(True):  # in float32, the last count would be off by five
        for decay, steps in [(0.99, 174), (0.999, 1750), (0.9999, 17511)]:
            tx = adam_jax.scale_by_rms(decay=decay, eps=0.0)
            g = jnp.ones(20_000, jnp.float64)
            u = jax.lax.scan(lambda s, g, tx=tx: tx.update(g, s)[::-1], tx.init(g[0]), g)[1]
            assert int(jnp.sum(u >= 1.1)) == steps


def test_radam_rectifies_as_its_paper_says():
    """Check r at t = 6, 10, 100, and 1000."""
    g = np.ones((1000, 1), np.float32)
    adam, radam = adam_jax.scale_by_adam(eps=0.0), adam_jax.scale_by_radam(eps=0.0)
    t = np.array([6, 10, 100, 1000])
    r = (trajectory(radam, g) / trajectory(adam, g))[t - 1, 0]
    np.testing.assert_allclose(r, [0.0258, 0.0490, 0.2153, 0.6453], atol=6e-5)


def test_the_largest_step_of_adam_is_seven_learning_rates():
    """|u| ≤ (1-b1)/√((1-b2)(1-b1²/b2)) = 7.27, reached by g_t = (b2/b1)^t; 1 when b1 = b2."""
    b1, b2 = 0.9, 0.999
    bound = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    growing = (b2 / b1) ** np.arange(-300.0, 0.0)
    g = np.concatenate([np.zeros(10_000), growing])[:, None]  # late, where no correction is left
    largest = np.nanmax(np.abs(trajectory(adam_jax.scale_by_adam(b1, b2, eps=0.0), g)))
    assert bound == pytest.approx(7.27, abs=0.01)
    assert largest == pytest.approx(bound, rel=1e-3)
    random = np.random.default_rng(0).standard_cauchy(size=(2000, 50))
    equal = trajectory(adam_jax.scale_by_adam(0.95, 0.95, eps=0.0), random)
    assert np.abs(equal).max() <= 1 + 1e-5


def final_point(tx, gradient, steps):
    """Return the end of projected descent on [-1, 1] (Reddi et al., 2018)."""

    def step(carry, t):
        x, state = carry
        updates, state = tx.update(gradient(t), state, x)
        return (jnp.clip(x + updates, -1, 1), state), None

    x = jnp.zeros(())
    return float(jax.lax.scan(step, (x, tx.init(x)), jnp.arange(1, steps + 1))[0][0])


@pytest.mark.parametrize("c", [3.0, 4.0, 10.0])
def test_adam_diverges_and_amsgrad_converges_on_reddis_periodic_problem(c):
    """Adam walks to the worst point of a convex problem, AMSGrad to the best."""

    def gradient(t):
        return jnp.where(t % 3 == 1, jnp.float32(c), jnp.float32(-1))

    def rate(count):
        return 1 / jnp.sqrt(count.astype(jnp.float32) + 1)

    given = {"b1": 0.0, "b2": 1 / (1 + c**2), "eps": 0.0}
    raw = {"bias_correction_mu": False, "bias_correction_nu": False, "max_of": "raw"}
    adam = optax.chain(
        adam_jax.scale_by_rms(given["b2"], eps=0.0), optax.scale_by_learning_rate(rate)
    )
    assert final_point(adam, gradient, 3000) == pytest.approx(1.0, abs=0.1)
    assert final_point(adam_jax.amsgrad(rate, **given, **raw), gradient, 30000) < -0.9


@pytest.mark.slow
def test_adam_diverges_and_amsgrad_converges_on_reddis_online_problem():
    """Every 101st push is large and to the left, the others small and to the right."""
    steps = 2_000_000

    def end(tx):
        """Return x and the average regret against -1."""

        def step(carry, t):
            x, state, regret = carry
            c = jnp.where(t % 101 == 1, jnp.float32(1010), jnp.float32(-10))
            updates, state = tx.update(c, state, x)
            return (jnp.clip(x + updates, -1, 1), state, regret + c * (x + 1) / steps), None

        def block(carry, k):  # in blocks, to sum regrets of similar size
            x, state, regret = jax.lax.scan(step, (*carry, zero), 2000 * k + jnp.arange(1, 2001))[0]
            return (x, state), regret

        zero = jnp.zeros(())
        carry, regrets = jax.lax.scan(block, (zero, tx.init(zero)), jnp.arange(steps // 2000))
        return carry[0], jnp.sum(regrets)

    def rate(count):
        return 1 / jnp.sqrt(count.astype(jnp.float32) + 1)

    x, regret = end(adam_jax.adam(rate, 0.9, 0.99))
    assert x == pytest.approx(1.0, abs=1e-3)
    assert regret == pytest.approx(0.240, abs=1e-3)
    assert end(adam_jax.amsgrad(rate, 0.9, 0.99, max_of="raw"))[0] < -0.996


@pytest.mark.slow
def test_adaptive_methods_generalize_worse_on_wilsons_problem():
    """All methods fit; they differ on unseen samples, which have only the first three features."""
    n, positive = 200, 0.7
    y = np.where(np.random.default_rng(0).random(n) < positive, 1.0, -1.0)
    x = np.zeros((n, 3 + 5 * n))
    x[:, 0], x[:, 1:3] = y, 1
    for i in range(n):
        x[i, 3 + 5 * i : 3 + 5 * i + (1 if y[i] > 0 else 5)] = 1
    unseen = np.where(np.random.default_rng(1).random(1000) < positive, 1.0, -1.0)
    flattest = np.linalg.norm(x.T @ x / n, 2)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def scores(tx):
        def step(carry, _):
            w, state = carry
            g = jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
            updates, state = tx.update(g, state, w)
            return (w + updates, state), None

        w = jnp.zeros(x.shape[1])
        w = np.asarray(jax.lax.scan(step, (w, tx.init(w)), length=1500)[0][0])
        right = np.sign(w[0] * unseen + w[1] + w[2]) == unseen
        return np.mean(np.sign(x @ w) == y), np.mean(right)

    assert np.mean(unseen > 0) == 0.687
    for tx in (adam_jax.sgd(0.5 / flattest), adam_jax.sgd(0.1 / flattest, momentum=0.9)):
        assert scores(tx) == (1, 1)
    for tx in (adam_jax.adam(0.01), adam_jax.rmsprop(0.01), adam_jax.amsgrad(0.01)):
        assert scores(tx) == (1, 0.687)


@pytest.mark.slow
def test_adam_learns_rare_classes_faster_than_sgd():
    """Check the rarer half of 64 classes with frequencies ∝ 1/k, after 300 steps."""
    frequency = 1 / np.arange(1, 65)
    counts = np.maximum(1, np.round(3000 * frequency / frequency.sum())).astype(int)
    labels = np.repeat(np.arange(64), counts)
    x = np.random.default_rng(0).random((len(labels), 256)).astype(np.float32)
    one_hot = jax.nn.one_hot(labels, 64)

    def losses(w):
        return -jnp.sum(one_hot * jax.nn.log_softmax(x @ w), axis=1)

    def rare(tx):
        def step(carry, _):
            w, state = carry
            g = jax.grad(lambda w: losses(w).mean())(w)
            updates, state = tx.update(g, state, w)
            return (w + updates, state), None

        w = jnp.zeros((256, 64))
        w = jax.lax.scan(step, (w, tx.init(w)), length=300)[0][0]
        return float(jnp.mean((one_hot.T @ losses(w) / counts.astype(np.float32))[32:]))

    assert rare(adam_jax.sgd(0.15)) == pytest.approx(5.09, abs=0.02)
    assert rare(adam_jax.adam(0.25)) == pytest.approx(0.105, abs=0.01)


def test_weight_decay_forms_differ_as_documented():
    """L2 enters the moments; decoupled is scaled by η, independent isn't; cautious only shrinks."""
    p, g = jnp.array([2.0, -2.0]), jnp.array([0.5, 0.5])

    def step(form, learning_rate):
        tx = adam_jax.adamw(learning_rate, weight_decay=0.1, weight_decay_form=form)
        return np.asarray(tx.update(g, tx.init(p), p)[0])

    for rate in (0.1, 0.01):
        np.testing.assert_allclose(step("decoupled", rate), -rate * (1 + 0.1 * p), rtol=1e-5)
        np.testing.assert_allclose(step("independent", rate), -rate - 0.1 * p, rtol=1e-5)
        np.testing.assert_allclose(step("cautious", rate), [-rate * 1.2, -rate], rtol=1e-5)
        np.testing.assert_allclose(step("l2", rate), -rate * jnp.sign(g + 0.1 * p), rtol=1e-5)


def test_adamw_ends_within_the_bound_of_its_weight_decay():
    """Xie & Li (2024): AdamW ends inside ‖x‖∞ ≤ 1/λ; Adam with L2 ends between x* and 0."""
    target = jnp.array([5.0, 1.0, -3.0])
    steps = 20_000
    rate = optax.cosine_decay_schedule(0.1, steps)

    def end(form):
        tx = adam_jax.adamw(rate, weight_decay=0.5, weight_decay_form=form)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(4 * (x - target), state, x)
            return (x + updates, state), None

        return jax.lax.scan(step, (jnp.zeros(3), tx.init(jnp.zeros(3))), length=steps)[0][0]

    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(end("decoupled"), [2.0, 1.0, -2.0], atol=2e-3)
        np.testing.assert_allclose(end("l2"), [4.444, 0.889, -2.667], atol=2e-3)

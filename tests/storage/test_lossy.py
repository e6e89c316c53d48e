"""Rounded state takes no large steps, doesn't ratchet, breaks nothing, and rounds independently."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from helpers import RULES, optimizer, says, slowly

SHAPE = (32, 256)
KEY = jax.random.key(0)


def noise(t, shape=SHAPE):
    return jax.random.normal(jax.random.fold_in(KEY, t), shape)


def scan(tx, gradient, steps, measure):
    """Step from zeros; return the last state and a measure of each update."""
    params = {"w": jnp.zeros(SHAPE)}

    def body(state, t):
        updates, state = tx.update({"w": gradient(t)}, state, params)
        return state, measure(updates["w"])

    return jax.jit(lambda: jax.lax.scan(body, tx.init(params), jnp.arange(steps)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(RULES) - {"rms_centered"}))  # int8 uses rms_variance
def test_int8_takes_no_step_much_larger_than_float32(name):
    """int8's largest step, after the first 20 of 300, is at most 5 times float32's.

    Magnitudes within a block vary by e^(s·N), and gradients have either sign or mostly one.
    """

    def largest(storage):
        tx = optimizer(name, 1.0, storage=storage)
        params = {"w": jnp.zeros(SHAPE)}

        @jax.jit
        def run(spread, mean):
            def body(state, t):
                g = jnp.exp(spread * noise(10_000)) * (mean + noise(t))
                updates, state = tx.update({"w": g}, state, params)
                return state, jnp.abs(updates["w"]).max()

            return jax.lax.scan(body, tx.init(params), jnp.arange(300))[1][20:].max()

        return np.array([[run(s, m) for s in (0.3, 1.0, 2.0)] for m in (0.0, 3.0)])

    assert np.all(largest("int8") <= 5 * largest("float32"))


@pytest.mark.slow
@pytest.mark.parametrize("bias_correction", [False, True])
def test_centered_rmsprop_in_low_precision_takes_no_large_step(bias_correction):
    """Dividing by the difference of two rounded moments would cause one."""
    scale = jnp.exp(noise(10_000))
    params = {name: jnp.zeros(SHAPE) for name in ("float32", "bfloat16", "int8")}
    tx = adam_jax.rmsprop(
        1.0,
        decay=0.99,
        centered=True,
        storage=lambda path, leaf: path,
        bias_correction=bias_correction,
    )

    def body(state, t):
        grads = dict.fromkeys(params, scale * (1 + 0.3 * noise(t)))
        updates, state = tx.update(grads, state, params)
        return state, jax.tree.map(lambda u: jnp.abs(u).max(), updates)

    _, sizes = jax.jit(lambda: jax.lax.scan(body, tx.init(params), jnp.arange(300)))()
    largest = {name: x[50:].max() for name, x in sizes.items()}
    assert largest["bfloat16"] <= 5 * largest["float32"]
    assert largest["int8"] <= 5 * largest["float32"]


def test_centered_rmsprop_converts_between_storages():
    make = functools.partial(adam_jax.rmsprop, 1e-2, decay=0.9, centered=True)
    exact, coded = make(bias_correction=True), make(storage="int8")
    params = {"w": noise(0)}
    _, state = exact.update(params, exact.init(params), params)
    there = adam_jax.convert_state(state, coded, params)
    back = adam_jax.convert_state(there, exact, params)
    read, again = adam_jax.moments(state), adam_jax.moments(back)
    for name in ("mu", "nu"):
        largest = jnp.abs(read[name]["w"]).max()
        chex.assert_trees_all_close(again[name]["w"], read[name]["w"], atol=float(largest) / 50)
    assert int(adam_jax.step_count(back)) == 1


@pytest.mark.parametrize("storage", [slowly("bfloat16"), "int8"])
@pytest.mark.parametrize(
    "name", ["adam", "amsgrad", *map(slowly, ("adamax", "adabelief", "rms", "yogi"))]
)
def test_a_large_finite_gradient_makes_nothing_nan(name, storage):
    """The square of the gradient overflows; in float32 only that element's nu is Inf."""
    tx = optimizer(name, 1e-3, storage=storage)
    for size in (2e19, 3e38):
        params = {"w": jnp.zeros((64, 128))}
        state = tx.init(params)
        for t in range(4):
            g = jnp.full((64, 128), 0.1).at[0, 0].set(size if t == 1 else 0.1)
            updates, state = tx.update({"w": g}, state, params)
            params = optax.apply_updates(params, updates)
        assert not jnp.isnan(params["w"]).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_makes_only_its_block_nan(bad):
    tx = adam_jax.adam(1e-3, storage="int8")
    g = {"w": jnp.full((64, 128), 0.1).at[3, 5].set(bad)}
    _, state = tx.update(g, tx.init(g))
    for moment in adam_jax.moments(state).values():
        assert jnp.isnan(moment["w"][3]).all() and not jnp.isnan(moment["w"][4]).any()


@pytest.mark.slow
@pytest.mark.parametrize("max_of", ["corrected", "raw"])
@pytest.mark.parametrize("growing", [False, True])
def test_rounding_does_not_ratchet_a_maximum(max_of, growing):
    """If one element of each block grows, every step rescales the codes of the others."""

    def gradient(t):
        g = jnp.exp(noise(10_000)) * noise(t)
        return g.at[:, ::128].set(10 + 0.1 * t.astype(g.dtype)) if growing else g

    def maximum(storage):
        tx = adam_jax.amsgrad(1e-3, storage=storage, max_of=max_of)
        state, _ = scan(tx, gradient, 1500, lambda u: None)
        return adam_jax.moments(state)["nu_max"]["w"]

    true = maximum("float32")
    for storage, p90 in {"bfloat16": 1.1, "int8": 2.0}.items():
        ratio = np.asarray(maximum(storage) / true)
        assert np.median(ratio) <= 1.02 and np.percentile(ratio, 90) <= p90


def test_a_maximum_is_rounded_down_and_stays():
    """A gradient of 0 changes no bit of the maximum, however often it is stored."""
    tx = adam_jax.amsgrad(1e-3, b2=0.0, storage="int8", max_of="raw")
    grads = {"w": jnp.exp(noise(10_000))}
    _, state = tx.update(grads, tx.init(grads))
    exact = jnp.square(grads["w"])
    first = adam_jax.moments(state)["nu_max"]["w"]
    assert jnp.all(first <= exact * (1 + 1e-6))
    zeros = jax.tree.map(jnp.zeros_like, grads)
    for _ in range(3):
        _, state = tx.update(zeros, state)
    chex.assert_trees_all_equal(adam_jax.moments(state)["nu_max"]["w"], first)


# Random bits


def set_count(state, count):
    return optax.tree_utils.tree_set(state, count=jnp.int32(count))


@pytest.mark.parametrize("count", [10, 2**24 + 1, 2**26, 2**31 - 4])
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_rounding_errors_of_successive_steps_are_independent(storage, count):
    """Compare two steps from one state with consecutive step counts."""
    tx = adam_jax.scale_by_adam(b1=0.5, storage=storage)
    grads = {"w": 1 + 0.3 * noise(0)}

    def error(k):
        _, state = tx.update(grads, set_count(tx.init(grads), count + k))
        error = adam_jax.moments(state)["mu"]["w"] - 0.5 * grads["w"]
        return np.asarray(error).ravel()

    a, b = error(0), error(1)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06  # 5 standard errors


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_moments_keep_moving_at_large_counts(storage):
    """Check that nu follows gradients that fell tenfold, at counts that round to one float32."""
    tx = adam_jax.scale_by_adam(b2=0.99, storage=storage)
    params = {"w": jnp.ones(SHAPE)}
    state = set_count(tx.init(params), 2**26)
    body = lambda s, g: (tx.update({"w": jnp.full(SHAPE, g)}, s)[1], None)  # noqa: E731
    gradients = jnp.concatenate([jnp.ones(300), jnp.full(900, 0.1)])
    state, _ = jax.lax.scan(body, state, gradients)
    nu = np.asarray(adam_jax.moments(state)["nu"]["w"])
    np.testing.assert_allclose(nu.mean(), 0.0101, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.int8, None], ids=["master_weights", "stochastic_rounding"])
def test_rounding_errors_of_parameters_are_independent_along_a_row(dtype):
    params = {"w": jnp.ones((64, 1024), jnp.bfloat16)}
    wrap = adam_jax.stochastic_rounding
    if dtype is not None:
        wrap = functools.partial(adam_jax.master_weights, bits=24)
    step = 2.0**-9 * (1 + 2.0**-10 / 3)  # between two numbers of 16 significant bits
    tx = wrap(optax.sgd(step))
    grads = {"w": jnp.ones((64, 1024), jnp.bfloat16)}
    new, state = adam_jax.apply(tx, grads, tx.init(params), params)
    kept = new["w"].astype(jnp.float32)
    if dtype is not None:
        kept = adam_jax.get_master_weights(new, state)["w"]
    error = np.asarray(kept - (1 - step), np.float64)
    error -= error.mean()
    worst = max(
        abs(np.corrcoef(error[:, lag:].ravel(), error[:, :-lag].ravel())[0, 1])
        for lag in range(1, 256)
    )
    assert worst < 5 / np.sqrt(64 * 768)


# Formats without an effect


def test_a_format_warns_if_no_leaf_is_large_enough():
    small = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    for storage in ("int8", {"nu": "int8"}):
        with pytest.warns(
            UserWarning, match=says("adamw", "storage=", "int8", "4096", "none of 2 leaves")
        ):
            adam_jax.adamw(1e-3, storage=storage).init(small)
    large = small | {"w": jnp.ones((64, 64))}
    adam_jax.adamw(1e-3, storage="int8").init(large)
    adam_jax.adamw(1e-3, storage=lambda path, leaf: "int8").init(small)
    patterns = {"^b$": dict(weight_decay=0.0)}  # whose group has no large leaf
    adam_jax.groups(adam_jax.adamw, patterns, learning_rate=1e-3, storage="int8").init(large)


def test_members_with_different_step_counts_round_independently():
    params = {"w": jnp.ones((4096,), jnp.bfloat16)}
    grads = {"w": jnp.ones((4096,), jnp.bfloat16)}
    tx = adam_jax.stochastic_rounding(optax.sgd(2.0**-10))
    state = tx.init(params)
    members = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    apart = members._replace(step_count=members.step_count + 10**6 * jnp.arange(2))

    def step(state):
        return adam_jax.apply(tx, grads, state, params)[0]["w"]

    together, drawn = jax.vmap(step)(members), jax.vmap(step)(apart)
    assert jnp.array_equal(together[0], together[1])
    assert 0.4 < float(jnp.mean(drawn[0] == drawn[1])) < 0.8

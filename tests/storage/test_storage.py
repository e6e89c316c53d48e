"""Moments in bfloat16 round without bias and don't freeze; `storage=` takes several forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from helpers import stored

# Stochastic rounding to bfloat16


def test_bfloat16_rounds_to_one_of_the_two_neighbors():
    """Round numbers of every size and sign; exact bfloat16 numbers stay exact."""
    rng = np.random.default_rng(0)
    x = rng.choice([-1, 1], size=20_000) * 10.0 ** rng.uniform(-37, 38, size=20_000)
    x = np.concatenate([x, [0, 1, -1, 2.0**127, 2.0**-126, 1 + 2.0**-7]]).astype(np.float32)
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    above = (below.view(np.uint32) + 0x10000).view(np.float32)
    got = np.asarray(stored(x, "bfloat16").signed)
    assert np.all((got == below) | ((got == above) & (x != below)))
    assert 0.4 < np.mean(got == above) < 0.6


def test_bfloat16_rounding_has_no_bias_and_keeps_inf_and_nan():
    x = np.full(200_000, 1 + 0.3 * 2**-7, np.float32)
    mean = np.asarray(stored(x, "bfloat16").signed, np.float64).mean()
    assert mean == pytest.approx(float(x[0]), abs=3e-5)
    odd = np.array([np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(stored(odd, "bfloat16").signed, odd)


def test_random_draws_of_elements_and_of_moments_are_independent():
    """Halfway between two numbers of bfloat16, each draw decides for one of them."""
    x = np.full((512, 512), 1 + 2.0**-8, np.float32)
    moments = stored(x, "bfloat16")
    up, other = (np.asarray(m) > 1.005 for m in (moments.signed, moments.positive))
    assert up.mean() == pytest.approx(0.5, abs=5e-3)
    along_rows = [np.roll(up, by, 1) for by in (1, 2, 16, 89, 128)]
    for shifted in (np.roll(up, 1, 0), other, *along_rows):
        assert abs(np.corrcoef(up.ravel(), shifted.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("b2, steps, within", [(0.999, 2500, 0.05), (0.9999, 25000, 0.1)])
def test_bfloat16_moments_do_not_freeze(b2, steps, within):
    """Rounded to nearest, nu would never decay: 0.999·nu rounds back to nu."""
    params = {"w": jnp.zeros((64, 32), jnp.bfloat16)}
    tx = adam_jax.scale_by_adam(b2=b2)
    full = adam_jax.scale_by_adam(b2=b2, storage="float32")

    def run(tx):
        def steps_at(size, state, length):
            g = {"w": jnp.full((64, 32), size, jnp.bfloat16)}
            return jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), state, length=length)[0]

        return steps_at(0.1, steps_at(1.0, tx.init(params), 1000), steps)

    got = adam_jax.moments(jax.jit(run, static_argnums=0)(tx))["nu"]["w"]
    expected = adam_jax.moments(jax.jit(run, static_argnums=0)(full))["nu"]["w"]
    assert jnp.mean(got) == pytest.approx(float(jnp.mean(expected)), rel=within)


def test_equal_leaves_are_rounded_independently_and_reproducibly():
    params = {"a": jnp.ones((64, 8), jnp.bfloat16), "b": jnp.ones((64, 8), jnp.bfloat16)}
    grads = jax.tree.map(lambda p: p * jnp.bfloat16(0.3), params)
    tx = adam_jax.scale_by_adam()
    first, second = (tx.update(grads, tx.init(params))[1] for _ in range(2))
    np.testing.assert_array_equal(first.mu["a"], second.mu["a"])
    assert 0.2 < np.mean(np.asarray(first.mu["a"] != first.mu["b"])) < 0.8


def test_storage_takes_a_name_a_dtype_a_mapping_or_a_function():
    params = {"dense": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    seen = []

    def by_leaf(path, leaf):
        seen.append((path, leaf.shape))
        return "bfloat16" if leaf.ndim == 2 else None

    for storage, mu, nu in [
        (None, "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        (jnp.bfloat16, "bfloat16", "bfloat16"),
        ({"mu": "bfloat16"}, "bfloat16", "float32"),
        (by_leaf, "bfloat16", "bfloat16"),
    ]:
        state = adam_jax.adamw(1e-3, storage=storage).init(params)[0]
        assert state.mu["dense"]["kernel"].dtype == mu
        assert state.nu["dense"]["kernel"].dtype == nu
    assert state.mu["dense"]["bias"].dtype == jnp.float32
    assert set(seen) == {("dense/kernel", (8, 8)), ("dense/bias", (8,))}


def test_mu_dtype_is_storage_for_mu():
    params = jnp.ones(4)
    state = adam_jax.adamw(1e-3, mu_dtype=jnp.bfloat16, storage={"nu": "bfloat16"}).init(params)[0]
    assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_a_state_without_a_step_count_rounds_to_nearest_as_in_optax():
    params = jnp.linspace(0.1, 1.0, 64).astype(jnp.bfloat16)
    ours, theirs = adam_jax.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)
    state, other = ours.init(params), theirs.init(params)
    _, state = ours.update(params, state)
    _, other = theirs.update(params, other)
    np.testing.assert_array_equal(state[0].trace, other[0].trace)


@pytest.mark.parametrize("storage", ["float32", "int8", adam_jax.storage.mean(-1)])
def test_a_moment_may_start_at_a_function_of_the_parameter(storage):
    @adam_jax.rule(nu=adam_jax.positive.starting_at(jnp.abs))
    def keep(g, nu):
        return g, nu

    params = jnp.linspace(-1, 1, 8192).reshape(64, 128)
    moment = adam_jax.moments(adam_jax.scale_by_rule(keep, storage=storage).init(params))["nu"]
    expected = np.abs(params)
    if moment.shape != params.shape:
        expected = expected.mean(-1, keepdims=True)
    np.testing.assert_allclose(moment, expected, atol=0.01)

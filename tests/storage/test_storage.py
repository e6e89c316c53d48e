"""Moments in low precision: what they hold after many steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import adam_jax
from adam_jax.storage import _random_bits
from adam_jax.storage._dense import stochastic_bfloat16


def random_bits(key, shape):
    return _random_bits.random_bits(jnp.uint32(key), jnp.uint32(1), _random_bits.positions(shape))


finite = st.floats(-(2.0**127), 2.0**127, width=32).filter(lambda x: x == 0 or abs(x) > 1e-37)


@given(finite, st.integers(0, 2**32 - 1))
def test_stochastic_rounding_takes_a_neighbour(x, bits):
    low = np.array(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    got = np.asarray(stochastic_bfloat16(jnp.float32(x), jnp.uint32(bits))).astype(np.float32)
    exact = low == np.array(x, np.float32).view(np.uint32)
    up = (low + np.uint32(0x10000)).view(np.float32)
    assert got in ((low.view(np.float32),) if exact else (low.view(np.float32), up))


def test_stochastic_rounding_is_unbiased_and_leaves_inf_and_nan():
    x = jnp.float32(1 + 0.3 * 2**-7) * jnp.ones(200_000)
    bits = random_bits(7, x.shape)
    rounded = stochastic_bfloat16(x, bits).astype(jnp.float32)
    assert np.asarray(rounded, np.float64).mean() == pytest.approx(float(x[0]), abs=3e-5)
    odd = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(
        stochastic_bfloat16(odd, jnp.full(3, 0xFFFF, jnp.uint32)).astype(jnp.float32), odd
    )


def test_random_bits_look_random():
    bits = np.asarray(random_bits(3, (512, 512)))
    assert len(np.unique(bits)) > 0.99 * (bits.size - bits.size**2 / 2**33)
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert ones == pytest.approx(0.5, abs=1e-3)
    lanes = [np.roll(bits, by, 1) for by in (1, 2, 16, 89, 128)]
    for shifted in (np.roll(bits, 1, 0), random_bits(4, bits.shape), *lanes):
        correlation = np.corrcoef(bits.ravel() / 2**32, np.asarray(shifted).ravel() / 2**32)[0, 1]
        assert abs(correlation) < 0.01


@pytest.mark.parametrize("b2, steps, within", [(0.999, 2500, 0.05), (0.9999, 25000, 0.1)])
def test_bfloat16_nu_follows_gradients_that_fall(b2, steps, within):
    """To the nearest it would never decay: bf16(0.999)·nu rounds back to nu."""
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


def test_equal_leaves_are_rounded_independently_and_every_run_alike():
    params = {"a": jnp.ones((64, 8), jnp.bfloat16), "b": jnp.ones((64, 8), jnp.bfloat16)}
    grads = jax.tree.map(lambda p: p * jnp.bfloat16(0.3), params)
    tx = adam_jax.scale_by_adam()
    first, second = (tx.update(grads, tx.init(params))[1] for _ in range(2))
    np.testing.assert_array_equal(first.mu["a"], second.mu["a"])
    assert 0.2 < np.mean(np.asarray(first.mu["a"] != first.mu["b"])) < 0.8


def test_storage_by_name_dtype_mapping_and_function():
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


def test_a_state_without_a_count_rounds_to_the_nearest_as_optax_does():
    params = jnp.linspace(0.1, 1.0, 64).astype(jnp.bfloat16)
    ours, theirs = adam_jax.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)
    state, other = ours.init(params), theirs.init(params)
    _, state = ours.update(params, state)
    _, other = theirs.update(params, other)
    np.testing.assert_array_equal(state[0].trace, other[0].trace)

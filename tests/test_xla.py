"""Plain XLA on one CPU: what is stored waits for the result, so that XLA writes it in place."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import optimizer

import adam_jax

SHAPE = (509, 1031)  # no other test's, so that nothing traced is there already
LIKE_ADAM = ["adam", "nadam", "radam", "ademamix", "yogi", "lion", "adam_atan2"]


def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("name", LIKE_ADAM)
def test_bfloat16_state_is_written_in_place(name, monkeypatch):
    one_device(monkeypatch)
    tx = optimizer(name, storage="bfloat16")
    p = jax.ShapeDtypeStruct(SHAPE, jnp.float32)

    def step(params, state, grads):
        return adam_jax.apply(tx, grads, state, params)

    state = jax.eval_shape(tx.init, p)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(p, state, p).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10_000


def test_the_order_changes_nothing(monkeypatch):
    """Also where the element that is waited for is NaN or Inf."""
    shape = (33, 130)
    tx = adam_jax.adamw(1e-3, storage="bfloat16")
    grads = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    grads[1, 0, 0], grads[2, 0, 0] = np.inf, np.nan

    def run():
        jax.clear_caches()
        params = jnp.ones(shape)
        state = tx.init(params)
        for g in grads:
            params, state = jax.jit(lambda p, s, g: adam_jax.apply(tx, g, s, p))(params, state, g)
        return params, state

    before = run()
    one_device(monkeypatch)
    chex.assert_trees_all_close(run(), before, rtol=1e-6)

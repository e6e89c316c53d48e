"""Plain XLA on one CPU: what is stored waits for the parameter, so that XLA writes it in place."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax
from helpers import optimizer, step_of

SHAPE = (509, 1031)
LIKE_ADAM = ["adam", "nadam", "radam", "ademamix", "yogi", "lion", "adam_atan2"]


def applied(tx):
    return lambda params, state, grads: adam_jax.apply(tx, grads, state, params)


WAYS = [applied, step_of]  # by update and optax.apply_updates


@pytest.mark.standard_promotion
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("name", LIKE_ADAM)
def test_bfloat16_state_is_written_in_place(name, dtypes, way):
    tx = optimizer(name, storage="bfloat16")
    p, g = (jax.ShapeDtypeStruct(SHAPE, dtype) for dtype in dtypes)
    state = jax.eval_shape(tx.init, p)
    compiled = jax.jit(way(tx), donate_argnums=(0, 1)).lower(p, state, g).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10_000


@pytest.mark.parametrize("way", WAYS)
def test_the_order_changes_nothing(way, monkeypatch):
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
            params, state = jax.jit(way(tx))(params, state, g)
        return params, state

    ordered = run()
    monkeypatch.setattr(jax, "device_count", lambda: 8)  # where XLA chooses the order
    chex.assert_trees_all_close(ordered, run(), rtol=1e-6)

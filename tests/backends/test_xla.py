"""On one CPU, XLA writes bfloat16 state in place, because its writes come last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax
from helpers import optimizer, step_of

SHAPE = (509, 1031)
LIKE_ADAM = ["adam", "ademamix", "lion"]


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
def test_a_nan_or_inf_stays_in_its_element(way):
    """Writes of the state depend on the parameter's first element, to order them."""
    shape = (33, 130)
    grads = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    grads[1, 0, 0], grads[2, 0, 0] = np.inf, np.nan

    def run(storage):
        tx = adam_jax.adamw(1e-3, storage=storage)
        step, params = jax.jit(way(tx)), jnp.ones(shape)
        state = tx.init(params)
        for g in grads:
            params, state = step(params, state, g)
        return params, adam_jax.moments(state)

    (params, moments), (exact_params, exact) = run("bfloat16"), run("float32")
    np.testing.assert_allclose(params, exact_params, rtol=1e-4)
    for name, moment in moments.items():
        np.testing.assert_allclose(moment, exact[name], rtol=2e-2, atol=5e-3)

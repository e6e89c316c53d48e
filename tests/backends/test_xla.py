"""On one CPU, XLA writes bfloat16 state in place, because its writes come last."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import adam_jax
from helpers import QUICKLY, normal, optimizer, slowly, step_of

SHAPE = (509, 1031)
LIKE_ADAM = ["adam", "ademamix", "lion"]


def applied(tx):
    return lambda params, state, grads: adam_jax.apply(tx, grads, state, params)


WAYS = [applied, step_of]  # adam_jax.apply; update and optax.apply_updates


@pytest.mark.standard_promotion
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "dtypes",
    [slowly(("float32", "float32")), ("float32", "bfloat16")],
)
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


TPU = AbstractMesh((), (), abstract_device=AbstractDevice("TPU v5 lite", 1, platform="tpu"))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "compact"])
def test_a_step_traced_for_tpu_gives_the_same_results(storage):
    """It views leaves in the layout of a TPU's memory, if their rows and columns fill its tiles."""
    shapes = {"tiles": (32, 384), "many axes": (2, 3, 16, 256), "rows": (36, 256), "row": (64, 100)}
    params, grads = (
        {name: normal(shape, seed=k) for name, shape in shapes.items()} for k in range(2)
    )
    tx = adam_jax.adamw(1e-3, storage=storage, implementation="xla")
    state = tx.init(params)

    def result(mesh):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(applied(tx)).trace(params, state, grads)
            step = traced.lower(lowering_platforms=("cpu",)).compile(QUICKLY)
        return step(params, state, grads), step.as_text()

    (new, text), (expected, other_text) = result(TPU), result(AbstractMesh((), ()))
    assert ",3,8,128]" in text and ",2,8,128]" in text  # 8 rows, 128 columns
    assert ",8,128]" not in other_text
    chex.assert_trees_all_close(new[0], expected[0], rtol=1e-6, atol=1e-6)
    for x, y in zip(*map(jax.tree.leaves, (new[1], expected[1])), strict=True):
        if jnp.issubdtype(x.dtype, jnp.integer):
            assert np.mean(x != y) < 1e-3  # a last bit may change a code
        else:
            np.testing.assert_allclose(x, y, rtol=1e-6)

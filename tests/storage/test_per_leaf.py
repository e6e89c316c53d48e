"""Moments with one number per leaf."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import adam_jax
from adam_jax import positive, rule, signed
from helpers import every_mode, says, slowly


@rule(mu=signed, number=positive.per_leaf().starting_at("start"), mean_square=positive.per_leaf())
def numbers(g, mu, number, mean_square, *, mean, b1=0.9):
    """Keep a number, and the mean of g²."""
    return g * number, adam_jax.ema(b1, mu, g), number, 0 * mean_square + mean(g * g)


THIRD = np.float32(1 / 3)


def check_numbers(tx, params, grads):
    """Check that the number stays, to the bit, and that mean_square is the mean of g²."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
    for key, g in grads.items():
        assert state.number[key].shape == state.mean_square[key].shape == ()
        assert np.asarray(state.number[key]) == THIRD
        np.testing.assert_allclose(state.mean_square[key], np.mean(np.square(g)), rtol=1e-5)
        np.testing.assert_allclose(updates[key], np.asarray(g) * THIRD, rtol=1e-6)
    return state


@pytest.mark.parametrize("storage", [slowly(None), "int8"])
@pytest.mark.parametrize("implementation", ["xla", "stream", slowly("pallas")])
def test_a_number_per_leaf_is_exact_in_every_backend(implementation, storage):
    rng = np.random.default_rng(0)
    shapes = {"tiles": (515, 300), "vector": (5000,), "stack": (3, 40, 300), "scalar": ()}
    grads = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    tx = adam_jax.scale_by_rule(
        numbers, start=1 / 3, storage=storage, implementation=implementation
    )
    check_numbers(tx, grads, grads)


@pytest.mark.slow
@pytest.mark.eight_devices
@every_mode
@pytest.mark.parametrize("storage", [None, lambda path, leaf: "int8"])
def test_a_number_per_leaf_is_exact_on_sharded_leaves(axis_type, storage):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    specs = {"rows": P("data", None), "columns": P(None, "data"), "replicated": P(None, None)}
    rng = np.random.default_rng(0)
    grads = {
        k: jax.device_put(
            jnp.asarray(rng.normal(size=(16, 384)), jnp.float32), NamedSharding(mesh, spec)
        )
        for k, spec in specs.items()
    }
    for implementation in ("xla", "stream"):
        tx = adam_jax.scale_by_rule(
            numbers, start=1 / 3, storage=storage, implementation=implementation
        )
        state = check_numbers(tx, grads, grads)
        assert all(x.sharding.is_fully_replicated for x in state.number.values())
        sharding = adam_jax.state_sharding(tx, grads)
        assert all(s.spec == P() for s in sharding.number.values())


def test_a_number_per_leaf_is_float32_in_every_storage():
    params = {"w": jnp.ones((64, 128), jnp.bfloat16)}
    for storage in (
        "int8",
        {"number": "int8"},
        {"positive": "bfloat16"},
        lambda path, leaf: "int8",
    ):
        state = adam_jax.scale_by_rule(numbers, start=1 / 3, storage=storage).init(params)
        assert state.number["w"].dtype == state.mean_square["w"].dtype == jnp.float32
        read = adam_jax.moments(state)
        assert (read["number"]["w"].shape, read["mu"]["w"].shape) == ((), (64, 128))
    with pytest.raises(
        ValueError, match=says("numbers", "storage=factored", "non-negative average")
    ):
        adam_jax.scale_by_rule(numbers, start=1 / 3, storage="factored")


def test_members_under_vmap_have_their_own_number_per_leaf():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    tx = adam_jax.novograd(0.1)
    together = jax.vmap(lambda g: tx.update(g, tx.init(g), g))(g)
    for k in range(2):
        alone = tx.update(g[k], tx.init(g[k]), g[k])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, k=k: x[k], together), alone, rtol=1e-5, atol=1e-7
        )


def test_a_number_per_leaf_of_another_shape_is_an_error():
    params = {"w": jnp.ones((4, 3))}
    tx = adam_jax.novograd(0.1)
    (state, rest) = tx.init(params)
    wrong = state._replace(nu={"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=says("novograd", "nu of 'w'", "one number", "(3,)")):
        tx.update(params, (wrong, rest), params)


def test_convert_state_keeps_numbers_per_leaf():
    params = {"w": jnp.ones((64, 128))}
    plain, quantized = adam_jax.novograd(0.1), adam_jax.novograd(0.1, storage="int8")
    _, state = optax.novograd(0.1).update(params, optax.novograd(0.1).init(params), params)
    converted = adam_jax.convert_state(state, quantized, params)
    chex.assert_trees_all_equal(converted[0].nu, state[0].nu)
    back = adam_jax.convert_state(converted, plain, params)
    chex.assert_trees_all_close(back[0].mu, state[0].mu, rtol=1e-2)

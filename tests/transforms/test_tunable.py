"""Hyperparameters in the state."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adam_jax
from adam_jax import get_hyperparams, set_hyperparams, tunable
from helpers import says, slowly, traces

PARAMS = {"head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "norm": jnp.ones(4)}
standard = pytest.mark.standard_promotion


def schedule(count):
    return 1e-3 * (count.astype(jnp.float32) + 1)


@pytest.mark.parametrize(
    "name", ["adamw", "schedule_free_adamw", *map(slowly, ("rmsprop", "yogi", "ademamix"))]
)
def test_tunable_is_the_plain_optimizer_until_a_value_is_set(name):
    make = getattr(adam_jax, name)
    tuned, plain = tunable(make)(1e-2), make(1e-2)
    states = [tx.init(PARAMS) for tx in (tuned, plain)]
    for _ in range(2):
        (u, a), (v, b) = (
            tx.update(PARAMS, s, PARAMS) for tx, s in zip((tuned, plain), states, strict=True)
        )
        states = [a, b]
        chex.assert_trees_all_close(u, v, rtol=1e-6, atol=1e-9)
    assert repr(tuned).startswith(f"tunable({name})(learning_rate=0.01")


def test_tunable_keeps_the_digits_of_decay_rates():
    tx = tunable(adam_jax.adam)(1e-3, b2=0.999999)
    u, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(u["norm"], -1e-3, rtol=1e-6)


def test_a_set_value_overrides_its_schedule_until_none():
    tx = tunable(adam_jax.sgd)(schedule)
    state = tx.init(PARAMS)
    seen = []
    for value in (..., 0.5, ..., None, ...):
        if value is not ...:
            state = set_hyperparams(state, learning_rate=value)
        updates, state = tx.update(PARAMS, state, PARAMS)
        np.testing.assert_allclose(-updates["norm"][0], get_hyperparams(state)["learning_rate"])
        seen.append(float(get_hyperparams(state)["learning_rate"]))
    np.testing.assert_allclose(seen, [1e-3, 0.5, 0.5, 4e-3, 5e-3], rtol=1e-6)


def test_get_hyperparams_reads_what_set_hyperparams_wrote():
    state = tunable(adam_jax.adamw)(1e-3).init(PARAMS)
    state = set_hyperparams(state, b2=0.9, weight_decay=0.3)
    got = get_hyperparams(state)
    assert {v.dtype for v in got.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose([got["b2"], got["weight_decay"]], [0.9, 0.3], rtol=1e-6)


@standard
def test_setting_hyperparams_never_retraces():
    tx = tunable(adam_jax.adamw)(1e-3, weight_decay=0.1)

    @jax.jit
    def step(state):
        return tx.update(PARAMS, state, PARAMS)

    state, eager = tx.init(PARAMS), tx.init(PARAMS)
    traced = []
    for scale in (1.0, 0.9, 0.8):
        given = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        given = {k: scale * v for k, v in given.items()}
        with traces() as names:
            u, state = step(set_hyperparams(state, **given))
            v, eager = tx.update(PARAMS, set_hyperparams(eager, **given), PARAMS)
        chex.assert_trees_all_close(u, v, rtol=1e-5)
        traced.append(names)
    assert not traced[-1]


def test_a_vmapped_sweep_equals_its_single_runs():
    rates, decays = (
        x.ravel() for x in jnp.meshgrid(jnp.logspace(-4, -1, 8), jnp.linspace(0, 1, 8))
    )
    tx = tunable(adam_jax.adamw)(1e-3, storage="float32")

    def run(rate, decay):
        state = set_hyperparams(tx.init(PARAMS), learning_rate=rate, weight_decay=decay)
        params = PARAMS
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    together = jax.jit(jax.vmap(run))(rates, decays)
    alone = jax.jit(run)
    for i in range(64):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), alone(rates[i], decays[i]), rtol=1e-5
        )


@standard
def test_hyperparams_are_found_through_wrappers():
    tx = optax.MultiSteps(
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.masked(tunable(adam_jax.adamw)(1e-3), True)
        ),
        2,
    )
    state = set_hyperparams(tx.init(PARAMS), learning_rate=0.5)
    assert get_hyperparams(state)["learning_rate"] == 0.5


def test_hyperparams_are_found_in_nnx():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tunable(adam_jax.sgd)(1e-3), wrt=nnx.Param)
    optimizer.opt_state = nnx.data(set_hyperparams(optimizer.opt_state, learning_rate=0.5))
    assert get_hyperparams(optimizer.opt_state)["learning_rate"] == 0.5
    before = model.bias[...]
    optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 3))).sum())(model))
    np.testing.assert_allclose(model.bias[...], before - 0.5)
    assert get_hyperparams(optimizer.opt_state)["learning_rate"] == 0.5


@pytest.mark.parametrize(
    "call, parts",
    [
        (lambda s: set_hyperparams(s, b2=1.5), ("set_hyperparams", "b2", "[0, 1)", "1.5")),
        (lambda s: set_hyperparams(s, momentum=0.5), ("set_hyperparams", "'momentum'", "b1")),
        (
            lambda s: set_hyperparams(s, learning_rate=schedule),
            ("set_hyperparams", "learning_rate", "schedule"),
        ),
        (lambda s: get_hyperparams(s, group="x"), ("get_hyperparams", "group", "'x'")),
        (lambda s: get_hyperparams((s, s)), ("get_hyperparams", "name the group")),
        (lambda s: get_hyperparams(s.inner_state), ("get_hyperparams", "tunable(")),
    ],
)
def test_wrong_hyperparams_are_errors(call, parts):
    with pytest.raises((ValueError, TypeError), match=says(*parts)):
        call(tunable(adam_jax.adamw)(1e-3).init(PARAMS))

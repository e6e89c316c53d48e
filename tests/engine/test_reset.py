"""`reset_step_count` restarts the counts next to moments, in the state of any chain."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adam_jax
from adam_jax import reset_step_count, step_count
from helpers import FINISHED, leaves_of, other_rules_slowly, says, slowly

PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}


def after(tx, params=PARAMS, steps=3):
    """Return the state after some steps."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        _, state = update(params, state, params)
    return state


def warmup(count):
    return 1e-3 * jnp.asarray(count + 1, jnp.float32)


CHAINS = {
    "direction": lambda: adam_jax.scale_by_adam(),
    "schedule": lambda: adam_jax.adamw(warmup),
    "two counts": lambda: adam_jax.ademamix(1e-3),
    "optax": lambda: optax.chain(optax.clip(1.0), optax.adamw(1e-3)),
    "chain": lambda: adam_jax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.adamw(1e-3)),
    "masked": lambda: optax.masked(adam_jax.adam(1e-3), {"kernel": True, "bias": False}),
    "tunable": lambda: adam_jax.tunable(adam_jax.adamw)(1e-3),
    "int8": lambda: adam_jax.adamw(1e-3, storage=lambda path, leaf: "int8"),
    "masters": lambda: adam_jax.master_weights(adam_jax.adamw(1e-3)),
    "record": lambda: adam_jax.diagnostics.record(adam_jax.adamw(1e-3)),
    "schedule-free": lambda: adam_jax.schedule_free_adamw(1e-3),
    "scalars": lambda: adam_jax.prodigy(),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "name",
    [slowly(name) if name in ("int8", "masters", "record") else name for name in CHAINS],
)
def test_only_counts_next_to_moments_restart(name):
    tx = CHAINS[name]()
    state = after(tx)
    new = jax.jit(reset_step_count)(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert step_count(state) == 3 and step_count(new) == 0
    pairs = zip(leaves_of(new), jax.tree.leaves(state), strict=True)
    changed = {path: x for (path, x), old in pairs if not np.array_equal(x, old)}
    assert {path.rsplit("/", 1)[-1] for path in changed} <= {"count", "count_m2"}
    assert changed and all(x == 0 for x in changed.values())


def test_the_learning_rate_schedule_continues_after_a_reset():
    tx = adam_jax.adamw(warmup)
    state = reset_step_count(after(tx))
    assert (state[0].count, state[2].count) == (0, 3)


def test_the_step_after_a_reset_corrects_biases_as_the_first_step():
    """Compare with the formula of Ellis et al. (2024): t = 1 in both bias corrections."""
    tx = adam_jax.adam(1.0, b1=0.9, b2=0.999, eps=0.0)
    g = {"kernel": jnp.ones((2, 3)), "bias": jnp.full(3, -2.0)}
    state = after(tx, g, 200)
    updates, new = tx.update(g, reset_step_count(state), g)
    moments = adam_jax.moments(new)
    expected = jax.tree.map(
        lambda m, v: -(m / 0.1) / jnp.sqrt(v / 0.001), moments["mu"], moments["nu"]
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    assert step_count(new) == 1


def test_a_pattern_selects_groups_by_label():
    tx = adam_jax.groups(
        adam_jax.tunable(adam_jax.adamw), {"bias|norm": {"weight_decay": 0.0}}, learning_rate=1e-3
    )
    state = after(tx)

    def counts(pattern):
        groups = reset_step_count(state, pattern).inner_states
        return {label: int(step_count(s.inner_state.inner_state)) for label, s in groups.items()}

    assert counts("norm") == {"bias|norm": 0, "default": 3}
    assert counts("^default$") == {"bias|norm": 3, "default": 0}
    assert counts(None) == {"bias|norm": 0, "default": 0}


def test_members_of_a_population_restart():
    tx = adam_jax.adamw(1e-3)
    params = jnp.ones((4, 3))
    states = jax.vmap(tx.init)(params)
    _, states = jax.vmap(tx.update)(params, states, params)
    new = jax.vmap(reset_step_count)(states)
    np.testing.assert_array_equal(new[0].count, np.zeros(4))
    chex.assert_trees_all_equal(new[0].mu, states[0].mu)


def test_an_nnx_optimizer_continues():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adam_jax.adamw(1e-3), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model)
    optimizer.update(model, grads)
    optimizer.opt_state = reset_step_count(optimizer.opt_state)
    assert step_count(optimizer.opt_state) == 0
    optimizer.update(model, grads)
    assert step_count(optimizer.opt_state) == 1


@other_rules_slowly(FINISHED)
def test_a_step_after_a_reset_has_the_same_types(name):
    tx = FINISHED[name](1e-3, storage="float32")
    if name in ("sgd", "rmsprop"):
        pytest.skip("has no step count")
    state = after(tx)
    new = reset_step_count(state)
    updates, after_it = tx.update(PARAMS, new, PARAMS)
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(after_it, state)


def test_nothing_to_reset_is_an_error():
    with pytest.raises(ValueError, match=says("reset_step_count", "step count", "got none")):
        reset_step_count(adam_jax.sgd(1e-3, 0.9).init(PARAMS))
    grouped = adam_jax.groups(adam_jax.adamw, {"bias": {}}, learning_rate=1e-3).init(PARAMS)
    with pytest.raises(ValueError, match=says("reset_step_count", "'critic'", "group")):
        reset_step_count(grouped, "critic")
    with pytest.raises(ValueError, match=says("reset_step_count", "regular expression", "'['")):
        reset_step_count(grouped, "[")

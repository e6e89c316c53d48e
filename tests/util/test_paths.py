"""Every leaf has a path that patterns match; two leaves may have the same path."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax

ATTENTION = {"query": jnp.ones(2), "key": jnp.ones(2), "value": jnp.ones(2)}
CLASH = {"a/b": jnp.full((64, 128), 3.0), "a": {"b": jnp.full((64, 128), -4.0)}}


class Pair(NamedTuple):
    key: object
    value: object


@pytest.mark.parametrize("tree", [{"attn": ATTENTION}, {"attn": Pair(jnp.ones(2), jnp.ones(2))}])
def test_a_leaf_called_value_is_found_by_that_name(tree):
    mask = adam_jax.not_matching("query", "key", "value")
    tx = adam_jax.adamw(1.0, weight_decay=1.0, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = tx.update(zeros, tx.init(tree), tree)
    chex.assert_trees_all_equal(updates, zeros)
    seen = []
    adam_jax.adamw(1e-3, storage=lambda path, leaf: seen.append(path)).init(tree)
    assert "attn/value" in seen


def test_leaves_with_the_same_path_keep_their_own_moments():
    exact = adam_jax.adamw(1e-3)
    tx = adam_jax.diagnostics.record(adam_jax.adamw(1e-3, storage="int8"), every=1)
    _, state = tx.update(CLASH, tx.init(CLASH), CLASH)
    norm = adam_jax.diagnostics.read(state)["gradient_norm/all"]
    np.testing.assert_allclose(norm, optax.tree.norm(CLASH), rtol=1e-6)
    chex.assert_trees_all_close(
        adam_jax.moments(state)["mu"], jax.tree.map(lambda g: 0.1 * g, CLASH), rtol=1e-5
    )
    back = adam_jax.convert_state(state.inner_state, exact, CLASH)
    chex.assert_trees_all_close(adam_jax.moments(back), adam_jax.moments(state))
    assert len(adam_jax.diagnostics.storage_error(state)) == 4


def test_leaves_with_the_same_path_are_rounded_independently():
    params = jax.tree.map(lambda x: jnp.ones((64, 128), jnp.bfloat16), CLASH)
    grads = jax.tree.map(lambda x: jnp.full((64, 128), 0.25, jnp.bfloat16), CLASH)
    tx = adam_jax.stochastic_rounding(optax.sgd(2.0**-8))
    new, _ = adam_jax.apply(tx, grads, tx.init(params), params)
    same = np.mean(np.asarray(new["a/b"] == new["a"]["b"], np.float32))
    assert 0.4 < same < 0.8  # 1 if they shared draws, p² + (1 - p)² if not

"""Parameter groups, by patterns of their paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import adam_jax
from adam_jax import get_hyperparams, groups, set_hyperparams, tunable
from helpers import says

PARAMS = {"head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "norm": jnp.ones(4)}


def schedule(count):
    return 1e-3 * (count.astype(jnp.float32) + 1)


def test_groups_are_chosen_by_path():
    muon = optax.sgd(7.0)
    tx = groups(
        adam_jax.adamw,
        {
            r"bias|norm": dict(weight_decay=0.0),
            r"^head/kernel": dict(learning_rate_factor=0.1),
            r"^embed": "frozen",
            r"^other": muon,
        },
        learning_rate=1e-2,
        weight_decay=0.5,
    )
    params = PARAMS | {"embed": jnp.ones(2), "other": jnp.ones(2), "rest": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params), params)
    rates = jax.tree.map(lambda u: round(float(-u.ravel()[0]), 5), updates)
    assert rates == {
        "head": {"kernel": 0.0015, "bias": 0.01},
        "norm": 0.01,
        "embed": 0.0,
        "other": 7.0,
        "rest": 0.015,
    }


def test_learning_rate_factor_multiplies_a_schedule():
    tx = groups(adam_jax.sgd, {"norm": dict(learning_rate_factor=0.5)}, learning_rate=schedule)
    state = tx.init(PARAMS)
    for step in (1, 2):
        updates, state = tx.update(PARAMS, state, PARAMS)
        np.testing.assert_allclose(updates["norm"], -0.5e-3 * step, rtol=1e-6)
        np.testing.assert_allclose(updates["head"]["bias"], -1e-3 * step, rtol=1e-6)


def test_one_group_can_be_tuned():
    tx = groups(tunable(adam_jax.sgd), {"norm": dict(learning_rate=1.0)}, learning_rate=2.0)
    state = set_hyperparams(tx.init(PARAMS), group="norm", learning_rate=3.0)
    updates, state = tx.update(PARAMS, state, PARAMS)
    assert (updates["norm"][0], updates["head"]["bias"][0]) == (-3, -2)
    assert get_hyperparams(state, group="default")["learning_rate"] == 2
    with pytest.raises(ValueError, match=says("get_hyperparams", "name the group")):
        get_hyperparams(state)


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.LayerNorm()(linen.Dense(4)(x))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda r: nnx.Linear(3, 3, rngs=r))(rngs.split(2))
        self.norm = nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(x @ self.layers.kernel[0] + self.layers.bias[1][None])


@pytest.mark.slow
@jax.numpy_rank_promotion("allow")  # which Flax's norms need
def test_patterns_match_the_same_leaves_in_linen_and_nnx():
    def make():
        return groups(adam_jax.sgd, {r"bias|[Nn]orm": "frozen"}, learning_rate=1.0)

    params = Dense().init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = make()
    updates, _ = tx.update(params, tx.init(params), params)
    moved = jax.tree.map(lambda u, p: bool(jnp.any(u != 0)), updates, params)
    assert moved == {
        "Dense_0": {"kernel": True, "bias": False},
        "LayerNorm_0": {"scale": False, "bias": False},
    }

    model = Layers(nnx.Rngs(0))
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: (m(jnp.ones((1, 3))) ** 3).sum())(model))
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(jnp.any(a != b))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        )
    }
    assert {k for k, v in changed.items() if v} == {"layers/kernel"}


@pytest.mark.parametrize(
    "patterns, parts",
    [
        ({"nothing": "frozen"}, ("groups", "'nothing'", "no parameter", "head/bias, head/kernel")),
        ({"head": {}, "bias": {}}, ("groups", "'head/bias'", "'head'", "'bias'")),
        ({"head": "froze"}, ("groups", "'froze'", "mapping", "'frozen'", "Optax transformation")),
        ({"(": "frozen"}, ("groups", "'('", "regular expression")),
        (
            {"head": dict(learning_rate_factor=2, learning_rate=1.0)},
            ("groups", "'head'", "learning_rate_factor"),
        ),
        ({"head": dict(learn=1)}, ("sgd", "'learn'")),
    ],
)
def test_wrong_groups_are_errors(patterns, parts):
    with pytest.raises((ValueError, TypeError), match=says(*parts)):
        groups(adam_jax.sgd, patterns, learning_rate=1.0).init(PARAMS)

"""`chain` equals `optax.chain`, also if it clips inside the step that follows."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adam_jax
from helpers import says, tree

CLIP = adam_jax.clip_by_global_norm(0.5)
CLIPS = {"ours": CLIP, "optax": optax.clip_by_global_norm(0.5)}
CHAINS = {
    "clip and optimizer": lambda clip: (clip, adam_jax.adamw(1e-2, weight_decay=0.1)),
    "clip and direction": lambda clip: (clip, adam_jax.scale_by_adam(), optax.scale(-1e-2)),
    "a mask": lambda clip: (
        clip,
        adam_jax.adamw(1e-2, weight_decay=0.1, weight_decay_mask=adam_jax.not_matching("scale")),
    ),
    "cautious": lambda clip: (clip, adam_jax.adamw(1e-2, cautious=True)),
    "l2": lambda clip: (clip, adam_jax.adam(1e-2, weight_decay=0.1, weight_decay_form="l2")),
    "difference of gradients": lambda clip: (clip, adam_jax.adan(1e-2)),
    "clip twice": lambda clip: (clip, clip, adam_jax.lamb(1e-2, weight_decay=0.1)),
    "clip last": lambda clip: (adam_jax.adam(1e-2), clip),
    "of Optax alone": lambda clip: (clip, optax.adam(1e-2)),
    "clip in a wrapper": lambda clip: (clip, adam_jax.mars(adam_jax.adam(1e-2))),
}


LIKE_OTHERS = ("clip and optimizer", "clip and direction", "cautious", "of Optax alone")


@pytest.mark.parametrize(
    "name, clip",
    [
        pytest.param(name, clip, marks=pytest.mark.slow if name in LIKE_OTHERS else ())
        for name, clip in (
            *((name, "ours") for name in CHAINS),
            *((name, "optax") for name in ("clip and optimizer", "a mask")),
        )
    ],
)
@pytest.mark.standard_promotion
def test_chain_equals_optax_chain(name, clip):
    """Step with gradients below the limit and above it."""
    params = tree(0)
    ours = adam_jax.chain(*CHAINS[name](CLIPS[clip]))
    theirs = optax.chain(*CHAINS[name](CLIPS["optax"]))
    states = [tx.init(params) for tx in (ours, theirs)]
    chex.assert_trees_all_equal(*states)
    steps = [jax.jit(tx.update) for tx in (ours, theirs)]
    for scale in (1e-3, 1.0, 1.0):
        grads = tree(1, scale=scale)
        (u, a), (v, b) = (step(grads, s, params) for step, s in zip(steps, states, strict=True))
        chex.assert_trees_all_equal_structs(a, b)
        chex.assert_trees_all_close((u, a), (v, b), rtol=2e-5, atol=1e-7)
        states = [a, b]


@pytest.mark.standard_promotion
def test_our_clip_works_in_optax_chain():
    params, grads = tree(0), tree(1)
    for parts in ((optax.sgd(0.1),), (adam_jax.sgd(0.1), optax.identity())):
        got, expected = (
            tx.update(grads, tx.init(params), params)[0]
            for tx in (optax.chain(clip, *parts) for clip in CLIPS.values())
        )
        chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-7)


def test_chain_takes_leaves_without_a_gradient_and_extra_arguments():
    params = tree(0)
    grads = tree(1) | {"scale": None}
    tx = adam_jax.chain(CLIP, adam_jax.adamw(1e-2))
    updates, _ = tx.update(grads, tx.init(params), params, value=jnp.float32(1))
    assert updates["scale"] is None
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_clipped_bfloat16_gradients_are_not_rounded_again():
    params = {"w": jnp.ones((8, 8), jnp.bfloat16)}
    grads = {"w": jnp.full((8, 8), 1.01, jnp.bfloat16)}
    tx = adam_jax.chain(CLIP, adam_jax.scale_by_adam(b1=0.0, storage="float32"))
    _, state = tx.update(grads, tx.init(params), params)
    expected = (1.0078125 / optax.tree.norm(grads).astype(jnp.float32)) * 0.5
    chex.assert_trees_all_close(state[1].mu["w"], jnp.full((8, 8), expected), rtol=1e-6)


def test_errors_name_the_function_that_the_user_called():
    params = tree(0)
    tx = adam_jax.chain(CLIP, adam_jax.adamw(1e-2))
    with pytest.raises(ValueError, match=says("chain", "state", "tuple", "2")):
        tx.update(params, tx.init(params)[1:], params)
    with pytest.raises(ValueError, match=says("adamw", "state", "EmptyState", "init")):
        tx.update(params, (optax.EmptyState(), optax.EmptyState()), params)
    with pytest.raises(
        ValueError, match=says("adamw", "weight_decay", "update(gradients, state, params)")
    ):
        tx.update(params, tx.init(params))


def test_an_extra_argument_called_apply_belongs_to_the_user():
    """Optax's chain forwards extra arguments to all parts; we reserve none of their names."""
    params = {"w": jnp.ones(3)}
    adamw = adam_jax.adamw(1e-3)
    wrapped = adam_jax.chain(adamw), adam_jax.tunable(adam_jax.adamw)(1e-3)
    for tx in (adamw, adam_jax.schedule_free_adamw(1e-3), *wrapped):
        chained = optax.chain(tx, optax.identity())
        state = chained.init(params)
        expected, _ = chained.update(params, state, params)
        extra = {"apply": True, "emit_params": True, "beside": params, "grads": params, "extra": 1}
        got, _ = chained.update(params, state, params, **extra)
        chex.assert_trees_all_equal(got, expected)


def test_replacing_a_field_keeps_the_repr_and_the_checks():
    tx = adam_jax.master_weights(adam_jax.adamw(1e-3))
    replaced = tx._replace(init=tx.init)
    assert repr(replaced) == repr(tx)
    with pytest.raises(ValueError, match="outermost"):
        adam_jax.chain(replaced, optax.scale(0.5))

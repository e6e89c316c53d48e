"""Wrappers of a direction or an optimizer: cautious, grams, mars, and grokfast."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
import reference
from helpers import (
    DECAYED,
    FINISHED,
    every_optimizer,
    gradients_with_everything,
    other_rules_slowly,
    run_reference,
    says,
    updates_over,
)


@pytest.mark.parametrize("wrapper", ["cautious", "grams"])
@pytest.mark.parametrize("inner", [adam_jax.scale_by_adam, optax.scale_by_adam])
def test_cautious_and_grams_wrap_any_direction(wrapper, inner):
    g = gradients_with_everything(20)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        tx = getattr(adam_jax, wrapper)(inner())
        got = updates_over(tx, g)
        assert jax.tree.structure(tx.init(g[0])) == jax.tree.structure(inner().init(g[0]))
    u = run_reference("adam", g)
    expected = [getattr(reference, wrapper)(a, b) for a, b in zip(u, g, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_mars_corrects_the_gradient_for_its_direction():
    g = gradients_with_everything(20)
    with jax.enable_x64(True):
        got = updates_over(adam_jax.mars(adam_jax.scale_by_adam()), g)
    previous = [np.zeros_like(g[0]), *g[:-1]]
    c = [reference.mars(a, b) for a, b in zip(g, previous, strict=True)]
    np.testing.assert_allclose(got, run_reference("adam", np.stack(c)), rtol=1e-9, atol=1e-12)


@pytest.mark.standard_promotion
def test_grokfast_passes_amplified_gradients_to_any_optimizer():
    g = gradients_with_everything(20)
    given = {"alpha": 0.9, "lamb": 3.0}
    with jax.enable_x64(True):
        ours = updates_over(adam_jax.grokfast(adam_jax.adam(1.0), **given), g)
        theirs = updates_over(adam_jax.grokfast(optax.adam(1.0), **given), g)
    expected = -run_reference("adam", run_reference("grokfast", g, **given))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(theirs, expected, rtol=1e-9, atol=1e-12)
    assert set(adam_jax.moments(adam_jax.grokfast(adam_jax.adam(1.0)).init(1.0))) == {
        "slow",
        "mu",
        "nu",
    }
    with pytest.raises(ValueError, match=says("grokfast", "alpha", "[0, 1)", "1.0")):
        adam_jax.grokfast(adam_jax.adam(1.0), alpha=1.0)


def test_wrappers_compose():
    g = gradients_with_everything(20)
    with jax.enable_x64(True):
        got = updates_over(adam_jax.cautious(adam_jax.mars(adam_jax.scale_by_adam())), g)
        u = updates_over(adam_jax.mars(adam_jax.scale_by_adam()), g)
    expected = [reference.cautious(np.asarray(a), b) for a, b in zip(u, g, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@every_optimizer
@pytest.mark.parametrize("wrapper", ["cautious", "grams"])
def test_cautious_and_grams_refuse_a_finished_optimizer(name, wrapper):
    finished = FINISHED[name](1e-3)
    for tx in (finished, adam_jax.chain(optax.clip(1.0), finished), adam_jax.mars(finished)):
        with pytest.raises(ValueError, match=rf"{wrapper}\(adam_jax.scale_by_adam\(\)\)"):
            getattr(adam_jax, wrapper)(tx)


@other_rules_slowly(DECAYED)
def test_cautious_true_masks_the_direction_before_the_decay(name):
    g = gradients_with_everything(12).astype(np.float32)
    params = jnp.ones_like(g[0])
    plain = FINISHED[name](1.0, weight_decay=None)
    careful = FINISHED[name](1.0, weight_decay=0.5, cautious=True)
    if name in ("lamb", "prodigy", "rmsprop", "sgd"):
        pytest.skip("later rules depend on more than the direction")
    u = -np.asarray(updates_over(plain, g, params))
    expected = [-reference.cautious(a, b) - 0.5 for a, b in zip(u, g, strict=True)]
    np.testing.assert_allclose(updates_over(careful, g, params), expected, rtol=1e-5, atol=1e-5)

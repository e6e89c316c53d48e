"""Properties of single variants; test_contract.py checks the properties of all."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
import reference
from adam_jax import rules
from helpers import (
    FINISHED,
    every_optimizer,
    gradients_with_everything,
    run_reference,
    says,
    updates_over,
)

standard = pytest.mark.standard_promotion


# Rules that follow a direction, against their references


def run_rule(rule, u, **given):
    tx = adam_jax.scale_by_rule(rule, **given)
    p = jnp.asarray(np.random.default_rng(5).normal(size=u.shape))
    return np.asarray(tx.update(jnp.asarray(u), tx.init(p), p)[0]), np.asarray(p)


def test_trust_ratio_and_decays_equal_their_references():
    u = np.random.default_rng(4).normal(size=(4, 3))
    with jax.enable_x64(True):
        got, p = run_rule(rules.trust_ratio, u)
        np.testing.assert_allclose(got, reference.trust_ratio(u, p), rtol=1e-12)
        got, _ = run_rule(rules.decay_decoupled, u, weight_decay=0.1)
        np.testing.assert_allclose(got, reference.decoupled(u, p, 0.1), rtol=1e-12)
        got, _ = run_rule(rules.decay_cautious, u, weight_decay=0.1)
        np.testing.assert_allclose(got, reference.cautious_decay(u, p, 0.1), rtol=1e-12)
        zero, p = run_rule(rules.trust_ratio, 0 * u)
        np.testing.assert_array_equal(zero, 0 * u)


def test_proximal_decay_equals_the_authors_form():
    """Check p ← (p - η·u)/(1 + ηλ) at any size, and p - η·u for a masked leaf."""
    p, g = (
        {"w": jnp.array([2.0, -3.0]), "b": jnp.array([1.0])},
        {
            "w": jnp.array([0.3, 0.1]),
            "b": jnp.array([0.5]),
        },
    )
    given = dict(weight_decay=2.0, weight_decay_form="proximal")
    tx = adam_jax.adan(0.1, **given, weight_decay_mask={"w": True, "b": False})
    plain = adam_jax.adan(0.1)
    step, _ = tx.update(g, tx.init(p), p)
    bare, _ = plain.update(g, plain.init(p), p)
    moved = optax.apply_updates(p, bare)
    np.testing.assert_allclose(p["w"] + step["w"], moved["w"] / 1.2, rtol=1e-6)
    np.testing.assert_allclose(step["b"], bare["b"], rtol=1e-6)


# Differences between libraries, so that nobody "fixes" them


def test_adan_weighs_differences_as_the_authors_or_as_optax():
    g = gradients_with_everything(30)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        paper, other = (
            updates_over(adam_jax.scale_by_adan(difference_weight=w), g) for w in ("b2", "1-b2")
        )
        theirs = updates_over(optax.scale_by_adan(), g)
    np.testing.assert_allclose(other, theirs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(paper, run_reference("adan", g), rtol=1e-9, atol=1e-12)
    assert np.abs(paper - other).max() > 0.1


def test_nadam_corrects_biases_as_algoperf():
    g = gradients_with_everything(30)
    expected = run_reference("nadam", g, correction="algoperf")
    with jax.enable_x64(True):
        got = updates_over(adam_jax.nadamw(1.0, weight_decay=0.0, correction="algoperf"), g)
    np.testing.assert_allclose(-got, expected, rtol=1e-11, atol=1e-12)
    assert np.abs(expected - run_reference("nadam", g)).max() > 0.05


@pytest.mark.parametrize("name, theirs", [("amsgrad_raw", "amsgrad"), ("nadam_scheduled", "nadam")])
def test_pytorch_and_optax_differ_in_amsgrad_and_nadam(name, theirs):
    g = gradients_with_everything(60)
    assert np.abs(run_reference(name, g) - run_reference(theirs, g)).max() > 0.05


# AdEMAMix's warmups


def test_ademamix_warms_up_b3_and_alpha():
    b3, alpha = adam_jax.schedules.ademamix_warmup(0.9, 0.9999, 8.0, 1000)
    np.testing.assert_allclose([alpha(0), alpha(250), alpha(5000)], [0.0, 2.0, 8.0])
    values = [b3(jnp.int32(t)) for t in (0, 500, 1000, 5000)]
    memory = [-1 / float(b.log) for b in values]  # the averaging length
    start, end = -1 / np.log(0.9), -1 / np.log(0.9999)
    np.testing.assert_allclose(memory, [start, (start + end) / 2, end, end], rtol=1e-4)
    assert float(values[-1].complement) == pytest.approx(1e-4, rel=1e-6)


def test_ademamix_with_warmup_equals_its_reference():
    g = gradients_with_everything(30)
    with jax.enable_x64(True):
        tx = adam_jax.ademamix(1.0, b3=0.999, alpha=5.0, warmup_steps=20)
        got = -np.asarray(updates_over(tx, g))
        b3, alpha = adam_jax.schedules.ademamix_warmup(0.9, 0.999, 5.0, 20)
        at = [{"b3": float(b3(t).value), "alpha": float(alpha(t))} for t in range(len(g))]
    state, expected = {}, []
    for t, x in enumerate(g):
        u, state = reference.ademamix(x, state, t=t + 1, **at[t])
        expected.append(u)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


# b2 of another batch size


def test_rescale_b2_keeps_the_half_life_in_examples():
    b2 = adam_jax.schedules.rescale_b2(0.95, batch_size=512, new_batch_size=8)
    assert np.log(0.5) / np.log(b2) * 8 == pytest.approx(np.log(0.5) / np.log(0.95) * 512)
    rescale = adam_jax.schedules.rescale_b2
    assert rescale(0.9, batch_size=4, new_batch_size=8) == pytest.approx(0.81)
    with pytest.raises(ValueError, match=says("rescale_b2", "b2", "[0, 1)", "1.5")):
        rescale(1.5, batch_size=4, new_batch_size=8)
    with pytest.raises(ValueError, match=says("rescale_b2", "batch_size", "> 0", "got 0")):
        rescale(0.9, batch_size=0, new_batch_size=8)
    with pytest.raises(ValueError, match=says("rescale_b2", "new_batch_size", "> 0", "got -8")):
        rescale(0.9, batch_size=4, new_batch_size=-8)


# Convergence


@every_optimizer
def test_every_optimizer_minimizes_the_rosenbrock_function(name):
    rates = {"amsgrad": 0.5, "lion": 1e-2, "lamb": 1e-2, "radam": 2e-3, "yogi": 0.1}
    rates |= {"sgd": 1e-3, "simplified_ademamix": 5e-5, "adopt": 0.5, "prodigy": 1.0}
    rate = optax.cosine_decay_schedule(rates.get(name, 2e-2), 10_000)
    given = {} if name == "adamh" else {"weight_decay": 0.0}  # AdamH has none
    tx = FINISHED[name](rate, **given, **({"momentum": 0.9} if name == "sgd" else {}))

    def loss(p):
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (p + updates, state), None

    start = jnp.array([1.5, 1.5])
    with jax.numpy_dtype_promotion("standard"):
        (end, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=10_000)
    np.testing.assert_allclose(end, [1.0, 1.0], atol=0.05)


@pytest.mark.slow
@every_optimizer
def test_every_optimizer_trains_a_small_network(name):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    y = jnp.sin(x.sum(axis=1))
    params = {
        "w1": jnp.asarray(rng.normal(size=(8, 32)) / np.sqrt(8), jnp.float32),
        "w2": jnp.asarray(rng.normal(size=(32,)) / np.sqrt(32), jnp.float32),
    }
    rates = {"sgd": 0.05, "lion": 1e-3, "lamb": 2e-2, "simplified_ademamix": 1e-4, "yogi": 2e-2}
    rates["prodigy"] = 1.0
    tx = FINISHED[name](rates.get(name, 1e-2))

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["w1"]) @ p["w2"] - y) ** 2)

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    (end, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
    assert loss(end) < 0.5 * loss(params)


def reddi(tx, steps=20_000, c=101.0):
    """Reddi et al. (2018), section 3: f_t = 1010x every 101st step, else -10x."""

    def step(carry, t):
        x, state = carry
        gradient = jnp.where(t % 101 == 1, jnp.float32(1010), jnp.float32(-10))
        updates, state = tx.update(gradient, state, x)
        x = jnp.clip(x + updates, -1, 1)
        return (x, state), x

    x = jnp.zeros(())
    _, path = jax.lax.scan(step, (x, tx.init(x)), jnp.arange(1, steps + 1))
    return float(jnp.mean(path[-2020:]))


def test_adopt_and_amsgrad_converge_where_adam_does_not():
    def rate(count):
        return 0.5 / jnp.sqrt(count.astype(jnp.float32) + 1)

    given = {"b1": 0.9, "b2": 0.99}
    assert reddi(adam_jax.adam(rate, **given)) > 0.5
    assert reddi(adam_jax.amsgrad(rate, **given), 400_000) < -0.5
    assert reddi(adam_jax.adopt(rate, **given), 400_000) < -0.5


# Schedule-Free


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_schedule_free_equals_its_reference(warmup_steps):
    g = gradients_with_everything(40)
    start = np.random.default_rng(2).normal(size=g.shape[1:])
    given = dict(b1=0.9, b2=0.99, weight_decay=0.1, warmup_steps=warmup_steps)
    expected = reference.ScheduleFreeAdamW(start, lr=0.01, **given)
    with jax.enable_x64(True):
        tx = adam_jax.schedule_free_adamw(0.01, **given)
        params = jnp.asarray(start)
        state = tx.init(params)
        for x in g:
            updates, state = tx.update(jnp.asarray(x), state, params)
            params = optax.apply_updates(params, updates)
            expected.step(x)
            np.testing.assert_allclose(params, expected.y, rtol=2e-6, atol=1e-7)
        evaluated = adam_jax.schedule_free_eval_params((state,), params)
    np.testing.assert_allclose(evaluated, expected.x, rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_schedule_free_keeps_the_digits_of_small_updates():
    """Updates of 1e-3 for parameters of 1 are off by at most two ulps of a parameter."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=500), rng.normal(size=(60, 500))

    def run(dtype):
        with jax.enable_x64(dtype == jnp.float64):
            tx = adam_jax.schedule_free_adamw(1e-3, b1=0.5)
            params = jnp.asarray(start, dtype)
            state, updates = tx.init(params), []
            for g in gradients:
                u, state = tx.update(jnp.asarray(g, dtype), state, params)
                params = params + u
                updates.append(np.asarray(u, np.float64))
            return np.stack(updates)

    assert np.max(np.abs(run(jnp.float32) - run(jnp.float64))) < 1.3e-7  # Optax 2.7e-7


def test_schedule_free_state_has_the_structure_of_optax():
    params = {"w": jnp.ones((3, 2))}
    ours = adam_jax.schedule_free_adamw(0.01).init(params)
    theirs = optax.contrib.schedule_free_adamw(0.01).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_schedule_free_keeps_dtypes_under_scan(dtype):
    params = {"w": jnp.ones((16, 8), dtype)}
    grads = {"w": jnp.full((5, 16, 8), 0.1, dtype)}
    tx = adam_jax.schedule_free_adamw(0.01, warmup_steps=3)
    state = tx.init(params)
    after, updates = jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], state, grads)
    chex.assert_trees_all_equal_dtypes(after, state)
    assert updates["w"].dtype == dtype


def test_moments_reads_all_rules_of_an_optimizer():
    params = jnp.ones(3)
    read = adam_jax.moments(adam_jax.rmsprop(1e-3, momentum=0.9).init(params))
    assert set(read) == {"nu", "trace"}
    read = adam_jax.moments(adam_jax.mars(adam_jax.adamw(1e-3)).init(params))
    assert set(read) == {"g_prev", "mu", "nu"}


def test_momentum_of_rmsprop_does_not_amplify_weight_decay():
    p, zero = jnp.ones(2), jnp.zeros(2)
    for form, expected in [("decoupled", -0.01), ("independent", -0.1)]:
        tx = adam_jax.rmsprop(0.1, momentum=0.9, weight_decay=0.1, weight_decay_form=form)
        state = tx.init(p)
        for _ in range(50):
            updates, state = tx.update(zero, state, p)
        np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_cautious_and_grams_refuse_schedule_free():
    for wrapper in (adam_jax.cautious, adam_jax.grams):
        with pytest.raises(ValueError, match=says(wrapper.__name__, "direction")):
            wrapper(adam_jax.schedule_free_adamw())


@pytest.mark.parametrize("warmup_steps", [None, 5])
@standard
def test_schedule_free_continues_a_run_of_optax(warmup_steps):
    p = {"w": jnp.ones(3)}
    state = optax.contrib.schedule_free_adamw(1e-2, warmup_steps).init(p)
    ours = adam_jax.schedule_free_adamw(1e-2, warmup_steps)
    _, after = ours.update(p, state, p)
    chex.assert_trees_all_equal_structs(after, state)
    chex.assert_trees_all_equal_dtypes(after, state)
    assert jax.tree.structure(ours.init(p)) == jax.tree.structure(state)


def test_schedule_free_takes_a_schedule():
    p = {"w": jnp.ones(3)}
    fixed, scheduled = (
        adam_jax.schedule_free_adamw(rate) for rate in (0.01, lambda count: jnp.float32(0.01))
    )
    one, two = (tx.update(p, tx.init(p), p)[0] for tx in (fixed, scheduled))
    chex.assert_trees_all_close(one, two)


def test_rules_without_moments_may_count_steps():
    @adam_jax.rule()
    def slowing(g, *, t, gain=1.0):
        return gain * g / t

    tx = adam_jax.from_rule(slowing, 1.0, gain=lambda count: jnp.float32(2))
    g = jnp.ones(2)
    state = tx.init(g)
    for step in (1, 2):
        updates, state = tx.update(g, state)
        np.testing.assert_allclose(updates, -2 / step)


def test_a_huge_gradient_in_one_element_does_not_stop_the_others():
    g = jnp.array([1e30, 1.0])
    tx = adam_jax.stable_adamw(0.1)
    updates, _ = tx.update(g, tx.init(g), g)
    assert jnp.isfinite(updates).all() and updates[1] < -0.01

"""Properties of every rule, checked for each rule in `adam_jax.rules.RULES` and for a user's rule.

Properties of the engine are checked with a few typical rules; see helpers.py.
"""

from __future__ import annotations

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from helpers import (
    RULES,
    defaults,
    every_rule,
    gradients_with_everything,
    optimizer,
    other_rules_slowly,
    run_reference,
    slow_unless_by_default,
    traces,
    tree,
    typical_rules,
)


def direction(name, **changes):
    return adam_jax.scale_by_rule(RULES[name], **{**defaults(name), **changes})


standard = pytest.mark.standard_promotion


SHAPES = {"w": (8, 4)}


# The formula

REAL_ONLY = ("adopt", "adam_atan2", "simplified_ademamix", "yogi")


def check_reference(name, grads, rtol, atol):
    """Compare updates with the reference's, at a learning rate of 1 and with weight decay."""
    tx = optimizer(name, 1.0, weight_decay=0.1)
    params = jax.tree.map(lambda g: jnp.ones_like(g[0]), grads)
    state = tx.init(params)
    step = lambda s, g: tx.update(g, s, params)[::-1]  # noqa: E731
    after, updates = jax.lax.scan(step, state, jax.tree.map(jnp.asarray, grads))
    chex.assert_trees_all_equal_dtypes((after, updates), (state, grads))
    for dtype, g in grads.items():
        expected = -(
            run_reference(name, g.astype(complex if dtype == "complex64" else float)) + 0.1
        )
        np.testing.assert_allclose(updates[dtype], expected, rtol=rtol, atol=atol, err_msg=dtype)


@every_rule
def test_equals_its_reference_in_float64(name):
    with jax.enable_x64(True):
        check_reference(name, {"float64": gradients_with_everything()}, rtol=1e-11, atol=1e-12)


@every_rule
def test_equals_its_reference_in_float32_and_complex64(name):
    g = gradients_with_everything().astype(np.float32)
    grads = {"float32": g}
    if name not in REAL_ONLY:
        grads["complex64"] = g * np.complex64(1 + 2j)
    # step 5 of RAdam is on the threshold; a difference of moments cancels in the centered rms
    loose = {"rms_centered": 2e-3}.get(name, 2e-5)
    check_reference(name, grads, rtol=loose, atol=2e-6)


@other_rules_slowly(RULES)
def test_eager_jit_scan_and_vmap_agree(name):
    """Agree up to rounding: XLA fuses multiply-adds differently in each of them."""
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    params, tx = tree(0, shapes=SHAPES), direction(name)
    update = functools.partial(tx.update, params=params)
    grads = [tree(seed, shapes=SHAPES) for seed in (1, 2, 3)]

    def run(step):
        state, out = tx.init(params), []
        for g in grads:
            u, state = step(g, state)
            out.append(u)
        return out, state

    eager, jitted = run(update), run(jax.jit(update))
    close(eager, jitted)

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    state, updates = jax.lax.scan(lambda s, g: update(g, s)[::-1], tx.init(params), stacked)
    close((updates, state), (jax.tree.map(lambda *xs: jnp.stack(xs), *eager[0]), eager[1]))

    population = jax.tree.map(lambda x: jnp.stack([x, x]), (grads[0], tx.init(params)))
    both = jax.vmap(update)(*population)
    one = update(grads[0], tx.init(params))
    close(jax.tree.map(lambda x: x[1], both), one)


@every_rule
def test_nothing_is_nan_at_the_largest_step_count(name):
    """Optax's count stays at 2³¹ - 1."""
    params, tx = tree(0, shapes=SHAPES), direction(name)
    state = jax.tree.map(lambda x: x if x.dtype != jnp.int32 else x + (2**31 - 2), tx.init(params))
    for seed in (1, 2, 3):
        updates, state = tx.update(tree(seed, shapes=SHAPES), state, params)
        chex.assert_tree_all_finite(updates)
    counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert all(x == 2**31 - 1 for x in counts)


# Dtypes

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
PAIRS = [(p, g) for p in FLOATS for g in FLOATS]
NARROW = [(p, p) for p in FLOATS[1:]]


@pytest.mark.parametrize(
    "name, pairs",
    [
        *(pytest.param(name, NARROW, id=name) for name in RULES),
        *(slow_unless_by_default(name, PAIRS, id=f"{name}-every pair") for name in RULES),
    ],
)
def test_every_pair_of_dtypes_keeps_its_types_and_zero_gradients_only_decay(name, pairs):
    """Scan over a tree with a leaf for each pair of parameter and gradient dtypes."""
    params = {f"{p.__name__} {g.__name__}": jnp.ones((3, 4), p) for p, g in pairs}
    grads = {f"{p.__name__} {g.__name__}": jnp.full((3, 3, 4), 0.5, g) for p, g in pairs}
    tx = optimizer(name, weight_decay=0.1)
    state = tx.init(params)
    run = jax.jit(
        lambda grads: jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], state, grads)
    )
    after, updates = run(grads)
    chex.assert_trees_all_equal_dtypes(after, state)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    chex.assert_tree_all_finite((after, updates))
    for moment in moments_of(state):
        for key, p in params.items():
            wide = p.dtype == jnp.float16 or moment[key].ndim == 0
            assert moment[key].dtype == (jnp.float32 if wide else p.dtype)

    after, updates = run(jax.tree.map(jnp.zeros_like, grads))
    chex.assert_tree_all_finite((after, updates))
    if name != "yogi":  # its mu starts above zero, as in Optax
        for key, u in updates.items():
            np.testing.assert_allclose(u.astype(jnp.float32), -1e-3, rtol=1e-2, err_msg=key)


def moments_of(state):
    return [moment for moment in state[0] if isinstance(moment, dict)]  # not counts or scalars


@other_rules_slowly(RULES)
def test_float16_gradients_give_the_float32_answer(name):
    params = tree(0, jnp.float16, SHAPES)
    narrow, wide = direction(name), direction(name, storage="float32")
    for size in (1e-4, 30.0 if name == "trace" else 300.0):  # trace leaves float16's range
        states = narrow.init(params), wide.init(params)
        for seed in (1, 2):
            g = tree(seed, jnp.float16, SHAPES, scale=size)
            u16, s16 = narrow.update(g, states[0], params)
            g32 = jax.tree.map(lambda x: x.astype(jnp.float32), g)
            u32, s32 = wide.update(g32, states[1], params)
            states = s16, s32
            chex.assert_trees_all_close(
                jax.tree.map(lambda x: x.astype(jnp.float32), u16), u32, rtol=1e-3, atol=1e-7
            )


# The Optax protocol


@typical_rules
def test_optax_chain_masked_partition_and_lax_cond_work(name):
    params, grads = tree(0), tree(1)
    plain = optimizer(name, weight_decay=0.1)
    expected, _ = plain.update(grads, plain.init(params), params)

    chained = optax.chain(optax.identity(), plain)
    updates, _ = chained.update(grads, chained.init(params), params)
    chex.assert_trees_all_equal(updates, expected)

    mask = {"dense": {"kernel": True, "gate": False}, "scale": True}
    masked = optax.masked(plain, mask)
    updates, _ = masked.update(grads, masked.init(params), params)
    chex.assert_trees_all_equal(updates["dense"]["kernel"], expected["dense"]["kernel"])
    chex.assert_trees_all_equal(updates["dense"]["gate"], grads["dense"]["gate"])

    labels = {"dense": "train", "scale": "freeze"}
    parts = optax.partition({"train": plain, "freeze": optax.set_to_zero()}, labels)
    updates, _ = parts.update(grads, parts.init(params), params)
    chex.assert_trees_all_equal(updates["dense"], expected["dense"])
    assert updates["scale"] == 0

    state = plain.init(params)
    updates, _ = jax.lax.cond(
        jnp.array(True), lambda: plain.update(grads, state, params), lambda: (grads, state)
    )
    # a branch is one program, like a jitted update; an eager update runs a program for each leaf
    expected, _ = jax.jit(plain.update)(grads, state, params)
    chex.assert_trees_all_equal(updates, expected)


@typical_rules
@standard
def test_optax_multisteps_and_apply_if_finite_work(name):
    params, grads = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    steps = optax.MultiSteps(optimizer(name), every_k_schedule=2)
    update = jax.jit(steps.update)
    first, state = update(grads, steps.init(params), params)
    second, state = update(grads, state, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(first))
    assert any(jnp.any(u) for u in jax.tree.leaves(second))

    guarded = optax.apply_if_finite(optimizer(name), max_consecutive_errors=3)
    before = guarded.init(params)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, after = jax.jit(guarded.update)(bad, before, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)


@typical_rules
def test_optax_tree_get_and_map_params_find_the_moments(name):
    params = tree(0)
    tx = optimizer(name, weight_decay=0.1)
    state = tx.init(params)
    _, state = tx.update(tree(1), state, params)
    for moment in RULES[name].moments:
        chex.assert_trees_all_equal_shapes(optax.tree_utils.tree_get(state, moment), params)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    for moment in RULES[name].moments:
        got, was = (optax.tree_utils.tree_get(s, moment) for s in (doubled, state))
        chex.assert_trees_all_equal(got, jax.tree.map(lambda x: 2 * x, was))


@typical_rules
def test_moments_reads_float32_from_every_state(name):
    params, tx = tree(0, jnp.bfloat16), optimizer(name)
    _, state = tx.update(tree(1, jnp.bfloat16), tx.init(params), params)
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in jax.tree.leaves(state))
    read = adam_jax.moments(state)
    assert set(read) == set(RULES[name].moments)
    assert {x.dtype for x in jax.tree.leaves(read)} == {jnp.dtype(jnp.float32)}


# Leaves of every kind


@typical_rules
def test_leaves_may_be_none_masked_empty_scalars_or_numbers(name):
    params = {
        "w": jnp.ones((2, 3)),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
        "zero_size": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2.0),
        "number": 2.0,
        "integer": 2,
    }
    tx = optimizer(name, weight_decay=0.1)
    state = tx.init(params)
    for _ in range(2):
        updates, new = tx.update(params, state, params)
        chex.assert_trees_all_equal_structs(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    assert updates["none"] is None
    assert updates["zero_size"].shape == (0, 3)
    np.testing.assert_array_equal(updates["number"], updates["scalar"])
    np.testing.assert_array_equal(updates["integer"], updates["scalar"])

    empty = tx.init({})
    assert tx.update({}, empty, {})[0] == {}


@typical_rules
def test_a_leaf_without_a_gradient_stays_as_it_is(name):
    params, tx = tree(0), optimizer(name, weight_decay=0.1)
    state = tx.init(params)
    grads = tree(1) | {"scale": None}
    updates, after = tx.update(grads, state, params)
    assert updates["scale"] is None
    for moment in RULES[name].moments:
        was, now = (optax.tree_utils.tree_get(s, moment)["scale"] for s in (state, after))
        assert was == now
    no_tangent = np.zeros((), jax.dtypes.float0)
    updates, after = tx.update(tree(1) | {"scale": no_tangent}, state, params)
    assert updates["scale"] == 0


# Hyperparameters


def numbers(name):
    return {k: v for k, v in defaults(name).items() if isinstance(v, float)}


def constructor(name):
    """Return a constructor whose numbers are named arguments, as inject_hyperparams needs."""

    def make(**given):
        return adam_jax.from_rule(RULES[name], **{**defaults(name), **given})

    names = ["learning_rate", "weight_decay", *numbers(name)]
    make.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    )
    return make


@typical_rules
def test_changing_a_hyperparameter_never_retraces(name):
    """Step eagerly with a new optimizer for each value, and under inject_hyperparams."""
    params, grads = tree(0), tree(1)
    given = {"learning_rate": 1e-2, "weight_decay": 0.1, **numbers(name)}
    injected = optax.inject_hyperparams(constructor(name))(**given)
    state = injected.init(params)
    starts = [m.start for m in RULES[name].moments.values()]  # used by init alone
    traced = []
    for scale in (1.0, 0.9, 0.8):
        changed = {k: v if k in (*starts, "threshold") else v * scale for k, v in given.items()}
        with traces() as names:
            tx = constructor(name)(**changed)
            one, _ = tx.update(grads, tx.init(params), params)
            state.hyperparams.update({k: jnp.float32(v) for k, v in changed.items()})
            two, _ = injected.update(grads, state, params)
        chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-7)
        traced.append(names)
    assert not traced[-1]


@other_rules_slowly(RULES)
@standard
def test_inject_hyperparams_works_with_bfloat16_parameters(name):
    """Survive b2 = 1, because inject_hyperparams passes 0.999 as bfloat16."""
    params, grads = (tree(seed, jnp.bfloat16, SHAPES) for seed in (0, 1))
    tx = optax.inject_hyperparams(constructor(name))(
        learning_rate=1e-2, weight_decay=0.1, **numbers(name)
    )
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    chex.assert_tree_all_finite((updates, state))


@other_rules_slowly(RULES)
def test_every_hyperparameter_takes_a_schedule_and_a_batch(name):
    """Schedule every hyperparameter, and vmap over all of them at once."""
    params, grads = (tree(seed, shapes=SHAPES) for seed in (0, 1))
    given = {"learning_rate": 1e-2, "weight_decay": 0.1, **numbers(name)}

    def update(values):
        tx = constructor(name)(**values)
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)[0]

    scaled = jax.tree.map(lambda v: jnp.stack([jnp.float32(v), jnp.float32(0.9 * v)]), given)
    if "threshold" in scaled:
        scaled["threshold"] = jnp.array([5.0, 5.0])
    together = jax.vmap(update)(scaled)
    for i in range(2):
        alone = update(jax.tree.map(lambda v, i=i: v[i], scaled))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-6
        )

    counted = [f for f in constructor(name)(**given).init(params)[0]._fields if f in ("count", "t")]
    if counted:
        rule = RULES[name]
        starts = [m.start for m in (*rule.moments.values(), *rule.scalars.values())]
        fixed = {k: v for k, v in given.items() if k in starts}
        schedules = {
            k: lambda count, v=v: jnp.float32(v) for k, v in given.items() if k not in fixed
        }
        chex.assert_trees_all_close(
            update({**schedules, **fixed}), update(given), rtol=2e-4, atol=1e-6
        )


@other_rules_slowly(RULES)
def test_gradients_through_the_update_are_finite(name):
    """Differentiate through the steps, also if the gradient is 0, where √ has no derivative."""

    def final(w, learning_rate, gradient):
        tx = optimizer(name, learning_rate)

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(gradient * jnp.sin(w), state, w)
            return (w + updates, state), None

        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=10)
        return jnp.sum(w**2)

    derivatives = jax.jit(jax.grad(final, argnums=(0, 1)))
    for gradient in (0.0, 1.0):
        chex.assert_tree_all_finite(derivatives(jnp.array([0.5, -0.3]), 1e-2, gradient))

"""What every rule must do, run for each rule in the registry and for one that a user declares.

A rule joins by being in `adam_jax.rules.RULES`; see helpers.py. What the engine does in one way for
all of them is tested with a few typical ones.
"""

from __future__ import annotations

import functools
import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax._engine.chain import run_leaf
from helpers import (
    RULES,
    defaults,
    every_rule,
    gradients_with_everything,
    optimizer,
    run_reference,
    tree,
    typical_rules,
)


def direction(name, **changes):
    return adam_jax.scale_by_rule(RULES[name], **{**defaults(name), **changes})


standard = pytest.mark.standard_promotion


def run_ours(name, gradients, dtype, **changes):
    tx = direction(name, **changes)
    state = tx.init(jnp.zeros(gradients.shape[1:], dtype))
    _, updates = jax.lax.scan(
        lambda s, g: tx.update(g, s)[::-1], state, jnp.asarray(gradients, dtype)
    )
    return np.asarray(updates)


# The formula


@every_rule
def test_equals_its_reference_in_float64(name):
    g = gradients_with_everything()
    with jax.enable_x64(True):
        ours = run_ours(name, g, jnp.float64)
    np.testing.assert_allclose(ours, run_reference(name, g), rtol=1e-11, atol=1e-12)


@every_rule
def test_equals_its_reference_in_float32(name):
    g = gradients_with_everything()
    # step 5 of RAdam is on the threshold; a difference of moments cancels in the centered rms
    loose = {"rms_centered": 2e-3}.get(name, 2e-5)
    g32 = g.astype(np.float32)
    ours, expected = run_ours(name, g32, jnp.float32), run_reference(name, g32.astype(np.float64))
    np.testing.assert_allclose(ours, expected, rtol=loose, atol=2e-6)


@every_rule
def test_one_formula_in_every_compiled_form(name):
    """Eager, jit, scan and vmap agree to rounding (fused multiply-adds fall differently)."""
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    params, tx = tree(0), direction(name)
    update = functools.partial(tx.update, params=params)
    grads = [tree(seed) for seed in (1, 2, 3)]

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


# Dtypes

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


@every_rule
def test_state_keeps_its_dtypes_and_updates_have_the_gradients(name):
    """Parameters × gradients in all nine combinations, a leaf for each, under scan."""
    pairs = [(p, g) for p in FLOATS for g in FLOATS]
    params = {f"{p.__name__} {g.__name__}": jnp.ones((3, 4), p) for p, g in pairs}
    grads = {f"{p.__name__} {g.__name__}": jnp.full((3, 3, 4), 0.5, g) for p, g in pairs}
    tx = optimizer(name, weight_decay=0.1)
    state = tx.init(params)
    after, updates = jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], state, grads)
    chex.assert_trees_all_equal_dtypes(after, state)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    chex.assert_tree_all_finite((after, updates))
    for moment in moments_of(state):
        for key, p in params.items():
            assert moment[key].dtype == (jnp.float32 if p.dtype == jnp.float16 else p.dtype)


def moments_of(state):
    return [getattr(state[0], f) for f in state[0]._fields if f not in ("count", "t", "count_m2")]


@every_rule
@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_wide_and_complex_leaves(name, dtype):
    if dtype == "complex64" and name in REAL_ONLY:
        pytest.skip("the rule is for real parameters")
    with jax.enable_x64(dtype == "float64"):
        params = {"w": jnp.ones(3, dtype)}
        grads = jnp.asarray(np.arange(12.0).reshape(4, 3) - 5, dtype)
        grads = {"w": grads * (1 + 2j) if dtype == "complex64" else grads}
        tx = optimizer(name, weight_decay=0.1)
        state = tx.init(params)
        after, updates = jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], state, grads)
        chex.assert_trees_all_equal_dtypes((after, updates), (state, grads))
        expected = run_reference(name, np.asarray(grads["w"]))
        expected = -1e-2 * (expected + 0.1 * np.asarray(params["w"]))
        np.testing.assert_allclose(updates["w"], expected, rtol=2e-5, atol=1e-7)


REAL_ONLY = ("adopt", "adam_atan2", "simplified_ademamix", "yogi")


@every_rule
def test_zero_gradients_move_nothing(name):
    params = {dtype.__name__: jnp.ones((3, 4), dtype) for dtype in FLOATS}
    tx = optimizer(name)
    zero = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(zero, state, params)
    if name != "yogi":  # whose mu starts above zero, as in Optax
        chex.assert_trees_all_equal(updates, zero)
    chex.assert_tree_all_finite((updates, state))


@every_rule
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_float16_gradients_give_the_float32_answer(name, size):
    if name == "trace" and size == 300.0:
        size = 30.0  # its direction has the gradient's scale and leaves float16's range
    params = tree(0, jnp.float16)
    grads = [tree(seed, jnp.float16, scale=size) for seed in (1, 2)]
    narrow, wide = direction(name), direction(name, storage="float32")
    states = narrow.init(params), wide.init(params)
    for g in grads:
        u16, s16 = narrow.update(g, states[0])
        u32, s32 = wide.update(jax.tree.map(lambda x: x.astype(jnp.float32), g), states[1])
        states = s16, s32
        chex.assert_trees_all_close(
            jax.tree.map(lambda x: x.astype(jnp.float32), u16), u32, rtol=1e-3, atol=1e-7
        )


# The Optax protocol


@typical_rules
def test_chain_masked_partition_and_conditionals(name):
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
    # a branch is one program, as a jitted update is; an eager update runs one for each leaf
    expected, _ = jax.jit(plain.update)(grads, state, params)
    chex.assert_trees_all_equal(updates, expected)


@typical_rules
@standard
def test_accumulation_and_finite_guard(name):
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
def test_tree_get_and_map_params(name):
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
def test_state_is_ordinary_data(name):
    params, tx = tree(0, jnp.bfloat16), optimizer(name)
    _, state = tx.update(tree(1, jnp.bfloat16), tx.init(params), params)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in jax.tree.leaves(state))
    read = adam_jax.moments(state)
    assert set(read) == set(RULES[name].moments)
    assert {x.dtype for x in jax.tree.leaves(read)} == {jnp.dtype(jnp.float32)}


# Leaves of every kind


@typical_rules
def test_none_empty_masked_scalar_and_number_leaves(name):
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
def test_a_leaf_without_gradient_stays(name):
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
    """A constructor whose numbers are arguments by name, as inject_hyperparams wants them."""

    def make(**given):
        return adam_jax.from_rule(RULES[name], **{**defaults(name), **given})

    names = ["learning_rate", "weight_decay", *numbers(name)]
    make.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    )
    return make


@typical_rules
def test_changing_a_value_never_retraces(name):
    """Eagerly, with a new optimizer for each value, and under inject_hyperparams."""
    params, grads = tree(0), tree(1)
    given = {"learning_rate": 1e-2, "weight_decay": 0.1, **numbers(name)}
    injected = optax.inject_hyperparams(constructor(name))(**given)
    state = injected.init(params)
    starts = [m.start for m in RULES[name].moments.values()]  # used by init alone
    sizes = []
    for scale in (1.0, 0.99, 0.9, 0.8):
        changed = {k: v if k in (*starts, "threshold") else v * scale for k, v in given.items()}
        tx = constructor(name)(**changed)
        one, _ = tx.update(grads, tx.init(params), params)
        state.hyperparams.update({k: jnp.float32(v) for k, v in changed.items()})
        two, _ = injected.update(grads, state, params)
        chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-7)
        sizes.append(run_leaf._cache_size())
    assert len(set(sizes[1:])) == 1, "a new value was traced anew"


@every_rule
@standard
def test_injected_hyperparams_with_bfloat16_parameters(name):
    """bf16(0.999) is 1: inject_hyperparams hands us that, and a step must survive it."""
    params, grads = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    tx = optax.inject_hyperparams(constructor(name))(
        learning_rate=1e-2, weight_decay=0.1, **numbers(name)
    )
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    chex.assert_tree_all_finite((updates, state))


@every_rule
def test_schedules_and_populations(name):
    """A schedule of any hyperparameter, and vmap over all of them at once."""
    params, grads = tree(0), tree(1)
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
        starts = [m.start for m in RULES[name].moments.values()]
        fixed = {k: v for k, v in given.items() if k in starts}
        schedules = {
            k: lambda count, v=v: jnp.float32(v) for k, v in given.items() if k not in fixed
        }
        chex.assert_trees_all_close(
            update({**schedules, **fixed}), update(given), rtol=2e-4, atol=1e-6
        )


@every_rule
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_gradients_through_the_update_are_finite(name, gradient):
    """Meta-learning: ten steps, also where the gradient is zero and √ has no derivative."""

    def final(w, learning_rate):
        tx = optimizer(name, learning_rate)

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(gradient * jnp.sin(w), state, w)
            return (w + updates, state), None

        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=10)
        return jnp.sum(w**2)

    out = jax.jit(jax.grad(final, argnums=(0, 1)))(jnp.array([0.5, -0.3]), 1e-2)
    chex.assert_tree_all_finite(out)

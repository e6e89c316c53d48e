"""For bfloat16 parameters, masters equal a float32 run's, and rounding has no bias."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import adam_jax
from helpers import (
    MB,
    RULES,
    TYPICAL,
    gpt2_small,
    largest_sent,
    masters,
    nbytes,
    normal,
    optimizer,
    says,
    slowly,
    step_of,
)

pytestmark = pytest.mark.standard_promotion  # apply_updates adds float32 to bfloat16

WRAPPERS = {
    "32 bits": adam_jax.master_weights,
    "24 bits": masters,
    "stochastic": adam_jax.stochastic_rounding,
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
other_wrappers_slowly = pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(wrap, id=name, marks=() if name == "24 bits" else pytest.mark.slow)
        for name, wrap in WRAPPERS.items()
    ],
)
BFLOAT16 = jnp.bfloat16


def float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def precise(params, state):
    """Return the masters if the state keeps any, else the parameters, in float32."""
    kept = hasattr(state, "rest")
    return adam_jax.get_master_weights(params, state) if kept else float32(params)


# Rounding to the parameter


def magnitudes(kind, n, rng):
    """Return masters and updates of both signs, from no change at all to past zero."""
    signs = rng.choice([-1, 1], size=(3, n))
    if kind == "gaussian":
        p, u = rng.normal(size=(2, n)) * [[1], [0.1]]
    elif kind == "log-uniform":
        p = 10 ** rng.uniform(-30, 30, size=n)
        u = p * 10 ** rng.uniform(-9, 2, size=n)
    elif kind == "powers of two":
        p = 2.0 ** rng.integers(-99, 100, size=n)
        u = p * 2.0 ** rng.integers(-25, 3, size=n)
    else:  # to zero, just past it, or just short of it
        p = 10 ** rng.uniform(-30, 30, size=n)
        u = -p * (1 + signs[1] * 10 ** rng.uniform(-9, 0.3, size=n))
        return (signs[0] * p).astype(np.float32), (signs[0] * u).astype(np.float32)
    return (signs[0] * p).astype(np.float32), (signs[1] * u).astype(np.float32)


@pytest.mark.parametrize("kind", ["gaussian", "log-uniform", "powers of two", "crossing zero"])
def test_apply_updates_gives_the_master_rounded_to_bfloat16(kind):
    """Check each element of 2 million: the master is p + u, bit for bit."""
    n = 500_000
    rng = np.random.default_rng(0)
    p, u = (jnp.asarray(x) for x in magnitudes(kind, n, rng))
    tx = adam_jax.master_weights(optax.identity())
    p = p.astype(BFLOAT16)
    rest = jnp.asarray(rng.integers(-(2**15), 2**15, size=n), jnp.int16)
    state = tx.init(p)._replace(rest=rest)
    before = np.asarray(adam_jax.get_master_weights(p, state))
    update = jax.jit(tx.update)
    updates, state = update(u, state, p)
    assert updates.dtype == jnp.float32
    landed = jax.jit(optax.apply_updates)(p, updates)

    wanted = before + np.asarray(u)
    wanted = np.where(np.abs(wanted) < 2.0**-126, 0, wanted).astype(np.float32)
    rounded = ((wanted.view(np.int32) + 0x8000) & ~0xFFFF).view(np.float32)
    old = np.abs(np.asarray(float32(p)))
    reachable = (rounded == 0) | (np.abs(rounded) >= 2.0**-15 * old)
    assert reachable.mean() > 0.95
    np.testing.assert_array_equal(np.asarray(float32(landed))[reachable], rounded[reachable])
    master = np.asarray(adam_jax.get_master_weights(landed, state))
    np.testing.assert_array_equal(master[reachable], wanted[reachable])
    # elsewhere the error is at most an ulp of the old parameter, and the master contains it
    assert np.all(np.abs(master - wanted)[~reachable] <= 2.0**-23 * old[~reachable])


def test_infinite_and_nan_updates_are_not_hidden():
    params, bad = jnp.ones(4, BFLOAT16), jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])
    for wrap in WRAPPERS.values():
        tx = wrap(optax.identity())
        updates, state = tx.update(bad, tx.init(params), params)
        landed = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(float32(landed), np.array([np.nan, np.inf, -np.inf, 1]))
        np.testing.assert_array_equal(precise(landed, state), float32(landed))


# The masters


def scanned(tx, params, steps):
    def step(carry, t):
        params, state = carry
        g = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), params.shape)
        g = g.astype(BFLOAT16).astype(params.dtype)  # equal gradients in both dtypes
        return step_of(tx)(params, state, g), None

    run = lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(steps))[0]  # noqa: E731
    return jax.jit(run)(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        adam_jax.adamw(1e-3, weight_decay=0.1),
        optax.adamw(1e-3, weight_decay=0.1),
        adam_jax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.lamb(1e-3, storage="int8")),
    ],
    ids=["adamw", "optax.adamw", "clip, lamb int8"],
)
def test_the_master_equals_a_float32_run_bit_for_bit(tx):
    start = normal((40, 128), dtype=BFLOAT16)
    expected, _ = scanned(tx, float32(start), 10_000)
    params, state = scanned(adam_jax.master_weights(tx), start, 10_000)
    np.testing.assert_array_equal(adam_jax.get_master_weights(params, state), expected)
    assert params.dtype == BFLOAT16


def test_24_bits_round_to_a_neighbor():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=100_000), BFLOAT16)
    u = jnp.asarray(rng.normal(size=100_000) * 0.01, jnp.float32)
    tx = adam_jax.master_weights(optax.identity(), bits=24)
    updates, state = jax.jit(tx.update)(u, tx.init(p), p)
    master = adam_jax.get_master_weights(optax.apply_updates(p, updates), state)
    wanted = np.asarray(float32(p) + u)
    assert np.all(np.abs(np.asarray(master) - wanted) <= 2.0**-15 * np.abs(wanted))


def pushed(tx, size, by, steps):
    """Return the parameters and the state after some updates of one size, starting at 1.0."""

    def step(carry, _):
        return step_of(tx)(*carry, jnp.full(size, by)), None

    start = jnp.ones(size, BFLOAT16)
    run = lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps)[0]  # noqa: E731
    return jax.jit(run)(start)


@pytest.mark.parametrize("size", [(), (4000,)])
def test_small_steps_add_up_in_24_bits(size):
    params, state = pushed(adam_jax.master_weights(optax.identity(), bits=24), size, 1e-6, 10_000)
    mean = jnp.mean(adam_jax.get_master_weights(params, state))
    assert abs(mean - 1.010) <= 0.001


@every_wrapper
def test_updates_that_plain_bfloat16_drops_add_up(wrap):
    """Add 1e-4, a fortieth of half an ulp of bfloat16, to 1.0."""
    plain, _ = pushed(optax.identity(), (4000,), 1e-4, 500)
    np.testing.assert_array_equal(float32(plain), 1.0)
    moved, state = pushed(wrap(optax.identity()), (4000,), 1e-4, 500)
    np.testing.assert_allclose(jnp.mean(precise(moved, state)), 1.05, atol=1e-3)
    np.testing.assert_allclose(jnp.mean(float32(moved)), 1.05, atol=2.0**-8)


def test_equal_seeds_round_alike_and_other_seeds_do_not():
    def run(seed):
        tx = adam_jax.stochastic_rounding(optax.identity(), seed=seed)
        return float32(pushed(tx, (1000,), 1e-4, 3)[0])

    np.testing.assert_array_equal(run(1), run(1))
    assert np.mean(np.asarray(run(1) != run(2))) > 0.05


# Every optimizer inside, parameters of every kind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*must fit a leaf")  # the wide one is alone below
@pytest.mark.parametrize(
    "name, wrap",
    [(name, WRAPPERS["24 bits"]) for name in TYPICAL] + [("adam", w) for w in WRAPPERS.values()],
)
def test_only_bfloat16_leaves_are_treated(name, wrap):
    """Updates of the other leaves equal the ones without a wrapper."""
    params = {
        "w": normal((32, 128), dtype=BFLOAT16),
        "wide": jnp.ones((3, 4)),
        "half": jnp.ones(3, jnp.float16),
        "scalar": jnp.ones((), BFLOAT16),
        "empty": jnp.zeros((0, 3), BFLOAT16),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
    plain = optimizer(name, weight_decay=0.1, storage="int8")
    tx = wrap(plain)
    state = tx.init(params)
    final, updates = jax.lax.scan(
        lambda s, _: tx.update(grads, s, params)[::-1], state, None, length=2
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(final, state)
    dtypes = {k: updates[k].dtype for k in ("w", "scalar", "empty", "wide", "half")}
    assert dtypes == {**dict.fromkeys(dtypes, jnp.float32), "half": jnp.float16}
    assert updates["none"] is None and updates["masked"] == optax.MaskedNode()
    alone = {k: params[k] for k in ("wide", "half")}
    expected, _ = jax.jit(plain.update)({k: grads[k] for k in alone}, plain.init(alone), alone)
    first = jax.tree.map(lambda u: u[0], {k: updates[k] for k in alone})
    chex.assert_trees_all_close(first, expected, rtol=1e-6)
    assert set(adam_jax.moments(final)) == set(RULES[name].moments)


@every_wrapper
def test_a_leaf_without_a_gradient_stays_as_it_is(wrap):
    tx = wrap(adam_jax.adamw(1e-2))
    params = {"w": jnp.ones(4, BFLOAT16), "b": jnp.ones(4, BFLOAT16)}
    grads = {"w": jnp.ones(4, BFLOAT16), "b": None}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["b"] is None
    moved, _ = adam_jax.apply(tx, grads, tx.init(params), params)
    chex.assert_trees_all_equal(moved["b"], params["b"])


ADAMW = adam_jax.adamw(1e-2, storage="int8", weight_decay=0.1)
APPLIED = {
    "adamw": ADAMW,
    "32 bits": adam_jax.master_weights(ADAMW),
    "stochastic": adam_jax.stochastic_rounding(ADAMW),
    "24 bits": masters(ADAMW),
    "24 bits, in tiles": masters(ADAMW),
    "a chain": masters(
        adam_jax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.stable_adamw(1e-2))
    ),
    "parts of Optax": masters(adam_jax.chain(optax.clip(0.1), optax.adamw(1e-2))),
    "tunable": masters(adam_jax.tunable(adam_jax.adamw)(1e-2)),
    "groups": masters(adam_jax.groups(adam_jax.adamw, {"b": "frozen"}, learning_rate=1e-2)),
    "schedule-free": masters(adam_jax.schedule_free_adamw(1e-2)),
    "Optax alone": optax.adamw(1e-2),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "24 bits" else slowly(name) for name in APPLIED],
)
def test_apply_equals_update_and_apply_updates(name):
    tx = APPLIED[name]
    shape = (300, 500) if name == "24 bits, in tiles" else (64, 100)
    params = {"w": jnp.ones(shape, BFLOAT16), "b": jnp.ones(5, BFLOAT16), "f": jnp.ones(3)}
    here, there = (params, tx.init(params)), (params, tx.init(params))
    together = jax.jit(lambda p, s, g: adam_jax.apply(tx, g, s, p))
    for seed in range(3):
        grads = {k: normal(p.shape, seed, p.dtype) for k, p in params.items()}
        here, there = jax.jit(step_of(tx))(*here, grads), together(*there, grads)
    chex.assert_trees_all_equal(here, there)


def test_convert_state_adds_masters_and_changes_their_width():
    params = {"w": normal((64, 128), dtype=BFLOAT16)}
    plain, wide, narrow = adam_jax.adamw(1e-3), adam_jax.master_weights(ADAMW), masters(ADAMW)
    _, running = plain.update(params, plain.init(params), params)
    state = adam_jax.convert_state(running, wide, params)
    assert adam_jax.step_count(state) == 1
    updates, state = wide.update(params, state, params)
    params = optax.apply_updates(params, updates)
    exact = adam_jax.get_master_weights(params, state)
    for tx, error in ((wide, 0), (narrow, 2.0**-15), (wide, 2.0**-15)):
        state = adam_jax.convert_state(state, tx, params)
        chex.assert_trees_all_close(
            adam_jax.get_master_weights(params, state), exact, rtol=error, atol=0
        )


# Memory


def test_training_takes_seven_bytes_per_parameter():
    """Parameters and gradients are bfloat16, residuals and moments 8 bits."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, BFLOAT16), gpt2_small())
    count = sum(x.size for x in jax.tree.leaves(params))
    tx = adam_jax.master_weights(adam_jax.adamw(1e-3, storage="int8"), bits=24)
    report = adam_jax.memory_report(tx, params)
    assert report.total_bytes <= 7.2 * count
    assert {row.part: row.bytes for row in report.rows}["residuals"] == count
    state = jax.eval_shape(tx.init, params)
    assert nbytes(state) + 2 * nbytes(params) == report.total_bytes
    small = {"w": jnp.ones((64, 128), BFLOAT16), "f": jnp.ones((2, 2))}
    assert adam_jax.memory_report(tx, small).state_bytes == nbytes(tx.init(small))


def temporaries(tx, step, dtype):
    p = jax.ShapeDtypeStruct((65536, 1024), dtype)
    state = jax.eval_shape(tx.init, p)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(p, state, p)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("clip", [slowly(False), True], ids=["alone", "clipped"])
def test_apply_needs_no_temporaries_and_keeps_the_gradients(clip):
    tx = adam_jax.adamw(1e-3, storage="int8")
    tx = adam_jax.chain(adam_jax.clip_by_global_norm(1.0), tx) if clip else tx
    step = lambda p, s, g: adam_jax.apply(tx, g, s, p)  # noqa: E731
    assert temporaries(tx, step, jnp.float32) <= 8 * MB


@other_wrappers_slowly
def test_low_precision_makes_no_float32_copy(wrap):
    """XLA:CPU copies a bfloat16 array that a loop writes: 2 bytes per element."""
    tx = wrap(adam_jax.adamw(1e-3, storage="int8"))
    for step in (lambda p, s, g: adam_jax.apply(tx, g, s, p), step_of(tx)):
        assert temporaries(tx, step, BFLOAT16) <= 2 * 2**26 + 8 * MB


# In training


def regression(dtype):
    x = normal((64, 8))
    y = jnp.tanh(x @ normal((8, 4), seed=1))

    def loss(params):
        kernel, bias = (params[k].astype(jnp.float32) for k in ("kernel", "bias"))
        return jnp.mean((jnp.tanh(x @ kernel + bias[None]) - y) ** 2)

    return loss, {"kernel": jnp.full((8, 4), 0.1, dtype), "bias": jnp.zeros(4, dtype)}


@pytest.mark.slow
@every_wrapper
def test_multisteps_and_apply_if_finite_wrap_low_precision(wrap):
    loss, start = regression(BFLOAT16)
    tx = wrap(adam_jax.adamw(3e-2, weight_decay=0.0))
    widen = optax.stateless(lambda g, _: float32(g))
    for outer in (
        optax.MultiSteps(tx, every_k_schedule=2),
        optax.chain(widen, optax.apply_if_finite(tx, max_consecutive_errors=3)),
    ):
        step = jax.jit(step_of(outer))
        params, state = start, outer.init(start)
        for _ in range(200):
            params, state = step(params, state, jax.grad(loss)(params))
        assert loss(params) < 0.1 * loss(start)
        assert params["kernel"].dtype == BFLOAT16

    bad = jax.tree.map(lambda p: p * jnp.nan, start)
    kept, after = jax.jit(step_of(outer))(params, state, bad)
    chex.assert_trees_all_equal(kept, params)
    chex.assert_trees_all_equal(after[1].inner_state, state[1].inner_state)


@pytest.mark.slow
@other_wrappers_slowly
def test_low_precision_trains_in_nnx(wrap):
    model = nnx.Linear(16, 16, param_dtype=BFLOAT16, rngs=nnx.Rngs(0))
    adamw = adam_jax.adamw(3e-3, storage=lambda path, leaf: "int8")
    optimizer = nnx.Optimizer(model, wrap(adamw), wrt=nnx.Param)
    x = normal((32, 16))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(200)]
    assert losses[-1] < 0.2 * losses[0]
    params = nnx.state(model, nnx.Param)
    assert params["kernel"].get_value().dtype == BFLOAT16
    kept = precise(params, optimizer.opt_state)
    assert jax.tree.leaves(kept)[1].dtype == jnp.float32
    chex.assert_trees_all_equal_structs(kept, params)


@pytest.mark.slow
@other_wrappers_slowly
def test_a_train_state_resumes_from_orbax_bit_for_bit(tmp_path, wrap):
    loss, start = regression(BFLOAT16)
    tx = wrap(adam_jax.adamw(1e-2))

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def train(state, steps):
        for _ in range(steps):
            state = step(state)
        return state

    fresh = TrainState.create(apply_fn=loss, params=start, tx=tx)
    half = train(fresh, 5)
    written = {"params": half.params, "opt_state": half.opt_state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", written)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "checkpoint", written)
    resumed = train(fresh.replace(step=5, **read), 5)
    chex.assert_trees_all_equal(resumed.params, train(half, 5).params)
    chex.assert_trees_all_equal(resumed.opt_state, train(half, 5).opt_state)


@other_wrappers_slowly
def test_low_precision_works_with_vmap_donation_and_map_params(wrap):
    tx = wrap(adam_jax.adamw(1e-2, storage="int8"))
    params = jnp.ones((2, 64, 128), BFLOAT16)
    grads = normal(params.shape, dtype=BFLOAT16)
    members = jax.vmap(tx.init)(params)
    together = jax.jit(jax.vmap(step_of(tx)))(params, members, grads)
    alone = jax.jit(step_of(tx))(params[1], tx.init(params[1]), grads[1])
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], together), alone)

    state = tx.init(params)
    before = params, state
    donated = jax.jit(step_of(tx), donate_argnums=(0, 1))(params, state, grads)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    ranks = optax.tree.map_params(tx, lambda x: x.ndim, donated[1])
    assert all(rank == 3 for rank in jax.tree.leaves(getattr(ranks, "rest", 3)))


@pytest.mark.slow
@pytest.mark.eight_devices
@other_wrappers_slowly
def test_sharded_and_replicated_parameters_round_alike(wrap):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = wrap(adam_jax.adamw(1e-2, storage="int8"))
    whole = normal((256, 1024), dtype=BFLOAT16)
    expected = jax.jit(step_of(tx))(whole, tx.init(whole), whole)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    p = jax.device_put(whole, sharding)
    compiled = jax.jit(step_of(tx)).lower(p, tx.init(p), p).compile()
    got = compiled(p, tx.init(p), p)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(expected))
    assert largest_sent(compiled.as_text()) <= 8


# Wrong use


def test_low_precision_errors_say_what_to_do():
    tx = adam_jax.master_weights(adam_jax.adamw(1e-3), bits=24)
    params = {"w": jnp.ones(4, BFLOAT16), "f": jnp.ones(2)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=says("master_weights", "bits", "32", "24", "16")):
        adam_jax.master_weights(adam_jax.adamw(1e-3), bits=16)
    with pytest.raises(ValueError, match=says("stochastic_rounding", "seed", "integer", "-1")):
        adam_jax.stochastic_rounding(adam_jax.adamw(1e-3), seed=-1)
    with pytest.raises(
        ValueError, match=says("master_weights", "params", "update(gradients, state, params)")
    ):
        tx.update(params, state)
    with pytest.raises(
        ValueError,
        match=says("master_weights", "'f'", "bfloat16", "int8[2]", "optax.apply_updates"),
    ):
        tx.update(params, state, {"w": params["w"], "f": params["f"].astype(BFLOAT16)})
    with pytest.raises(ValueError, match=says("master_weights", "int8[1]", "int16[1]", "bits=")):
        adam_jax.master_weights(adam_jax.adamw(1e-3)).update(params, state, params)
    with pytest.raises(ValueError, match=says("chain", "master_weights(", "outermost")):
        adam_jax.chain(tx, optax.scale(0.5))
    with pytest.raises(
        ValueError, match=says("stochastic_rounding", "chain(clip, master_weights(", "outermost")
    ):
        adam_jax.stochastic_rounding(adam_jax.chain(optax.clip(1.0), tx))
    with pytest.raises(ValueError, match=says("cautious", "direction")):
        adam_jax.cautious(tx)
    with pytest.raises(ValueError, match=says("get_master_weights", "state", "0")):
        adam_jax.get_master_weights(params, adam_jax.adamw(1e-3).init(params))
    with pytest.raises(ValueError, match=says("get_master_weights", "1", "2", "parameters")):
        adam_jax.get_master_weights({"w": params["w"]}, state)
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match=says("master_weights", "'d'", "float64", "float32")),
    ):
        tx.init({"d": jnp.ones(2, jnp.float64)})
    assert repr(tx).startswith("master_weights(adamw(learning_rate=0.001") and "bits=24" in repr(tx)

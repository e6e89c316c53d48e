"""The streamed step works in place, gives the bits of a step in one piece, and runs per shard."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from helpers import MB, TYPICAL, largest_sent, normal, optimizer, other_rules_slowly, slowly

# whole tiles; some rows left over; rows that cut blocks; one axis; three axes
SHAPES = [(320, 1024), (301, 1024), (500, 700), (2**18 + 256,), (6, 60, 1024)]


def compiled(tx, shape, donate=(0, 1)):
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, p)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=donate)
    return step.lower(p, state, p).compile()


def temporaries(tx, shape, donate=(0, 1)):
    return compiled(tx, shape, donate).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "shape, donate",
    [
        ((1335, 50257), (0, 1)),
        slowly((65536, 1024), ()),
        *(slowly(shape, (0, 1)) for shape in ((65536, 1024), (2**26,), (2**26 + 3,))),
    ],
)
def test_temporaries_do_not_grow_with_the_leaf(shape, donate):
    assert temporaries(adam_jax.adamw(1e-3, storage="int8"), shape, donate) <= 8 * MB


@other_rules_slowly(TYPICAL[1:])
def test_int8_state_is_streamed_in_place(name):
    assert temporaries(optimizer(name, storage="int8"), (16384, 1024)) <= 8 * MB


@pytest.mark.parametrize("moment", [slowly("m"), "n"])
def test_int8_and_float32_moments_are_streamed_side_by_side(moment):
    tx = adam_jax.adan(1e-3, storage={moment: "int8"})
    assert temporaries(tx, (16384, 1024)) <= 8 * MB


@pytest.mark.standard_promotion
def test_a_training_step_needs_the_memory_of_sgd_and_the_state():
    """The direction is written over the gradient, a temporary buffer of the same program."""
    shape = (65536, 1024)
    p, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (8, shape[0])))

    def needs(tx):
        def step(p, state, x):
            grads = jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p) ** 2))(p)
            updates, state = tx.update(grads, state, p)
            return optax.apply_updates(p, updates), state

        state = jax.eval_shape(tx.init, p)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(p, state, x)
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes

    adamw, clip = adam_jax.adamw(1e-3, storage="int8"), adam_jax.clip_by_global_norm(1.0)
    state = adam_jax.memory_report(adamw, p).state_bytes
    sgd = optax.chain(clip, optax.sgd(1e-3))
    assert needs(adam_jax.chain(clip, adamw)) <= 1.01 * (needs(sgd) + state)


def trajectory(tx, params, transform=jax.jit, steps=3):
    update = transform(tx.update)
    state = tx.init(params)
    for t in range(steps):
        grads = jnp.sin(params * (3.0 + t))
        updates, state = update(grads, state, params)
    return updates, state


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shape",
    [
        *(("adamw", s) for s in SHAPES),
        *((n, SHAPES[1]) for n in ("amsgrad", "stable_adamw", "lion")),
    ],
)
def test_a_streamed_step_equals_a_step_in_one_piece_bit_for_bit(name, shape):
    params = normal(shape)
    make = getattr(adam_jax, name)
    stream, xla, again = (
        trajectory(make(1e-3, storage="int8", implementation=i), params)
        for i in ("stream", "xla", "auto")
    )
    chex.assert_trees_all_equal(again, stream)
    chex.assert_trees_all_equal(stream[1], xla[1])
    if name == "stable_adamw":  # its mean is summed in another order
        chex.assert_trees_all_close(stream[0], xla[0], rtol=1e-5)
    else:
        chex.assert_trees_all_equal(stream[0], xla[0])


def test_float32_state_can_be_streamed():
    params = normal((301, 1024))
    stream, xla = (
        trajectory(adam_jax.adamw(1e-3, implementation=i), params) for i in ("stream", "xla")
    )
    chex.assert_trees_all_close(stream, xla, rtol=1e-5, atol=1e-7)


def test_streamed_mars_clips_by_the_norm_of_the_whole_leaf():
    """A rule may get only a tile of the leaf, whose norm is smaller."""
    params = normal((301, 1024))
    stream, xla = (
        trajectory(adam_jax.mars(adam_jax.scale_by_adam(), implementation=i), params)[1]
        for i in ("stream", "xla")
    )
    chex.assert_trees_all_close(stream[1].mu, xla[1].mu, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_streaming_under_vmap_equals_single_runs():
    members = normal((2, 301, 1024))
    rates = jnp.array([1e-3, 2e-3])

    def update(rate, g, state, p):
        return adam_jax.adamw(rate, storage="int8").update(g, state, p)

    def run(transform, rates, p):
        step = jax.jit(transform(update))
        state = transform(adam_jax.adamw(1e-3, storage="int8").init)(p)
        for t in (3.0, 4.0):
            updates, state = step(rates, jnp.sin(p * t), state, p)
        return updates, state

    together = run(jax.vmap, rates, members)
    for i in range(2):
        alone = run(lambda f: f, rates[i], members[i])
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], together[1]), alone[1])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together[0]), alone[0])


@pytest.mark.slow
def test_streaming_under_scan_equals_vmap():
    layers = normal((3, 160, 1024))
    tx = adam_jax.adamw(1e-3, storage="int8")
    state = jax.vmap(tx.init)(layers)
    scanned = jax.jit(
        lambda p, s: jax.lax.scan(lambda _, ps: (None, tx.update(*ps, ps[0])), None, (p, s))[1]
    )(layers, state)
    mapped = jax.jit(jax.vmap(lambda p, s: tx.update(p, s, p)))(layers, state)
    chex.assert_trees_all_equal(scanned, mapped)


# Sharded leaves: nothing as large as the leaf is sent, and the bits equal one device's


@pytest.mark.eight_devices
@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "shape, spec",
    [
        ((256, 2048), P("data", "model")),
        ((8, 64, 1024), P("data", None, "model")),
        ((64, 11008), P(None, ("data", "model"))),  # shards cut blocks
        ((4100, 96), P(None, "data")),
    ],
)
def test_a_sharded_leaf_is_streamed_shard_by_shard(shape, spec, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    whole = normal(shape)
    tx = adam_jax.adamw(1e-3, storage="int8")
    expected = trajectory(tx, whole)
    with jax.set_mesh(mesh):
        p = jax.device_put(whole, NamedSharding(mesh, spec))
        state = tx.init(p)
        program = jax.jit(tx.update).lower(p, state, p).compile().as_text()
        got = trajectory(tx, p)
    assert largest_sent(program) <= expected[1][0].mu.scales.size
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(expected))
    assert got[0].sharding.is_equivalent_to(p.sharding, p.ndim)
    assert got[1][0].mu.codes.sharding.is_equivalent_to(p.sharding, p.ndim)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_the_mean_of_a_sharded_leaf_is_over_the_whole_leaf():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = normal((256, 1024))
    tx = adam_jax.stable_adamw(1e-3, storage="int8")
    p = jax.device_put(whole, NamedSharding(mesh, P("data")))
    chex.assert_trees_all_close(
        jax.device_get(trajectory(tx, p)[0]), jax.device_get(trajectory(tx, whole)[0]), rtol=1e-5
    )


@pytest.mark.eight_devices
@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_nnx_trains_if_the_devices_do_not_divide_the_scales(jitted):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    tx = adam_jax.adamw(1e-2, storage="int8")
    by_columns = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))

    def create():
        model = nnx.Linear(64, 11008, kernel_init=by_columns, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    with jax.set_mesh(mesh):
        model, optimizer = (nnx.jit(create) if jitted else create)()
        x = normal((4, 64), seed=1)
        losses = [float(step(model, optimizer, x)) for _ in range(5)]
    assert losses[-1] < losses[0]
    moments = adam_jax.moments(optimizer.opt_state)
    assert jax.tree.leaves(moments["nu"])[-1].shape == (64, 11008)

"""On eight virtual CPU devices, every sharding gives one device's result and gathers nothing."""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from helpers import (
    QUICKLY,
    RULES,
    auto_slowly,
    every_mode,
    optimizer,
    slowly,
    step_of,
    typical_rules,
)

pytestmark = pytest.mark.eight_devices

STEPS = 10
LAYOUTS = {"data": P(), "fsdp": P("data"), "both": P("data", "model")}


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def arrays(seed):
    """Return a float32 and a bfloat16 array for each layout."""
    rng = np.random.default_rng(seed)
    return {
        dtype: {name: jnp.asarray(rng.normal(size=(16, 32)), dtype) for name in LAYOUTS}
        for dtype in ("float32", "bfloat16")
    }


def place_on(mesh, layouts=LAYOUTS):
    """Return a function that shards each array as its name says."""
    named = {name: NamedSharding(mesh, spec) for name, spec in layouts.items()}
    shardings = {"float32": named, "bfloat16": named}
    return functools.partial(jax.device_put, device=shardings)


def make(name):
    return optimizer(name, weight_decay=0.1, weight_decay_mask=adam_jax.not_matching("fsdp"))


def run(name, place):
    """Return parameters and state after STEPS steps that donate them, and the program."""
    tx = make(name)
    params, *grads = (place(arrays(seed)) for seed in range(4))
    state = tx.init(params)
    lowered = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(params, state, grads[0])
    step = lowered.compile(QUICKLY)
    for t in range(STEPS):
        params, state = step(params, state, grads[t % 3])
    return params, state, step.as_text()


@functools.cache
def run_alone(name):
    """Return the run on one device."""
    return run(name, lambda leaves: leaves)[:2]


def assert_laid_out(tx, state, params):
    """Check that every moment is sharded like its parameter."""

    def check(moment, p):
        assert moment.sharding.is_equivalent_to(p.sharding, p.ndim), (moment.sharding, p.sharding)

    optax.tree.map_params(tx, check, state, params)


def assert_close(ours, expected):
    """Check equality up to rounding, which may differ in one bfloat16 element of a thousand.

    XLA rewrites divisions by a scalar differently for one device and for many.
    """
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        if a.dtype == jnp.bfloat16:
            assert np.mean(np.asarray(a) != np.asarray(b)) <= 1e-3
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@typical_rules
def test_every_sharding_equals_the_run_on_one_device(name):
    """Include random rounding, which depends on an element's position in the whole array."""
    mesh = make_mesh()
    params, state, program = run(name, place_on(mesh))
    assert_close((params, state), run_alone(name))
    assert_laid_out(make(name), state, params)
    collectives = set(re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", program))
    # a mean over the leaf is one number for each device to send
    assert collectives == (set() if "mean" not in RULES[name].inputs else {"all-reduce"})


@pytest.mark.slow
@auto_slowly
def test_every_sharding_gives_the_same_bits(axis_type):
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        replicated = place_on(mesh, dict.fromkeys(LAYOUTS, P()))
        whole, sharded = (run("adam", place)[:2] for place in (replicated, place_on(mesh)))
    chex.assert_trees_all_equal(sharded, whole)


@every_mode
@typical_rules
def test_the_state_is_sharded_like_the_parameters(name, axis_type):
    """Check an eager init, and a jitted one (automatic axes) or a step (explicit axes)."""
    mesh, tx = make_mesh(axis_type), make(name)
    with jax.set_mesh(mesh):
        params = place_on(mesh)(arrays(0))
        state = tx.init(params)
        assert_laid_out(tx, state, params)
        if axis_type == AxisType.Auto:
            shardings = optax.tree.map_params(
                tx,
                lambda _, p: p.sharding,
                jax.eval_shape(tx.init, params),
                params,
                transform_non_params=lambda _: NamedSharding(mesh, P()),
            )
            jitted = jax.jit(tx.init, out_shardings=shardings)(params)
            assert_laid_out(tx, jitted, params)
            chex.assert_trees_all_equal(jitted, state)
        else:
            stepped = jax.eval_shape(step_of(tx), params, state, params)
            before, after = (jax.tree.map(jax.typeof, tree) for tree in ((params, state), stepped))
            assert after == before
            assert "16@data,32@model" in str(after[0]["bfloat16"]["both"])


@pytest.mark.parametrize("way", ["shard_map", slowly("pmap")])
def test_shard_map_and_pmap_equal_jit(way):
    """Average the gradients over devices, with replicated parameters and state."""
    tx = adam_jax.chain(adam_jax.clip_by_global_norm(1.0), make("adam"))
    params = start = {"fsdp": jnp.ones((4, 3)), "w": jnp.full((3,), 0.5)}
    gradients = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(0).normal(size=(8, *p.shape)), p.dtype), params
    )
    state = tx.init(params)

    def step(params, state, grads):
        if way == "shard_map":
            grads = jax.tree.map(lambda g: jnp.squeeze(g, 0), grads)
        return step_of(tx)(params, state, jax.lax.pmean(grads, "devices"))

    if way == "shard_map":
        mesh = jax.make_mesh((8,), ("devices",))
        gradients = jax.device_put(gradients, NamedSharding(mesh, P("devices")))
        specs = {"in_specs": (P(), P(), P("devices")), "out_specs": P()}
        parallel = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    else:
        parallel = jax.pmap(step, "devices", in_axes=(None, None, 0), out_axes=None)
    for _ in range(3):
        params, state = parallel(params, state, gradients)

    expected = start, tx.init(start)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
    for _ in range(3):
        expected = jax.jit(step_of(tx))(*expected, mean)
    chex.assert_trees_all_close((params, state), expected, rtol=1e-5, atol=1e-6)


@every_mode
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_memory_report_counts_the_bytes_of_each_device(axis_type, storage):
    mesh = make_mesh(axis_type)
    w = jax.device_put(jnp.ones((512, 256)), NamedSharding(mesh, P("data", "model")))
    params = {"w": w, "b": jax.device_put(jnp.ones(300), NamedSharding(mesh, P()))}
    tx = adam_jax.adamw(1e-3, storage=storage)
    report = adam_jax.memory_report(tx, params)
    with jax.set_mesh(mesh):
        init = jax.jit(tx.init, out_shardings=adam_jax.state_sharding(tx, params))
        kept = jax.tree.leaves((params, params, init(params)))
    assert report.total_bytes == sum(x.nbytes for x in kept)
    assert report.bytes_per_device == sum(x.addressable_shards[0].data.nbytes for x in kept)
    assert "MB per device" in str(report)

"""Steps at constant norms: `hyperball` around any direction, and `adamh`."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import adam_jax
import reference
from adam_jax import not_matching
from helpers import every_mode, says, slowly, step_of

SHAPES = {"kernel": (8, 5), "stack": (3, 4, 5), "bias": (5,), "scale": ()}


def normal(shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shapes[k]), dtype) for k in sorted(shapes)}


def norms(tree):
    return {k: np.linalg.norm(np.asarray(x, np.float64).ravel()) for k, x in tree.items()}


def run(tx, params, steps=5, state=None, apply=False):
    """Return the parameters and the state after steps with random gradients."""
    step = jax.jit(functools.partial(applied, tx) if apply else step_of(tx))
    state = tx.init(params) if state is None else state
    for seed in range(1, steps + 1):
        grads = normal({k: np.shape(p) for k, p in params.items()}, seed)
        grads = {k: jax.device_put(grads[k].astype(p.dtype), p.sharding) for k, p in params.items()}
        params, state = step(params, state, grads)
    return params, state


def applied(tx, params, state, grads):
    return adam_jax.apply(tx, grads, state, params)


# The formula


def check_reference(tx, direction, spherical, learning_rate=0.05):
    """Compare with the float64 references of Adam, or Lion, and of the step."""
    with jax.enable_x64(True):
        params = normal(SHAPES, dtype=np.float64) | {"zeros": jnp.zeros((4, 3))}
        state, update = tx.init(params), jax.jit(tx.update)
        expected, states = jax.tree.map(np.asarray, params), {key: {} for key in params}
        radius = norms(params)
        for t in range(1, 21):
            grads = normal({k: p.shape for k, p in expected.items()}, t, np.float64)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for k, g in grads.items():
                u, states[k] = direction(np.asarray(g), states[k], t=t)
                if k in spherical:
                    given = {"learning_rate": learning_rate}
                    expected[k] = reference.hyperball(u, expected[k], radius[k], **given)
                else:
                    expected[k] = expected[k] - learning_rate * u
        for k, p in expected.items():
            np.testing.assert_allclose(params[k], p, rtol=1e-12, atol=1e-12, err_msg=k)


adam = functools.partial(reference.adam, b2=0.95)


@pytest.mark.parametrize("implementation", ["xla", slowly("stream"), slowly("pallas")])
def test_adamh_equals_its_reference(implementation):
    check_reference(adam_jax.adamh(0.05, implementation=implementation), adam, ("kernel", "stack"))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_any_direction_is_stepped_on_the_sphere():
    masks = {"mask": not_matching("kernel", "zeros")}
    for direction in (adam_jax.scale_by_adam(b2=0.95), optax.scale_by_adam(b2=0.95)):
        check_reference(adam_jax.hyperball(direction, 0.05), adam, ("kernel", "stack"))
    everything_else = ("stack", "bias", "scale")
    lion = adam_jax.hyperball(adam_jax.scale_by_lion(), 0.05, **masks)
    check_reference(lion, reference.lion, everything_else)


def test_hyperball_equals_adamh():
    params = normal(SHAPES)
    one = run(adam_jax.adamh(0.05), params)
    two = run(adam_jax.hyperball(adam_jax.scale_by_adam(b2=0.95), 0.05), params)
    chex.assert_trees_all_equal(one, two)


def test_a_complex_leaf_keeps_its_norm():
    params = {"w": jnp.asarray([[1 + 2j, 3], [0, -1j]], jnp.complex64)}
    tx = adam_jax.adamh(0.1)
    updates, _ = tx.update({"w": params["w"] * 1j + 1}, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert jnp.linalg.norm(after["w"]) == pytest.approx(float(jnp.linalg.norm(params["w"])), 1e-6)
    assert jnp.linalg.norm(updates["w"]) == pytest.approx(0.1 * 4.0, rel=0.1)


# Which leaves


def test_leaves_of_norm_0_and_masked_leaves_take_the_plain_step():
    params = {"zeros": jnp.zeros((4, 3)), "embed": jnp.ones((4, 3)), "kernel": jnp.ones((4, 3))}
    tx = adam_jax.adamh(0.1, mask=not_matching("embed"))
    plain = adam_jax.adam(0.1, b2=0.95)
    ours, theirs = run(tx, params, 3)[0], run(plain, params, 3)[0]
    for name in ("zeros", "embed"):
        chex.assert_trees_all_close(ours[name], theirs[name], rtol=1e-6)
    assert jnp.linalg.norm(ours["kernel"]) == pytest.approx(12**0.5, rel=1e-6)


@pytest.mark.parametrize(
    "mask", [{"a": True, "b": False}, {"a": False, "b": None}, lambda p: False]
)
def test_every_form_of_a_mask_gives_each_leaf_exactly_one_step(mask):
    params = {"a": {"w": jnp.ones((4, 3))}, "b": {"w": jnp.ones((4, 3))}}
    tx = adam_jax.adamh(0.1, mask=mask)
    updates, _ = tx.update(params, tx.init(params), params)
    on_sphere = isinstance(mask, dict) and mask["a"]
    # along the parameter itself, the step on the sphere is 0
    np.testing.assert_allclose(updates["a"]["w"], 0 if on_sphere else -0.1, atol=1e-6)
    np.testing.assert_allclose(updates["b"]["w"], -0.1, rtol=1e-6)


def test_a_zero_gradient_moves_nothing():
    params = normal(SHAPES)
    tx = adam_jax.adamh(0.1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.zeros_like, params), atol=1e-6)


# Stacks


def entries(x):
    return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)


def int8(path, leaf):
    return "int8"


@pytest.mark.parametrize(
    "implementation, storage", [("auto", None), slowly("stream", int8), slowly("pallas", int8)]
)
def test_each_entry_of_a_stack_keeps_its_own_norm(implementation, storage):
    params = {"w": normal({"w": (3, 16, 128)})["w"] * jnp.array([1, 10, 0.1])[:, None, None]}
    params |= {"norm": jnp.ones((3, 16)), "bias": jnp.ones(16)}
    given = {"storage": storage, "implementation": implementation}
    tx = adam_jax.adamh(0.05, batch_axes=1, **given)
    after, state = run(tx, params)
    np.testing.assert_allclose(entries(after["w"]), entries(params["w"]), rtol=1e-6)
    radius = state[-1].inner_state.radius
    assert {k: x.shape for k, x in radius.items()} == {"w": (3,), "norm": (3,), "bias": ()}
    if storage is None:  # a layer by itself takes the same steps
        alone = adam_jax.adamh(0.05)
        layers = params["w"]
        state = jax.vmap(alone.init)(layers)
        for seed in range(1, 6):
            g = normal({k: p.shape for k, p in params.items()}, seed)["w"]
            updates, state = jax.vmap(alone.update)(g, state, layers)
            layers = layers + updates
        np.testing.assert_allclose(after["w"], layers, rtol=2e-5, atol=1e-6)


def test_two_batch_axes_and_a_batch_of_one_keep_each_norm():
    params = normal({"w": (1, 4, 6, 5)})
    after, state = run(adam_jax.adamh(0.05, batch_axes=2), params)
    own = [np.linalg.norm(np.asarray(p["w"], np.float64), axis=(2, 3)) for p in (after, params)]
    np.testing.assert_allclose(*own, rtol=1e-6)
    assert state[-1].inner_state.radius["w"].shape == (1, 4)


@pytest.mark.slow
@pytest.mark.eight_devices
@every_mode
@pytest.mark.parametrize("storage", [None, int8])
@pytest.mark.parametrize("batch_axes", [0, 1])
def test_sharded_leaves_take_the_same_steps(axis_type, storage, batch_axes):
    params = normal({"rows": (16, 256), "layers": (8, 4, 128), "inner": (3, 8, 128)})
    specs = {"rows": P("data"), "layers": P("data"), "inner": P(None, "data")}
    tx = adam_jax.adamh(0.05, storage=storage, batch_axes=batch_axes)
    expected, _ = run(tx, params, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharded = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}
    for wrapped in (tx, adam_jax.zero1(tx, mesh, specs=specs)):
        after, state = run(wrapped, sharded, 3)
        # a code may differ by one
        tolerance = 2e-3 if storage else 1e-6
        chex.assert_trees_all_close(after, expected, rtol=tolerance, atol=tolerance)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


# Around it


@pytest.mark.slow
def test_apply_jit_and_vmap_agree():
    params = normal(SHAPES)
    tx = adam_jax.adamh(0.05)
    one = run(tx, params)
    chex.assert_trees_all_close(run(tx, params, apply=True), one, rtol=1e-5, atol=1e-6)
    both = jax.tree.map(lambda *xs: jnp.stack(xs), params, normal(SHAPES, 9))
    state = jax.vmap(tx.init)(both)
    updates, _ = jax.vmap(tx.update)(both, state, both)
    for k in range(2):
        alone = jax.tree.map(lambda x, k=k: x[k], both)
        expected, _ = tx.update(alone, tx.init(alone), alone)
        mine = jax.tree.map(lambda x, k=k: x[k], updates)
        chex.assert_trees_all_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.standard_promotion
def test_a_schedule_continues_after_a_reset():
    def schedule(count):
        return 0.1 / (count + 1)

    params = {"w": jnp.asarray([[1.0, 0.0], [0.0, 1.0]])}
    grads = {"w": jnp.asarray([[0.0, 1.0], [1.0, 0.0]])}
    tx = adam_jax.adamh(schedule)
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(grads, state, params)
        size = jnp.linalg.norm(updates["w"]) / jnp.linalg.norm(params["w"])
        assert float(size) == pytest.approx(0.1 / (t + 1), rel=1e-2)
    reset = adam_jax.reset_step_count(state)
    assert (reset[0].count, reset[-1].inner_state.count) == (0, 3)


def test_tunable_and_groups_change_the_learning_rate():
    params = normal({"kernel": (8, 5), "embed": (8, 5)})
    tx = adam_jax.groups(
        adam_jax.tunable(adam_jax.adamh), {"embed": {"learning_rate": 1e-3}}, learning_rate=0.1
    )
    state = tx.init(params)
    state = adam_jax.set_hyperparams(state, group="default", learning_rate=0.2)
    updates, _ = tx.update(normal({"kernel": (8, 5), "embed": (8, 5)}, 1), state, params)
    relative = {k: float(jnp.linalg.norm(updates[k]) / jnp.linalg.norm(params[k])) for k in params}
    assert relative == pytest.approx({"kernel": 0.2, "embed": 1e-3}, rel=0.05)


def test_conversion_takes_the_radius_from_the_parameters():
    params = normal(SHAPES)
    state = run(adam_jax.adamw(1e-3), params, 3)[1]
    tx = adam_jax.adamh(0.05)
    converted = adam_jax.convert_state(state, tx, params)
    chex.assert_trees_all_equal(converted[0], state[0])
    chex.assert_trees_all_equal(converted[-1].inner_state.radius, tx.init(params)[-1][0].radius)


@pytest.mark.slow
def test_gradient_release_keeps_the_norm_of_each_layer():
    rng = np.random.default_rng(0)
    outer = {"in": jnp.asarray(rng.normal(size=(2, 8)), jnp.float32), "out": jnp.ones((8, 1))}
    layers = {"kernel": jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32)}
    layers["kernel"] *= jnp.array([1, 2, 0.5])[:, None, None]
    params = {"outer": outer, "layers": layers}
    step = adam_jax.gradient_release(
        adam_jax.adamh(0.01),
        first=lambda outer, batch: batch["x"] @ outer["in"],
        layer=lambda layer, h: h + jnp.tanh(h @ layer["kernel"]),
        last=lambda outer, h, batch: jnp.mean((h @ outer["out"] - batch["y"]) ** 2),
    )
    batch = {"x": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "y": jnp.ones((4, 1))}
    state, new = step.init(params), params
    for _ in range(3):
        new, state, _ = jax.jit(step)(new, state, batch)
    moved = new["layers"]["kernel"]
    np.testing.assert_allclose(entries(moved), entries(layers["kernel"]), rtol=1e-6)
    assert np.all(entries(moved - layers["kernel"]) > 0.01 * entries(layers["kernel"]))
    assert state.inner_state[-1].inner_state.radius["layers"]["kernel"].shape == (3,)


@pytest.mark.slow
def test_norms_stay_over_1000_steps():
    params = normal({"w": (1024, 1024)})
    check_norms(adam_jax.adamh(0.01), params, lambda params, state: params, 1e-6)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_norms_of_master_weights_stay_within_the_rounding_of_bfloat16():
    params = {"w": normal({"w": (256, 256)})["w"].astype(jnp.bfloat16)}
    for bits, tolerance in ((32, 1e-6), (24, 1e-4)):
        tx = adam_jax.master_weights(adam_jax.adamh(0.01), bits=bits)
        after = check_norms(tx, params, adam_jax.get_master_weights, tolerance)
        assert norms(after)["w"] == pytest.approx(norms(params)["w"], rel=2**-9)


def check_norms(tx, params, read, tolerance):
    """Check the norm after every 100 of 1000 steps, and return the parameters."""
    size, state = norms(params)["w"], tx.init(params)

    @jax.jit
    def run(params, state, key):
        def step(carry, key):
            params, state = carry
            w = params["w"]
            noise = jax.random.normal(key, w.shape, jnp.float32)
            grads = {"w": (noise + 0.1 * w.astype(jnp.float32)).astype(w.dtype)}
            return adam_jax.apply(tx, grads, state, params), None

        return jax.lax.scan(step, (params, state), jax.random.split(key, 100))[0]

    for k in range(10):
        params, state = run(params, state, jax.random.key(k))
        assert norms(read(params, state))["w"] == pytest.approx(size, rel=tolerance)
    return params


# Errors


def test_a_finished_optimizer_is_refused():
    for tx in (adam_jax.adamw(1e-3), optax.sgd(1e-3), adam_jax.adamh(0.1)):
        with pytest.raises(ValueError, match=says("hyperball", "direction", "optimizer")):
            adam_jax.hyperball(tx, 0.1)
    with pytest.raises(ValueError, match=says("cautious", "direction")):
        adam_jax.cautious(adam_jax.hyperball(adam_jax.scale_by_adam(), 0.1))


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match=says("hyperball", "direction", "adamw", "call it first")):
        adam_jax.hyperball(adam_jax.adamw, 0.1)
    with pytest.raises(ValueError, match=says("hyperball", "learning_rate", "-0.1")):
        adam_jax.hyperball(adam_jax.scale_by_adam(), -0.1)
    with pytest.raises(ValueError, match=says("adamh", "batch_axes", "integer >= 0", "-1")):
        adam_jax.adamh(0.1, batch_axes=-1)
    with pytest.raises(ValueError, match=says("hyperball", "batch_axes", "integer >= 0", "1.0")):
        adam_jax.hyperball(adam_jax.scale_by_adam(), 0.1, batch_axes=1.0)
    tx = adam_jax.adamh(0.1)
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=says("adamh", "hyperball needs the parameters", "'w'")):
        tx.update(params, tx.init(params))

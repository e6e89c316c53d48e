"""Formats smaller than one element per parameter: factored moments, means, and compact."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from adam_jax import storage
from helpers import normal, slowly

SHAPE = (48, 160)
MEAN = {"nu": storage.mean(-1)}


def gradient(t, shape=SHAPE):
    """Return a gradient whose elements have very different sizes."""
    size = np.exp(np.random.default_rng(7).normal(size=shape))
    return normal(shape, seed=t, scale=size)


def trajectory(tx, params, steps, gradients=gradient):
    """Return the last update and state."""
    step = jax.jit(tx.update)
    state, update = tx.init(params), None
    for t in range(steps):
        grads = jax.tree.map(lambda p: gradients(t, p.shape).astype(p.dtype), params)  # noqa: B023
        update, state = step(grads, state, params)
    return update, state


# Numbers


def adafactor_averages(gradients, b2):
    """Return row and column averages of g² in float64 (Shazeer & Stern, 2018, Algorithm 1)."""
    rows = columns = 0.0
    for g in gradients:
        square = np.asarray(g, np.float64) ** 2
        rows = b2 * rows + (1 - b2) * square.mean(-1, keepdims=True)
        columns = b2 * columns + (1 - b2) * square.mean(-2, keepdims=True)
    return rows, columns


def signs(t, rows=True, columns=True):
    """Return a gradient of one size per row and column, whose nu is above its floor."""
    sizes = [np.exp(np.random.default_rng(n).normal(size=n)) for n in SHAPE]
    size = (sizes[0][:, None] if rows else 1.0) * (sizes[1][None] if columns else 1.0)
    sign = np.random.default_rng(t).choice([-1, 1], SHAPE)
    return jnp.asarray(np.asarray(sign * size * (1 + 0.5 * (t % 3)), np.float32))


@pytest.mark.parametrize(
    "dtype, rtol",
    [("float64", 1e-12), slowly("float32", 4e-6)],
)
def test_rows_and_columns_are_the_averages_of_adafactor(dtype, rtol):
    """In float32, nu itself is off by 2e-6 after 200 steps, because b2 is rounded."""
    with jax.enable_x64(dtype == "float64"):
        gradients = [signs(t).astype(dtype) for t in range(200)]
        tx = adam_jax.scale_by_adam(storage={"nu": "factored"})
        _, state = trajectory(tx, jnp.zeros(SHAPE, dtype), 200, lambda t, _: gradients[t])
        for got, want in zip(state.nu, adafactor_averages(gradients, 0.999), strict=True):
            np.testing.assert_allclose(got, want, rtol=rtol)


def reference_step(g, mu, rows, columns, t, b1=0.9, b2=0.999, eps=1e-8):
    """Return Adam's direction and new state: nu is read with its floor, and stored as means."""
    nu = rows / rows.mean(-2, keepdims=True) * columns if t > 1 else 0.0
    floor = (1 - b2) * (1 - b1**2 / b2) / (1 - b1) ** 2
    nu = b2 * np.maximum(nu, floor * mu**2) + (1 - b2) * g**2
    mu = b1 * mu + (1 - b1) * g
    direction = mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps)
    return direction, mu, nu.mean(-1, keepdims=True), nu.mean(-2, keepdims=True)


def test_a_factored_step_is_its_float64_reference():
    with jax.enable_x64(True):
        tx = adam_jax.scale_by_adam(storage={"nu": "factored"})
        rng = np.random.default_rng(0)
        state = tx.init(jnp.zeros(SHAPE, jnp.float64))
        mu, rows, columns = np.zeros(SHAPE), np.zeros((48, 1)), np.zeros((1, 160))
        for t in range(1, 31):
            active = rng.random(SHAPE) < 0.1  # so that the floor is used
            g = rng.normal(size=SHAPE) * active
            want, mu, rows, columns = reference_step(g, mu, rows, columns, t)
            got, state = tx.update(jnp.asarray(g), state)
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(state.nu.rows, rows, rtol=1e-12)


@pytest.mark.parametrize("axis, shape", [(-1, (48, 1)), (-2, (1, 160)), ((-2, -1), (1, 1))])
def test_mean_storage_averages_the_means_of_squared_gradients(axis, shape):
    tx = adam_jax.scale_by_adam(storage={"nu": storage.mean(axis)})
    rows, columns = shape[0] > 1, shape[1] > 1
    _, state = trajectory(tx, jnp.zeros(SHAPE), 20, lambda t, _: signs(t, rows, columns))
    want = 0.0
    for t in range(20):
        square = np.asarray(signs(t, rows, columns), np.float64) ** 2
        want = 0.999 * want + 0.001 * square.mean(axis, keepdims=True)
    assert state.nu.values.shape == shape
    np.testing.assert_allclose(state.nu.values, want, rtol=1e-6)


def patterns():
    """Return gradients, dense, sparse, and in blocks, for which means mislead about elements."""
    n, m = SHAPE
    spread = jnp.exp(2 * jax.random.normal(jax.random.key(9), SHAPE))
    blocks = jnp.zeros(SHAPE).at[: n // 2, : m // 2].set(1).at[n // 2 :, m // 2 :].set(1e-3)

    def all_at(t):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), t), 3)
        g, u = jax.random.normal(keys[0], SHAPE), jax.random.uniform(keys[1], SHAPE)
        on = jax.random.uniform(keys[2]) < 0.3
        rows = (jnp.arange(n)[:, None] + t) % 2
        masks = [u < 0.1, u < 0.01, rows == 1]
        sparse = [jnp.where(mask, g, 0) for mask in masks]
        return jnp.stack([g * spread, g * blocks, jnp.where(on, g * blocks, 0), *sparse])

    return all_at


EXACT_STEP = 3.0
"""The largest float32 step, in learning rates, of the cases that the test checks."""


NAMES = sorted({e.name for e in adam_jax.catalogue()} - {"adamw", "nadamw", "adamaxw", "sgd"})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compact_takes_no_large_step_on_sparse_or_structured_gradients(name):
    """Without the floor, factored Adam takes steps of up to 3,445 learning rates here."""
    at = patterns()
    params = jnp.zeros(SHAPE)

    def largest(storage):
        kwargs = {"b1": 0.9} if name == "schedule_free_adamw" else {}
        tx = getattr(adam_jax, name)(1.0, storage=storage, **kwargs)

        def step(carry, t):
            states, most = carry
            updates, states = jax.vmap(lambda g, s: tx.update(g, s, params))(at(t), states)
            return (states, jnp.maximum(most, jnp.max(jnp.abs(updates), axis=(1, 2)))), None

        start = jax.tree.map(lambda x: jnp.stack([x] * 6), tx.init(params)), jnp.zeros(6)
        (_, most), _ = jax.lax.scan(step, start, jnp.arange(1, 301))
        return np.asarray(most)

    exact, compact = largest("float32"), largest("compact")
    assert np.all(compact[exact <= EXACT_STEP] <= 8), (exact, compact)


def test_compact_state_survives_overflow_and_keeps_nan():
    tx = adam_jax.scale_by_adam(storage="compact")
    params = jnp.zeros((64, 128))
    large = jnp.full((64, 128), 1e30)
    update, state = tx.update(large, tx.init(params))
    assert np.all(np.isfinite(update)) and np.all(np.isfinite(state.nu.rows))
    _, state = tx.update(jnp.zeros((64, 128)).at[3, 5].set(jnp.nan), tx.init(params))
    assert np.isnan(state.nu.rows[3, 0]) and np.isnan(state.nu.columns[0, 5])
    assert np.isfinite(state.nu.rows[4, 0])
    for _ in range(2):  # the leaf stays NaN: a large finite average would stop it silently
        _, state = tx.update(jnp.ones((64, 128)), state, params)
    assert np.all(np.isnan(state.nu.rows)) and np.all(np.isnan(state.nu.columns))


# Policy


def test_compact_factors_averages_and_quantizes_the_rest():
    params = {
        "kernel": jnp.zeros((64, 128)),
        "stacked": jnp.zeros((3, 64, 128)),
        "heads": jnp.zeros((96, 12, 64)),
        "depthwise": jnp.zeros((3, 3, 1, 1024)),
        "small": jnp.zeros((8, 8)),
        "bias": jnp.zeros(5000),
    }
    state = adam_jax.adamw(1e-3, storage="compact").init(params)[0]
    assert {k: x.dtype for k, x in state.mu.codes.items()} == {
        **dict.fromkeys(["kernel", "stacked", "heads", "depthwise", "bias"], jnp.int8),
        "small": jnp.float32,
    }
    assert jax.tree.map(jnp.shape, state.nu.rows) == {
        "kernel": (64, 1),
        "stacked": (3, 64, 1),
        "heads": (96, 12, 1),
        "depthwise": (3, 3, 1, 1024),  # int8: rows and columns would be larger
        "small": (8, 8),
        "bias": (5000,),
    }
    assert state.nu.rows["depthwise"].dtype == jnp.uint8
    assert state.nu.rows["bias"].dtype == jnp.float32
    assert state.nu.columns["heads"].shape == (96, 1, 64)


def test_a_name_takes_precedence_over_a_kind():
    tx = adam_jax.adamw(1e-3, storage={"signed": "int8", "positive": "factored", "nu": "bfloat16"})
    state = tx.init(jnp.zeros((64, 128)))[0]
    assert state.nu.dtype == jnp.bfloat16 and state.mu.codes.dtype == jnp.int8


def test_factored_storage_keeps_the_format_of_other_moments():
    state = adam_jax.amsgrad(1e-3, storage="factored").init(jnp.zeros((64, 128)))[0]
    assert isinstance(state.nu, storage.Factored)
    assert state.mu.dtype == state.nu_max.dtype == jnp.float32


@pytest.mark.parametrize("name", ["adamax", "amsgrad", "adan", "yogi", "lion"])
def test_compact_quantizes_what_must_not_be_factored(name):
    tx = getattr(adam_jax, name)(1e-3, storage="compact")
    state = tx.init(jnp.zeros((64, 128)))[0]
    last = state[-1] if name != "adan" else state.n
    assert isinstance(last, storage.Quantized)


@pytest.mark.parametrize(
    "make, given, words",
    [
        ("adamw", {"mu": "factored"}, ["mu", "signed", "compact"]),
        ("adamw", {"signed": storage.mean(-1)}, ["mu", "signed", "mean(-1)"]),
        ("amsgrad", {"nu_max": "factored"}, ["nu_max", "average", "int8"]),
        ("adamax", {"nu": "factored"}, ["nu", "average", "int8"]),
        ("lion", "factored", ["lion", "non-negative average", "compact"]),
        ("adamw", {"v": "factored"}, ["'v'", "mu, nu, signed, positive"]),
        ("adamw", "compcat", ["'compact'", "'compcat'"]),
    ],
)
def test_a_format_that_does_not_fit_a_moment_is_an_error(make, given, words):
    with pytest.raises(ValueError) as error:
        getattr(adam_jax, make)(1e-3, storage=given)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("axis, error", [((), ValueError), ((0, 0), ValueError), (1.5, TypeError)])
def test_a_mean_needs_different_axes(axis, error):
    with pytest.raises(error, match="axis"):
        storage.mean(axis)


def test_compact_factors_only_if_a_lower_bound_limits_the_step():
    """For b1² ≥ b2, mu gives no lower bound, and factored steps reach 1,000 learning rates."""
    for b2, kind in ((0.95, storage.Factored), (0.8, storage.Quantized)):
        tx = adam_jax.scale_by_adam(b1=0.9, b2=b2, storage="compact")
        assert isinstance(tx.init(jnp.zeros((64, 128))).nu, kind)


def test_mu_dtype_goes_with_a_format_of_nu():
    state = adam_jax.adamw(1e-3, mu_dtype="bfloat16", storage="factored").init(jnp.zeros((64, 128)))
    assert state[0].mu.dtype == jnp.bfloat16 and isinstance(state[0].nu, storage.Factored)


def test_a_leaf_that_a_mean_does_not_fit_stays_as_it_is():
    params = {"w": jnp.zeros((64, 128)), "b": jnp.zeros((1, 64), jnp.bfloat16)}
    tx = adam_jax.adamw(1e-3, storage=MEAN)
    state = tx.init(params)
    converted = adam_jax.convert_state(state, tx, params)
    assert converted[0].nu.values["b"].dtype == state[0].nu.values["b"].dtype == jnp.bfloat16
    report = adam_jax.memory_report(tx, params)
    assert report.uncoded == (1, 2) and "1 of 2 leaves kept bfloat16" in str(report)


def test_a_function_may_not_mix_a_mean_with_other_formats():
    tx = adam_jax.rmsprop(1e-3, storage=lambda path, _: "int8" if path == "a" else storage.mean(-1))
    with pytest.raises(ValueError, match="one kind of format"):
        tx.init({"a": jnp.zeros((64, 128)), "b": jnp.zeros((64, 128))})


# Memory


def gpt2_small(heads=False):
    qkv = {"qkv": (768, 36, 64)} if heads else {"qkv": (768, 2304)}
    out = {"out": (12, 64, 768)} if heads else {"out": (768, 768)}
    block = {**qkv, **out, "up": (768, 3072), "down": (3072, 768)}
    tree = {"embed": (50257, 768), "position": (1024, 768), "blocks": [block] * 12}
    is_shape = functools.partial(lambda x: isinstance(x, tuple))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), tree, is_leaf=is_shape)


@pytest.mark.parametrize("heads, most", [(False, 1.06), (True, 1.13)])
def test_compact_takes_about_one_byte_of_state_per_parameter(heads, most):
    report = adam_jax.memory_report(adam_jax.adamw(1e-3, storage="compact"), gpt2_small(heads))
    assert report.state_bytes / report.parameters <= most
    tx = adam_jax.master_weights(adam_jax.adamw(1e-3, storage="compact"), bits=24)
    report = adam_jax.memory_report(tx, gpt2_small(heads))
    assert report.total_bytes / report.parameters <= 5.0 + most  # parameters, gradients, residuals


def test_the_memory_report_equals_the_bytes_of_the_buffers():
    params = {"w": jnp.zeros((256, 512), jnp.bfloat16), "b": jnp.zeros(64, jnp.bfloat16)}
    tx = adam_jax.master_weights(adam_jax.adamw(1e-3, storage="compact"), bits=24)
    state = tx.init(params)
    assert adam_jax.memory_report(tx, params).state_bytes == sum(
        x.nbytes for x in jax.tree.leaves(state)
    )
    assert "factored" in str(adam_jax.memory_report(tx, params))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2048, 2048), (4, 2**20)])
def test_a_step_in_place_needs_little_memory(shape):
    """Temporary buffers are of a tile's size, not the leaf's; rows of (4, 2²⁰) exceed a tile."""
    tx = adam_jax.adamw(1e-3, storage="compact" if shape[0] > 4 else {"signed": "int8", **MEAN})
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = jax.jit(functools.partial(adam_jax.apply, tx), donate_argnums=(1, 2))
    compiled = step.lower(p, jax.eval_shape(tx.init, p), p).compile()
    if jax.device_count() == 1:
        assert compiled.memory_analysis().temp_size_in_bytes <= 8e6


# Backends, devices, other states


@pytest.mark.parametrize(
    "given",
    [
        "compact",
        slowly("factored"),
        MEAN,
        slowly({"nu": storage.mean((-2, -1))}),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [
        (70, 300),
        *(slowly(s) for s in ((3, 40, 130), (2, 2**17 + 256))),
    ],
)
def test_backends_agree(given, shape):
    params = jnp.ones(shape)

    def run(implementation):
        tx = adam_jax.adamw(1e-3, storage=given, implementation=implementation)
        return trajectory(tx, params, 2)

    exact = run("xla")
    for other in ("stream", "pallas") if np.prod(shape) < 2**17 else ("stream",):
        for x, y in zip(jax.tree.leaves(exact), jax.tree.leaves(run(other)), strict=True):
            if jnp.issubdtype(x.dtype, jnp.integer):
                assert np.mean(np.asarray(x) != np.asarray(y)) < 1e-3
            else:
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6 * float(jnp.max(jnp.abs(x))))


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x", "y"), P(None, "x"), P("y")])
def test_a_sharded_step_is_the_step_on_one_device(kind, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    shapes = {"kernel": (64, 1024), "stack": (3, 64, 256)}
    params = {name: gradient(0, shape) for name, shape in shapes.items()}
    tx = adam_jax.adamw(1e-3, storage="compact")

    def put(tree):
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 2), *spec))), tree
        )

    expected = trajectory(tx, params, 3)
    step, state = jax.jit(tx.update), tx.init(put(params))
    assert state[0].nu.rows["kernel"].sharding.spec[0] == spec[0]
    for t in range(3):
        grads = put({name: gradient(t, shape) for name, shape in shapes.items()})
        update, state = step(grads, state, put(params))
    for got, want in zip(jax.tree.leaves((update, state)), jax.tree.leaves(expected), strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.eight_devices
def test_zero1_spreads_rows_and_codes():
    mesh = jax.make_mesh((8,), ("data",))
    tx = adam_jax.zero1(adam_jax.adamw(1e-3, storage="compact"), mesh)
    params = jax.device_put({"w": jnp.ones((64, 1024))}, NamedSharding(mesh, P()))
    state = tx.init(params)
    assert state[0].nu.rows["w"].sharding.spec[0] == "data"
    update, _ = jax.jit(tx.update)(params, state, params)
    assert np.all(np.isfinite(update["w"]))


def test_moments_reads_reduced_moments():
    state = trajectory(adam_jax.adamw(1e-3, storage="compact"), jnp.zeros(SHAPE), 3)[1]
    nu = state[0].nu
    np.testing.assert_allclose(
        adam_jax.moments(state)["nu"], nu.rows / nu.rows.mean() * nu.columns, rtol=1e-6
    )


CHANGES = [("float32", "compact"), ("int8", MEAN), ("compact", "int8")]


@pytest.mark.parametrize(
    "old, new",
    [
        pytest.param(old, new, marks=() if (old, new) in CHANGES else pytest.mark.slow)
        for old in ("float32", "int8", "compact")
        for new in ("compact", MEAN, "int8", "float32")
    ],
)
def test_a_running_state_changes_its_format(old, new):
    params = {"w": jnp.zeros((64, 128)), "b": jnp.zeros(64)}
    state = trajectory(adam_jax.adamw(1e-3, storage=old), params, 3)[1]
    tx = adam_jax.adamw(1e-3, storage=new)
    converted = adam_jax.convert_state(state, tx, params)
    assert jax.tree.structure(converted) == jax.tree.structure(tx.init(params))
    before, after = (adam_jax.moments(s)["nu"]["w"] for s in (state, converted))
    np.testing.assert_allclose(np.mean(after), np.mean(before), rtol=0.02)


def test_a_run_of_adafactor_continues():
    params = {"w": jnp.zeros((64, 128)), "tall": jnp.zeros((256, 64)), "b": jnp.zeros(64)}
    given = optax.scale_by_factored_rms(min_dim_size_to_factor=32)
    state = trajectory(given, params, 3)[1]
    tx = adam_jax.adamw(1e-3, storage="compact")
    nu = adam_jax.convert_state(state, tx, params)[0].nu
    np.testing.assert_allclose(nu.rows["w"][:, 0], state.v_row["w"], rtol=1e-5)
    np.testing.assert_allclose(nu.columns["w"][0], state.v_col["w"], rtol=1e-5)
    np.testing.assert_allclose(nu.columns["tall"][0], state.v_row["tall"], rtol=1e-5)
    np.testing.assert_allclose(nu.rows["b"], state.v["b"], rtol=1e-6)


def test_a_new_adafactor_state_converts_to_adamw_and_to_adafactor():
    params = {"w": jnp.zeros((64, 128))}
    adafactor = optax.adafactor(1e-3, min_dim_size_to_factor=32)
    fresh = adafactor.init(params)
    nu = adam_jax.convert_state(fresh, adam_jax.adamw(1e-3, storage="compact"), params)[0].nu
    assert not np.any(nu.rows["w"])
    same = adam_jax.convert_state(fresh, adafactor, params)
    assert jax.tree.structure(same) == jax.tree.structure(fresh)


def test_rows_and_columns_keep_the_axis_names_of_linen():
    nn = pytest.importorskip("flax.linen")
    params = {"w": nn.Partitioned(jnp.ones((64, 128)), names=("embed", "mlp"))}
    tx = adam_jax.adamw(1e-3, storage="compact")
    state = tx.init(params)
    specs = nn.get_partition_spec(state)[0].nu
    assert specs.rows["w"] == P("embed", None) and specs.columns["w"] == P(None, "mlp")
    _, new = tx.update(params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)

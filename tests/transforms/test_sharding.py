"""State sharded over eight devices: its bytes, its collectives, and steps equal to one device's."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from helpers import (
    QUICKLY,
    every_mode,
    explicit_slowly,
    gpt2_small,
    largest_sent,
    leaves_of,
    masters,
    normal,
    says,
    sent,
    slowly,
    step_of,
)

pytestmark = [
    pytest.mark.eight_devices,
    pytest.mark.standard_promotion,  # apply_updates on mixed dtypes
]

MESHES = {"line": ((8,), ("data",)), "grid": ((4, 2), ("data", "model"))}


def make_mesh(name="line", kind=AxisType.Auto):
    sizes, axes = MESHES[name]
    return jax.make_mesh(sizes, axes, axis_types=(kind,) * len(axes))


# Bytes


@pytest.mark.parametrize(
    "storage, dtype",
    [
        ("float32", jnp.float32),
        slowly("int8", jnp.float32),
        ("int8", jnp.bfloat16),
    ],
)
def test_each_device_holds_an_eighth_of_the_state(storage, dtype):
    """Check GPT-2 small; the devices divide its 50257 × 768 embedding along 768 only."""
    mesh = make_mesh()
    whole = NamedSharding(mesh, P())
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=whole), gpt2_small()
    )
    tx = adam_jax.adamw(1e-3, storage=storage)
    tx = adam_jax.zero1(masters(tx) if dtype == jnp.bfloat16 else tx, mesh)
    state, shardings = jax.eval_shape(tx.init, params), adam_jax.state_sharding(tx, params)

    def here(x, sharding):
        return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert sum(jax.tree.leaves(jax.tree.map(here, state, shardings))) <= total / 8 + 0.02 * total


def test_the_memory_report_lists_what_is_whole_on_each_device():
    mesh = make_mesh()
    params = {"thin": jnp.ones((1001, 768)), "odd": jnp.ones((7, 9))}
    params = jax.device_put(params, NamedSharding(mesh, P()))
    tx = adam_jax.zero1(adam_jax.adamw(1e-3, storage="int8"), mesh)
    report = adam_jax.memory_report(tx, params)
    held = {path: x.addressable_shards[0].data.nbytes for path, x in leaves_of(tx.init(params))}
    assert sum(row.per_device for row in report.rows[2:]) == sum(held.values())
    scales = "0/mu/scales/thin"  # 6 a row
    assert dict(report.whole)[scales] == held[scales] == 1001 * 6 * 4
    assert {"0/mu/codes/odd", "0/count"} <= set(dict(report.whole))
    assert "0/mu/codes/thin" not in dict(report.whole)
    assert f"(largest: {scales}, " in str(report)


# The same steps

LAYOUTS = {
    "zero1": ("line", P()),
    "fsdp": ("grid", P("data")),
    "tensor": ("grid", P(None, "model")),
    "both": ("grid", P("data", "model")),
}
STORAGES = ("float32", "bfloat16", "int8")
SHAPES = {"small": (16, 256), "tiled": (136, 1024), "cut": (33, 768)}
OPTIMIZERS = ("adamw", "amsgrad", "stable_adamw", "lamb", "ademamix")


def arrays(seed, layout):
    rng = np.random.default_rng(seed)
    return {
        storage: {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in SHAPES.items()
            if (storage == "int8" or name == "small") and (name != "cut" or layout == "zero1")
        }
        for storage in STORAGES
    }


def make(name):
    return getattr(adam_jax, name)(
        1e-3, weight_decay=0.1, storage=lambda path, leaf: path.split("/")[0]
    )


def trained(tx, params, grads, steps=20):
    """Return parameters and state after some steps, and the program."""
    state = tx.init(params)
    compiled = jax.jit(step_of(tx)).lower(params, state, grads[0]).compile(QUICKLY)
    for t in range(steps):
        params, state = compiled(params, state, grads[t % 3])
    return params, state, compiled.as_text()


@functools.cache
def on_one_device(name, layout):
    start, *grads = (arrays(seed, layout) for seed in range(4))
    return jax.device_get(trained(make(name), start, grads)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_sharded_steps_equal_those_on_one_device(name, layout):
    mesh_name, spec = LAYOUTS[layout]
    mesh = make_mesh(mesh_name)
    tx = adam_jax.zero1(make(name), mesh) if layout == "zero1" else make(name)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
    start, *grads = (put(arrays(seed, layout)) for seed in range(4))
    params, state, _ = trained(tx, start, grads)
    expected = on_one_device(name, layout)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected[0]), strict=True):
        assert ours.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        assert np.max(np.abs(np.asarray(ours) - theirs)) <= 1e-6 * np.max(np.abs(theirs))
        copies = [shard for shard in ours.addressable_shards if shard.index == (slice(None),) * 2]
        for copy in copies:
            np.testing.assert_array_equal(copy.data, copies[0].data)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected[1]), strict=True):
        if ours.dtype in (jnp.int8, jnp.uint8):  # an operand of the rounding may differ by an ulp
            assert np.mean(np.asarray(ours) != theirs) <= 1e-3


@pytest.mark.parametrize("outside", ["alone", "MultiSteps", slowly("apply_if_finite")])
def test_zero1_composes_with_optax(outside):
    mesh = make_mesh()
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-2, weight_decay=0.1))
    around = {
        "alone": lambda tx: tx,
        "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
        "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    }[outside]
    start, *grads = ({"w": arrays(seed, "fsdp")["float32"]["small"]} for seed in range(4))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))

    def run(tx, params, grads):
        step, state = jax.jit(step_of(tx)), tx.init(params)
        for t in range(4):
            params, state = step(params, state, grads[t % 3])
        return params, state

    expected, _ = run(around(inner), start, grads)
    tx = around(adam_jax.zero1(inner, mesh))
    params, state = run(tx, put(start), list(map(put, grads)))
    np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-6, atol=1e-7)
    mu = optax.tree_utils.tree_get(state, "mu")["w"]
    assert mu.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


# Collectives

CANONICAL = masters(
    adam_jax.chain(
        adam_jax.clip_by_global_norm(1.0),
        adam_jax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 50),
            weight_decay=0.1,
            weight_decay_mask=adam_jax.not_matching("bias"),
            storage="int8",
        ),
    )
)


def network(mesh, explicit):
    """Return bfloat16 parameters, a batch sharded over the devices, and a loss."""
    rng = np.random.default_rng(0)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shapes = {"in": {"kernel": (512, 1024), "bias": (1024,)}, "out": {"kernel": (1024, 3)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(0.1 * rng.normal(size=shape), jnp.bfloat16),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    x = jnp.asarray(rng.normal(size=(64, 512)), jnp.float32)
    product = functools.partial(jnp.einsum, "bi,ij->bj", out_sharding=P("data", None))
    product = product if explicit else jnp.matmul

    def loss(params, x):
        kernel, bias, out = (
            p.astype(jnp.float32)
            for p in (params["in"]["kernel"], params["in"]["bias"], params["out"]["kernel"])
        )
        return jnp.mean((product(jnp.tanh(product(x, kernel) + bias[None]), out) - 1) ** 2)

    return jax.device_put(params, whole), jax.device_put(x, rows), loss


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("applied", [False, True], ids=["update", "apply"])
def test_zero1_gathers_parameters_or_updates_but_no_state(axis_type, applied):
    """Train the canonical stack: clipping by the global norm, masters, int8, a schedule."""
    mesh = make_mesh(kind=axis_type)
    tx = adam_jax.zero1(CANONICAL, mesh)

    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        if applied:
            return adam_jax.apply(tx, grads, state, params)
        return step_of(tx)(params, state, grads)

    with jax.set_mesh(mesh):
        params, x, loss = network(mesh, axis_type == AxisType.Explicit)
        state = tx.init(params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
        collectives = sent(compiled.as_text())
        first = loss(params, x)
        for _ in range(20):
            params, state = compiled(params, state, x)
        last = loss(params, x)
    assert last < 0.1 * first
    gathered = [c for c in collectives if c[0] in ("all-gather", "all-to-all")]
    # XLA:CPU gathers bfloat16 as float32; the 1024 × 3 kernel and the bias are sharded, too
    assert sorted(n for *_, n in gathered) == [1024, 3 * 1024, 512 * 1024]
    assert {dtype for _, dtype, _ in gathered} <= {"bf16", "f32"}
    assert not [c for c in collectives if c[1] in ("s8", "u8", "s16")]
    for p in jax.tree.leaves(params):
        for shard in p.addressable_shards:
            np.testing.assert_array_equal(shard.data, p.addressable_shards[0].data)


@explicit_slowly
@pytest.mark.parametrize("tx", [CANONICAL, optax.adamw(1e-2)], ids=["canonical", "optax.adamw"])
def test_the_optimizer_gathers_no_sharded_parameters(axis_type, tx):
    mesh = make_mesh("grid", axis_type)
    with jax.set_mesh(mesh):
        p = jax.device_put(
            {"w": jnp.ones((512, 1024), jnp.bfloat16)}, NamedSharding(mesh, P("data", "model"))
        )
        state = tx.init(p)
        program = jax.jit(tx.update).lower(p, state, p).compile().as_text()
    assert largest_sent(program) <= 8


# The sharding of a state


@explicit_slowly
def test_state_sharding_equals_the_sharding_of_init(axis_type):
    mesh = make_mesh("grid", axis_type)
    shapes = {"w": (64, 1024), "thin": (1000, 768), "bias": (1024,)}
    specs = {"w": P("data", "model"), "thin": P(None, ("data", "model")), "bias": P("model")}
    params = {
        k: jax.device_put(jnp.ones(s, jnp.bfloat16), NamedSharding(mesh, specs[k]))
        for k, s in shapes.items()
    }
    structs = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in params.items()}
    for tx in (CANONICAL, optax.adamw(1e-3), optax.MultiSteps(adam_jax.lion(1e-4), 2)):
        shardings = adam_jax.state_sharding(tx, params)
        assert shardings == adam_jax.state_sharding(tx, structs, specs, mesh)
        with jax.set_mesh(mesh):
            eager = tx.init(params)
        jitted = jax.jit(tx.init, out_shardings=shardings)(params)
        for x, y, sharding in zip(*map(jax.tree.leaves, (eager, jitted, shardings)), strict=True):
            for made in (x, y):
                whole = x.size == 1 and x.sharding.is_fully_replicated
                assert whole or made.sharding.is_equivalent_to(sharding, x.ndim)
    codes = adam_jax.state_sharding(CANONICAL, params).inner_state[1][0].mu
    assert codes.codes["thin"].spec == P(None, ("data", "model"))
    assert codes.scales["thin"].spec == P(None, None)  # 6 scales a row, on 8 devices
    assert codes.scales["w"].spec == P("data", "model")


@every_mode
def test_zero1_shards_an_axis_that_the_devices_divide(axis_type):
    mesh = make_mesh("grid", axis_type)
    shapes = {"rows": (8, 6), "columns": (6, 8), "neither": (6, 6), "scalar": (), "both": (8, 8)}
    specs = {**dict.fromkeys(shapes, P()), "both": P(None, "model")}
    params = {
        k: jax.device_put(jnp.ones(s), NamedSharding(mesh, specs[k])) for k, s in shapes.items()
    }
    tx = adam_jax.zero1(adam_jax.adamw(1e-3), mesh, specs=specs)
    with jax.set_mesh(mesh):
        eager, jitted = tx.init(params), jax.jit(tx.init)(params)
    wanted = {
        "rows": P("data"),
        "columns": P(None, "data"),
        "neither": P(),
        "scalar": P(),
        "both": P("data", "model"),
    }
    for name, spec in wanted.items():
        for state in (eager, jitted, adam_jax.state_sharding(tx, params)):
            x = state[0].mu[name]
            sharding = x if isinstance(x, NamedSharding) else x.sharding
            assert sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shapes[name])), name


@pytest.mark.slow
def test_the_state_can_be_kept_in_host_memory():
    """Follow the recipe: move the state to the devices for a step and back to the host."""
    mesh = make_mesh()
    tx = adam_jax.adamw(1e-2, storage="int8")
    start = normal((64, 1024))
    params = {"w": jax.device_put(start, NamedSharding(mesh, P("data")))}
    on_host = adam_jax.state_sharding(tx, params, memory_kind="pinned_host")
    on_device = adam_jax.state_sharding(tx, params)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, grads):
        params, state = step_of(tx)(params, jax.device_put(state, on_device), grads)
        return params, jax.device_put(state, on_host)

    state = jax.jit(tx.init, out_shardings=on_host)(params)
    expected = (params, tx.init(params))
    plain = jax.jit(step_of(tx))
    got = (params, state)
    for _ in range(3):
        got, expected = step(*got, params), plain(*expected, params)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(got[1])} == {"pinned_host"}
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(expected))


# Flax NNX, checkpoints


@explicit_slowly
def test_nnx_keeps_the_shardings_of_its_parameters(axis_type):
    mesh = make_mesh("grid", axis_type)
    by_columns = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    explicit = axis_type == AxisType.Explicit
    x = normal((8, 64))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            kernel = model.kernel[...]
            out = {"out_sharding": P(None, "model")} if explicit else {}
            return jnp.mean((jnp.einsum("bi,ij->bj", x, kernel, **out) - 1) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    with jax.set_mesh(mesh):
        model = nnx.Linear(64, 512, use_bias=False, kernel_init=by_columns, rngs=nnx.Rngs(0))
        specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
        tx = adam_jax.zero1(adam_jax.adamw(1e-2, storage="int8"), mesh, specs=specs)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert model.kernel[...].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)
    codes = jax.tree.leaves(optimizer.opt_state[0].nu.codes)[0]
    assert codes.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_checkpoint_of_eight_devices_resumes_on_fewer(tmp_path, devices):
    def setup(count):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))
        params = {"w": jnp.ones((64, 1024), jnp.bfloat16), "bias": jnp.ones(16, jnp.bfloat16)}
        params = jax.device_put(params, NamedSharding(mesh, P()))
        tx = adam_jax.zero1(CANONICAL, mesh)
        return jax.jit(step_of(tx)), tx, params

    def train(step, params, state, steps):
        for t in steps:
            grads = jax.tree.map(lambda p, t=t: jnp.sin(p.astype(jnp.float32) * (t + 2)), params)
            params, state = step(params, state, grads)
        return params, state

    step, tx, params = setup(8)
    half = train(step, params, tx.init(params), range(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", half)
        checkpointer.wait_until_finished()
        other, tx, params = setup(devices)
        shardings = adam_jax.state_sharding(tx, params)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            (params, jax.eval_shape(tx.init, params)),
            (jax.tree.map(lambda p: p.sharding, params), shardings),
        )
        read = checkpointer.restore(tmp_path / "checkpoint", like)
    assert len(read[1].rest["w"].sharding.device_set) == devices
    chex.assert_trees_all_equal(jax.device_get(read), jax.device_get(half))
    resumed, stayed = train(other, *read, range(3, 6)), train(step, *half, range(3, 6))
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(stayed), strict=True):
        assert np.mean(np.asarray(ours) != np.asarray(theirs)) <= 1e-3


# Wrong use


def test_sharding_errors_say_what_to_do():
    mesh, tx = make_mesh(), adam_jax.adamw(1e-3)
    with pytest.raises(ValueError, match=says("zero1", "axis", "mesh", "'data'", "'x'")):
        adam_jax.zero1(tx, mesh, axis="x")
    with pytest.raises(
        ValueError, match=says("state_sharding", "params", "NamedShardings", "specs")
    ):
        adam_jax.state_sharding(tx, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)})
    with pytest.raises(ValueError, match=says("chain", "zero1(master_weights(", "outermost")):
        adam_jax.chain(adam_jax.zero1(CANONICAL, mesh), optax.scale(0.5))
    assert repr(adam_jax.zero1(tx, mesh)).endswith("{'data': 8}, axis=data)")


# Eager init, and parameters that are not on the mesh


@every_mode
@pytest.mark.parametrize("storage", [slowly("bfloat16"), "int8"])
@pytest.mark.parametrize("wrap", ["zero1", slowly("master_weights"), slowly("fsdp")])
def test_an_eager_init_shards_the_state(axis_type, storage, wrap):
    """Call init outside of jit and of any mesh context, as in docs/devices.md."""
    mesh = make_mesh(kind=axis_type)
    tx = adam_jax.adamw(1e-3, storage=storage)
    dtype, spec = (jnp.float32, P("data")) if wrap == "fsdp" else (jnp.bfloat16, P())
    if wrap != "fsdp":
        tx = adam_jax.zero1(masters(tx) if wrap == "master_weights" else tx, mesh)
    params = jax.device_put({"w": jnp.ones((64, 128), dtype)}, NamedSharding(mesh, spec))
    state = tx.init(params)
    large = [x for x in jax.tree.leaves(state) if x.size >= 64]
    assert len(large) >= 2
    for x in large:
        assert x.sharding.shard_shape(x.shape)[0] == 8
    updates, after = jax.jit(tx.update, compiler_options=QUICKLY)(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    expected = adam_jax.adamw(1e-3, storage=storage)
    one = {"w": jnp.ones((64, 128), dtype)}
    if wrap != "master_weights":
        want, _ = expected.update(one, expected.init(one), one)
        chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(want), rtol=1e-5)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_parameters_off_an_explicit_mesh_are_an_error_under_jit(storage):
    mesh = make_mesh(kind=AxisType.Explicit)
    tx = adam_jax.zero1(adam_jax.adamw(1e-3, storage=storage), mesh)
    params = {"w": jnp.ones((64, 128))}
    state = tx.init(params)  # an eager init moves them to the mesh
    with pytest.raises(ValueError, match=says("zero1", "gradient", "'w'", "mesh")):
        jax.jit(tx.update)(params, state, params)
    with jax.set_mesh(mesh):
        jax.jit(tx.update, compiler_options=QUICKLY)(params, state, params)

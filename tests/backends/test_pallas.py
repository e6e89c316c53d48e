"""Kernels equal plain XLA if interpreted, and lower for GPUs and TPUs that aren't here."""

from __future__ import annotations

import functools
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from adam_jax._backends import choice, pallas
from helpers import (
    CALL,
    EVERY_RULE,
    QUICKLY,
    REFERENCES,
    defaults,
    largest_sent,
    needs_triton,
    normal,
    other_rules_slowly,
    slowly,
    typical_rules,
)

FORMATS = ("float32", "bfloat16", "int8", "compact")
every_rule = pytest.mark.parametrize("name", EVERY_RULE)

PLATFORMS = [pytest.param("cuda", marks=needs_triton), "tpu"]
every_platform = pytest.mark.parametrize("platform", PLATFORMS)
DEVICES = {
    "cuda": jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "tpu": jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu"),
}


def there(platform):
    """Return a context that traces and lowers for a platform that isn't here."""
    mesh = AbstractMesh((), (), abstract_device=DEVICES[platform])
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(platform, update, *operands):
    """Return the text of a program for a platform that isn't here."""
    with there(platform):
        step = jax.jit(update).trace(*operands)
        return step.lower(lowering_platforms=(platform,)).as_text()


def by_path(path, leaf):
    """Choose the format by the leaf's name, however small the leaf is."""
    return path.split("/")[0]


def make(name, implementation):
    rule = EVERY_RULE[name]
    given = defaults(name) if name in REFERENCES else dict.fromkeys(rule.hyperparams, 0.5)
    return adam_jax.scale_by_rule(rule, storage=by_path, implementation=implementation, **given)


def leaves(shape=(5, 300)):
    """Return a leaf for each format, whose rows and columns don't fill the tiles."""
    shapes = dict.fromkeys(FORMATS, shape) | {"compact": (24, *shape[1:])}  # worth factoring
    return {f: normal(shapes[f], seed=k) for k, f in enumerate(FORMATS)}


def trajectory(tx, params, update=None, steps=3):
    update = update or jax.jit(tx.update, compiler_options=QUICKLY)
    state, updates = tx.init(params), params
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.sin(p * (3.0 + t)), params)
        updates, state = update(grads, state, params)
    return updates, state


def assert_same(ours, expected, codes=0):
    """Check that floats differ by rounding, and integers by at most `codes`."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == jnp.bfloat16:
            a, b = (jax.lax.bitcast_convert_type(x, jnp.int16) for x in (a, b))
        if jnp.issubdtype(a.dtype, jnp.integer):
            assert np.max(np.abs(np.asarray(a, int) - np.asarray(b, int)), initial=0) <= codes
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@every_rule
def test_a_kernel_equals_xla_for_every_rule_and_format(name):
    ours, expected = (trajectory(make(name, i), leaves()) for i in ("pallas", "xla"))
    # a mean is summed in another order, so that its products may round to a neighbor
    assert_same(ours, expected, codes=0 if "mean" not in EVERY_RULE[name].inputs else 1)


@every_platform
@other_rules_slowly(EVERY_RULE)
def test_every_rule_lowers_to_a_kernel(name, platform):
    tx, params = make(name, "pallas"), {"int8": leaves()["int8"]}
    program = lowered(platform, tx.update, params, tx.init(params), params)
    assert program.count(CALL[platform]) == 1 + ("mean" in EVERY_RULE[name].inputs)


@every_platform
@typical_rules
def test_every_format_lowers_to_a_kernel(name, platform):
    tx, params = make(name, "pallas"), leaves()
    program = lowered(platform, tx.update, params, tx.init(params), params)
    passes = 1 + ("mean" in EVERY_RULE[name].inputs)
    assert program.count(CALL[platform]) == len(FORMATS) * passes


@every_platform
def test_a_rule_with_one_number_per_leaf_lowers_to_kernels(platform):
    tx = adam_jax.novograd(0.1, storage=lambda path, leaf: "int8", implementation="pallas")
    params = {"kernel": jnp.ones((3, 16, 256)), "bias": jnp.ones(300)}
    program = lowered(platform, tx.update, params, tx.init(params), params)
    assert program.count(CALL[platform]) == 2  # a bias takes none


@pytest.mark.parametrize("shape", [(4096, 1024), slowly((1335, 50257)), (3, 3, 64, 64)])
@every_platform
def test_a_kernel_copies_nothing_as_large_as_the_leaf(shape, platform):
    """Only the kernel uses arrays of that size, and it writes over its operands."""
    tx = adam_jax.adamw(1e-3, storage="int8", implementation="pallas")
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = lowered(platform, tx.update, p, jax.eval_shape(tx.init, p), p)
    lines = [line for line in program.splitlines() if largest(line) >= np.prod(shape)]
    operations = set(re.findall(r"stablehlo\.(\w+) ", "\n".join(lines)))
    assert {"custom_call"} <= operations <= {"custom_call", "reshape", "return"}
    (call,) = [line for line in lines if f"@{CALL[platform]}" in line]
    assert call.count("output_operand_alias<") == 5  # the direction, two moments and their scales


def largest(line):
    """Return the size of the largest array in a line of a program."""
    shapes = re.findall(r"tensor<([\dx]+)x\w+>", line)
    return max((np.prod([int(n) for n in shape.split("x")]) for shape in shapes), default=0)


# Shapes


SHAPES = [(1,), (129,), (33, 96), (700, 3), (500, 300), (2, 16_500), (3, 3, 64, 64)]


@pytest.fixture(params=["triton", "mosaic"])
def interpreted(request, monkeypatch):
    """Interpret kernels with the tiles and masks of this compiler."""
    target = getattr(pallas, request.param)()
    target = target._replace(compiler=lambda _: None, rewritings={}, interpret=True)
    monkeypatch.setattr(pallas, "TARGETS", {"cpu": lambda: target})
    monkeypatch.setitem(
        choice.BACKENDS, "pallas", functools.partial(pallas.execute_leaf)
    )  # traced anew


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name, shapes", [("adabelief", SHAPES), ("stable_adamw", SHAPES[3:5])])
def test_a_kernel_equals_xla_for_every_shape(name, shapes):
    """Elements outside of the leaf must not count; AdaBelief's moment of them is not 0."""
    params = {"int8": [normal(shape) for shape in shapes]}
    ours, expected = (trajectory(make(name, i), params, steps=2) for i in ("pallas", "xla"))
    assert_same(ours, expected)


def test_leaves_that_kernels_do_not_support_equal_xla():
    """Step leaves without an axis, without an element, and of wider dtypes."""
    with jax.enable_x64(True):
        params = {
            "float32": {"scalar": jnp.float32(0.5), "empty": jnp.zeros((0, 3), jnp.float32)},
            "float64": jnp.linspace(-1, 1, 7),
            "complex64": jnp.linspace(-1, 1, 7).astype(jnp.complex64) * jnp.complex64(1 + 2j),
        }
        ours, expected = (trajectory(make("adam", i), params) for i in ("pallas", "xla"))
        chex.assert_trees_all_close(ours, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_kernel_equals_xla_for_bfloat16_and_float16():
    x = leaves()
    params = {"int8": {"float16": x["int8"].astype(jnp.float16)}}
    params["bfloat16"] = x["bfloat16"].astype(jnp.bfloat16)
    txs = [adam_jax.adamw(1e-3, storage=by_path, implementation=i) for i in ("pallas", "xla")]
    assert_same(*(trajectory(tx, params) for tx in txs), codes=1)


NARROW = {
    "plain": lambda tx: tx,
    "master_weights": functools.partial(adam_jax.master_weights, bits=24),
    "stochastic_rounding": adam_jax.stochastic_rounding,
}


@pytest.mark.parametrize(
    "wrapper",
    [
        pytest.param(name, marks=() if name == "master_weights" else pytest.mark.slow)
        for name in NARROW
    ],
)
def test_apply_steps_the_parameters_in_one_kernel(wrapper):
    """The kernel of `apply` writes over the parameter and its residual."""
    params = {"int8": leaves()["int8"].astype(jnp.bfloat16)}

    def make(implementation):
        tx = adam_jax.adamw(1e-3, storage=by_path, implementation=implementation)
        return NARROW[wrapper](tx)

    def steps(tx):
        return jax.jit(functools.partial(adam_jax.apply, tx), compiler_options=QUICKLY)

    kernel, xla = make("pallas"), make("xla")
    assert_same(*(trajectory(tx, params, steps(tx)) for tx in (kernel, xla)), codes=1)
    state = kernel.init(params)
    for platform, call in CALL.items():
        if platform == "cuda" and not choice.has_triton():
            continue
        step = functools.partial(adam_jax.apply, kernel)
        program = lowered(platform, step, params, state, params)
        assert program.count(call) == 1


# Transformations


def test_a_kernel_under_vmap_equals_xla():
    members = normal((2, 5, 300))
    rates = jnp.array([1e-3, 2e-3])

    def run(transform, implementation, rates, p):
        def make(rate):
            return adam_jax.adamw(rate, storage=lambda *_: "int8", implementation=implementation)

        def update(rate, g, state, p):
            return make(rate).update(g, state, p)

        step = jax.jit(transform(update), compiler_options=QUICKLY)
        state = transform(make(1e-3).init)(p)
        for t in (3.0, 4.0):
            updates, state = step(rates, jnp.sin(p * t), state, p)
        return updates, state

    together = run(jax.vmap, "pallas", rates, members)
    for i in range(2):
        alone = run(lambda f: f, "xla", rates[i], members[i])
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone)


@every_platform
def test_a_kernel_under_vmap_lowers(platform):
    tx = adam_jax.stable_adamw(1e-3, storage=lambda *_: "int8", implementation="pallas")
    p = jnp.ones((2, 5, 300))
    assert CALL[platform] in lowered(platform, jax.vmap(tx.update), p, jax.vmap(tx.init)(p), p)


@pytest.mark.slow
def test_a_kernel_under_scan_equals_xla():
    layers = normal((3, 5, 300))

    def scanned(implementation):
        tx = adam_jax.adamw(1e-3, storage=lambda *_: "int8", implementation=implementation)

        def layer(_, ps):
            return None, tx.update(*ps, ps[0])

        state = jax.vmap(tx.init)(layers)
        step = jax.jit(lambda *ps: jax.lax.scan(layer, None, ps)[1], compiler_options=QUICKLY)
        return step(layers, state)

    assert_same(scanned("pallas"), scanned("xla"))


def test_a_kernel_takes_donated_gradients_and_state():
    tx = adam_jax.adamw(1e-3, storage=by_path, implementation="pallas")
    params = {"int8": leaves()["int8"]}
    kept, donated = (
        jax.jit(tx.update, donate_argnums=numbers, compiler_options=QUICKLY)
        for numbers in ((), (0, 1))
    )
    grads, state = jax.tree.map(jnp.sin, params), tx.init(params)
    expected = kept(grads, state, params)
    given = jax.tree.map(jnp.copy, (grads, state))
    got = donated(*given, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_kernel_takes_schedules_and_injected_hyperparams():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 5)

    def injected(learning_rate, b2, implementation):
        make = functools.partial(adam_jax.adamw, storage=by_path, implementation=implementation)
        return optax.inject_hyperparams(make, static_args=("storage", "implementation"))(
            learning_rate=learning_rate, b2=b2
        )

    params = {"int8": leaves()["int8"]}
    ours, expected = (trajectory(injected(schedule, 0.99, i), params) for i in ("pallas", "xla"))
    assert_same(ours, expected)


def test_a_gradient_through_a_kernel_is_an_error():
    tx = adam_jax.adam(1e-3, implementation="pallas")
    p = jnp.ones(3)
    with pytest.raises(TypeError, match="implementation='xla'"):
        jax.grad(lambda p: jnp.sum(tx.update(p, tx.init(p), p)[0]))(p)


# Sharded


@pytest.mark.eight_devices
@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "shape, spec",
    [
        ((16, 2048), P("data", "model")),
        ((8, 6, 256), P("data", None, "model")),
        ((8, 11008), P(None, ("data", "model"))),  # shards cut blocks
    ],
)
def test_kernels_step_a_sharded_leaf_shard_by_shard(shape, spec, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    whole = normal(shape)
    make = functools.partial(adam_jax.stable_adamw, 1e-3, storage="int8")
    expected = trajectory(make(implementation="xla"), whole, steps=1)
    tx = make(implementation="pallas")
    with jax.set_mesh(mesh):
        p = jax.device_put(whole, NamedSharding(mesh, spec))
        step = jax.jit(tx.update).lower(p, tx.init(p), p).compile(QUICKLY)
        got = trajectory(tx, p, step, steps=1)
    assert largest_sent(step.as_text()) <= expected[1][0].mu.scales.size
    assert_same(jax.device_get(got), jax.device_get(expected))
    assert got[0].sharding.is_equivalent_to(p.sharding, p.ndim)
    assert got[1][0].mu.codes.sharding.is_equivalent_to(p.sharding, p.ndim)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "kind", [slowly(AxisType.Auto), AxisType.Explicit], ids=["auto", "explicit"]
)
@pytest.mark.parametrize("storage", [slowly("int8"), "compact"])
def test_shards_that_cut_blocks_equal_one_device_on_an_accelerator(storage, kind, monkeypatch):
    """On accelerators, XLA steps these shards twice, with scales computed across devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    whole = {"w": jax.random.normal(jax.random.key(0), (2, 24, 768)).at[0, 5, 200].set(jnp.nan)}
    make = functools.partial(adam_jax.stable_adamw, 1e-3, storage=lambda *_: storage)
    expected = trajectory(make(implementation="xla"), whole)
    spec = P(None, None, "data")
    tx = make(implementation="pallas")
    if kind == AxisType.Auto:
        tx = adam_jax.zero1(tx, mesh, specs={"w": spec})
    with jax.set_mesh(mesh):
        p = jax.device_put(whole, NamedSharding(mesh, spec))
        state = tx.init(p)
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        step = jax.jit(tx.update).trace(p, state, p).lower(lowering_platforms=("cpu",))
        monkeypatch.undo()
        got = trajectory(tx, p, step.compile(QUICKLY))
    assert_same(jax.device_get(got), jax.device_get(expected))


@every_platform
def test_kernels_for_a_sharded_leaf_lower(platform):
    kinds = (AxisType.Explicit,) * 2
    mesh = AbstractMesh(
        (4, 2), ("data", "model"), axis_types=kinds, abstract_device=DEVICES[platform]
    )
    tx = adam_jax.stable_adamw(1e-3, storage="int8", implementation="pallas")
    with jax.sharding.use_abstract_mesh(mesh):
        laid_out = NamedSharding(mesh, P("data", None, "model"))
        p = jax.ShapeDtypeStruct((8, 6, 256), jnp.float32, sharding=laid_out)
        step = jax.jit(tx.update).trace(p, jax.eval_shape(tx.init, p), p)
        program = step.lower(lowering_platforms=(platform,)).as_text()
    assert CALL[platform] in program and "all_gather" not in program


# The choice of an implementation


def kernels(tx, params):
    return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params)).count("pallas_call[")


def on_the_host(tx, params):
    """Return the step, traced for a GPU and compiled for the CPU of its host."""
    with there("cuda"):
        step = jax.jit(tx.update).trace(params, tx.init(params), params)
    return step.lower(lowering_platforms=("cpu",)).compile(QUICKLY)


def test_auto_uses_no_kernel_on_cpu():
    assert kernels(adam_jax.adamw(1e-3, storage=by_path), leaves()) == 0


@every_platform
@pytest.mark.parametrize("name", FORMATS)
def test_auto_uses_a_kernel_for_lossy_state_and_on_tpu_for_bfloat16(name, platform):
    tx = adam_jax.adamw(1e-3, storage=by_path)
    with there(platform):
        is_kernel = name in ("int8", "compact") or (platform, name) == ("tpu", "bfloat16")
        assert (kernels(tx, {name: leaves()[name]}) > 0) == is_kernel


@needs_triton
def test_the_default_device_or_the_mesh_decides_about_kernels(monkeypatch):
    """Simulate a machine whose default backend is a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tx, params = adam_jax.adamw(1e-3, storage=by_path), {"int8": jnp.ones((7, 321))}
    assert kernels(tx, params) > 0
    for cpu in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(cpu):
            assert kernels(tx, params) == 0
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert kernels(tx, params) == 0


def test_auto_needs_no_triton_on_gpu(monkeypatch):
    """JAX 0.12 deprecates Pallas on Triton; without it, XLA steps quantized state."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(jax.experimental.pallas, "triton", raising=False)
    choice.has_triton.cache_clear()
    try:
        tx, params = adam_jax.adamw(1e-3, storage=by_path), {"int8": jnp.ones((7, 321))}
        with there("cuda"):
            assert kernels(tx, params) == 0
            forced = adam_jax.adamw(1e-3, storage=by_path, implementation="pallas")
            with pytest.raises(NotImplementedError, match="implementation='xla'"):
                kernels(forced, params)
    finally:
        choice.has_triton.cache_clear()


def test_auto_interprets_no_kernel_on_an_accelerators_host():
    params = {"int8": leaves()["int8"]}
    ours, streamed = (
        adam_jax.adamw(1e-3, storage=by_path, implementation=i) for i in ("auto", "stream")
    )
    got = trajectory(ours, params, on_the_host(ours, params))
    chex.assert_trees_all_equal(got, trajectory(streamed, params))


@adam_jax.rule(mu=adam_jax.signed)
def weighted(g, mu, *, b1=0.9):
    """Return a direction with an array that is a constant, which no kernel supports."""
    mu = adam_jax.ema(b1, mu, g * jnp.asarray(np.full((1, 1), 0.5, np.float32)))
    return mu, mu


@needs_triton
@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_a_rule_that_no_kernel_supports_is_an_error_with_the_fix(implementation):
    params = {"int8": [jnp.ones((5, 300)), jnp.ones((7, 300))]}
    tx = adam_jax.scale_by_rule(weighted, storage=by_path, implementation=implementation)
    with (
        there("cuda"),
        pytest.raises(NotImplementedError, match=r"\(5, 300\).*implementation='stream'"),
    ):
        kernels(tx, params)


def test_a_platform_without_kernels_warns_or_is_an_error():
    device = jax.sharding.AbstractDevice("any", num_cores=1, platform="METAL")
    params = {"int8": leaves()["int8"]}
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        with pytest.warns(RuntimeWarning, match="METAL.*implementation='stream'"):
            assert kernels(adam_jax.adamw(1e-3, storage=by_path), params) == 0
        with pytest.raises(NotImplementedError, match="implementation='stream'"):
            kernels(adam_jax.adamw(1e-3, storage=by_path, implementation="pallas"), params)

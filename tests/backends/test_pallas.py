"""Kernels: interpreted they give the step at once, and they lower for devices that are not here."""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from adam_jax._backends import choice, pallas
from adam_jax._backends.hoist import hoist
from adam_jax._engine.leaf import target_platform
from helpers import QUICKLY, REFERENCES, defaults, homemade, largest_sent

FORMATS = ("float32", "bfloat16", "int8")
EVERY_RULE = {**adam_jax.rules.RULES, "homemade": homemade}
every_rule = pytest.mark.parametrize("name", EVERY_RULE)

CALL = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
every_platform = pytest.mark.parametrize("platform", CALL)
DEVICES = {
    "cuda": jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "tpu": jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu"),
}


def there(platform):
    """A context that traces and lowers for a platform that isn't here."""
    mesh = AbstractMesh((), (), abstract_device=DEVICES[platform])
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(platform, update, *operands):
    """The text of a program for a platform that isn't here."""
    with there(platform):
        # Importing a compiler's part of Pallas adds to the key of JAX's caches: not while tracing,
        # because leaves after the import would be traced again, which tests of counts would see.
        pallas.TARGETS[target_platform()]()
        step = jax.jit(update).trace(*operands)
        return step.lower(lowering_platforms=(platform,)).as_text()


def by_path(path, leaf):
    """A leaf's name says what it is stored in, however small it is."""
    return path.split("/")[0]


def make(name, implementation):
    rule = EVERY_RULE[name]
    given = defaults(name) if name in REFERENCES else dict.fromkeys(rule.hyperparams, 0.5)
    return adam_jax.scale_by_rule(rule, storage=by_path, implementation=implementation, **given)


def leaves(shape=(5, 300)):
    """A leaf for each format; neither rows nor columns fill the tiles."""
    return {f: jax.random.normal(jax.random.key(k), shape) for k, f in enumerate(FORMATS)}


def trajectory(tx, params, update=None, steps=3):
    update = update or jax.jit(tx.update, compiler_options=QUICKLY)
    state, updates = tx.init(params), params
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.sin(p * (3.0 + t)), params)
        updates, state = update(grads, state, params)
    return updates, state


def assert_same(ours, expected, codes=0):
    """Directions and float32 moments to rounding; what was rounded to codes, so many codes off."""
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
def test_every_rule_in_every_format(name):
    ours, expected = (trajectory(make(name, i), leaves()) for i in ("pallas", "xla"))
    # a mean is summed in another order, and what it multiplies may be rounded to a neighbour
    assert_same(ours, expected, codes=0 if "mean" not in EVERY_RULE[name].inputs else 1)


@every_platform
@every_rule
def test_every_rule_lowers(name, platform):
    tx, params = make(name, "pallas"), leaves()
    program = lowered(platform, tx.update, params, tx.init(params), params)
    formats = len(FORMATS) if EVERY_RULE[name].moments else 1  # without moments all are the same
    passes = 1 + ("mean" in EVERY_RULE[name].inputs)
    assert program.count(CALL[platform]) == formats * passes


@pytest.mark.parametrize("shape", [(4096, 1024), (1335, 50257), (3, 3, 64, 64)])
@every_platform
def test_nothing_of_a_leafs_size_is_copied(shape, platform):
    """The kernel, which writes over its operands, is all that touches such an array."""
    tx = adam_jax.adamw(1e-3, storage="int8", implementation="pallas")
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = lowered(platform, tx.update, p, jax.eval_shape(tx.init, p), p)
    lines = [line for line in program.splitlines() if largest(line) >= np.prod(shape)]
    operations = set(re.findall(r"stablehlo\.(\w+) ", "\n".join(lines)))
    assert {"custom_call"} <= operations <= {"custom_call", "reshape", "return"}
    (call,) = [line for line in lines if f"@{CALL[platform]}" in line]
    assert call.count("output_operand_alias<") == 5  # the direction, two moments and their scales


def largest(line):
    """The elements of the largest array in a line of a program."""
    shapes = re.findall(r"tensor<([\dx]+)x\w+>", line)
    return max((np.prod([int(n) for n in shape.split("x")]) for shape in shapes), default=0)


# Shapes


SHAPES = [(1,), (129,), (33, 96), (700, 3), (500, 300), (2, 16_500), (3, 3, 64, 64)]


@pytest.fixture(params=["triton", "mosaic"])
def interpreted(request, monkeypatch):
    """An implementation that interprets a kernel with the tiles and masks of this compiler."""
    target = getattr(pallas, request.param)()
    target = target._replace(compiler=None, drop=(), interpret=True)
    monkeypatch.setattr(pallas, "TARGETS", {"cpu": lambda: target})
    monkeypatch.setitem(
        choice.BACKENDS, "pallas", functools.partial(pallas.execute_leaf)
    )  # traced anew


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name, shapes", [("adabelief", SHAPES), ("stable_adamw", SHAPES[3:5])])
def test_every_shape(name, shapes):
    """adabelief's moment of what is outside of the leaf is not 0, and must not count."""
    params = {"int8": [jax.random.normal(jax.random.key(0), shape) for shape in shapes]}
    ours, expected = (trajectory(make(name, i), params, steps=2) for i in ("pallas", "xla"))
    assert_same(ours, expected)


def test_leaves_without_a_kernel():
    """No axis, no element, wider arithmetic."""
    with jax.enable_x64(True):
        params = {
            "float32": {"scalar": jnp.float32(0.5), "empty": jnp.zeros((0, 3), jnp.float32)},
            "float64": jnp.linspace(-1, 1, 7),
            "complex64": jnp.linspace(-1, 1, 7).astype(jnp.complex64) * jnp.complex64(1 + 2j),
        }
        ours, expected = (trajectory(make("adam", i), params) for i in ("pallas", "xla"))
        chex.assert_trees_all_close(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_and_gradients(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), leaves())
    txs = [adam_jax.adamw(1e-3, storage=by_path, implementation=i) for i in ("pallas", "xla")]
    chex.assert_trees_all_equal(*(trajectory(tx, params) for tx in txs))


NARROW = {
    "plain": lambda tx: tx,
    "master_weights": functools.partial(adam_jax.master_weights, bits=24),
    "stochastic_rounding": adam_jax.stochastic_rounding,
}


@pytest.mark.parametrize("wrapper", NARROW)
def test_parameters_are_stepped_in_place(wrapper):
    """`apply`: the kernel writes over the parameter and what is kept of its bits."""
    params = {"int8": leaves()["int8"].astype(jnp.bfloat16)}

    def make(implementation):
        tx = adam_jax.adamw(1e-3, storage=by_path, implementation=implementation)
        return NARROW[wrapper](tx)

    def steps(tx):
        return jax.jit(functools.partial(adam_jax.apply, tx), compiler_options=QUICKLY)

    kernel, xla = make("pallas"), make("xla")
    chex.assert_trees_all_equal(*(trajectory(tx, params, steps(tx)) for tx in (kernel, xla)))
    state = kernel.init(params)
    for platform, call in CALL.items():
        step = functools.partial(adam_jax.apply, kernel)
        program = lowered(platform, step, params, state, params)
        assert program.count(call) == 1


# Transformations


def test_a_population_is_its_members():
    members = jax.random.normal(jax.random.key(0), (2, 5, 300))
    rates = jnp.array([1e-3, 2e-3])

    def step(rate, p, implementation="pallas"):
        tx = adam_jax.adamw(rate, storage=lambda *_: "int8", implementation=implementation)
        return trajectory(tx, p, tx.update, steps=2)

    together = jax.jit(jax.vmap(step), compiler_options=QUICKLY)(rates, members)
    for i in range(2):
        alone = jax.jit(functools.partial(step, implementation="xla"), compiler_options=QUICKLY)
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone(rates[i], members[i]))


@every_platform
def test_a_population_lowers(platform):
    tx = adam_jax.stable_adamw(1e-3, storage=lambda *_: "int8", implementation="pallas")
    p = jnp.ones((2, 5, 300))
    assert CALL[platform] in lowered(platform, jax.vmap(tx.update), p, jax.vmap(tx.init)(p), p)


def test_layers_stacked_under_scan():
    layers = jax.random.normal(jax.random.key(0), (3, 5, 300))

    def scanned(implementation):
        tx = adam_jax.adamw(1e-3, storage=lambda *_: "int8", implementation=implementation)

        def layer(_, ps):
            return None, tx.update(*ps, ps[0])

        state = jax.vmap(tx.init)(layers)
        step = jax.jit(lambda *ps: jax.lax.scan(layer, None, ps)[1], compiler_options=QUICKLY)
        return step(layers, state)

    assert_same(scanned("pallas"), scanned("xla"))


def test_gradient_and_state_are_donated():
    tx, params = adam_jax.adamw(1e-3, storage=by_path, implementation="pallas"), leaves()
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


@pytest.mark.standard_promotion
def test_schedules_and_injected_hyperparams():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 5)

    def adamw(learning_rate, b2, implementation):
        return adam_jax.adamw(
            learning_rate, b2=b2, storage=lambda *_: "int8", implementation=implementation
        )

    def injected(learning_rate, b2, implementation):
        make = functools.partial(adamw, implementation=implementation)
        return optax.inject_hyperparams(make)(learning_rate=learning_rate, b2=b2)

    params = jax.random.normal(jax.random.key(0), (5, 300))
    for build in (adamw, injected):
        ours, expected = (trajectory(build(schedule, 0.99, i), params) for i in ("pallas", "xla"))
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
def test_a_sharded_leaf_is_stepped_shard_by_shard(shape, spec, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    whole = jax.random.normal(jax.random.key(0), shape)
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


@every_platform
def test_a_sharded_leaf_lowers(platform):
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


@pytest.fixture
def on_gpu(monkeypatch):
    """Traces for a GPU; what is traced can be lowered for the CPU of its host, too."""
    traced_anew = functools.partial(choice.choose)
    monkeypatch.setitem(choice.BACKENDS, "auto", traced_anew)
    with there("cuda"):
        yield


def kernels(tx, params):
    return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params)).count("pallas_call[")


def on_the_host(tx, params):
    """The step traced for a GPU, and compiled for the CPU of its host."""
    with there("cuda"):
        step = jax.jit(tx.update).trace(params, tx.init(params), params)
    return step.lower(lowering_platforms=("cpu",)).compile(QUICKLY)


def test_auto_on_cpu():
    assert kernels(adam_jax.adamw(1e-3, storage=by_path), leaves()) == 0


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", FORMATS)
def test_auto_takes_a_kernel_for_coded_state(name):
    tx = adam_jax.adamw(1e-3, storage=by_path)
    assert (kernels(tx, {name: leaves()[name]}) > 0) == (name == "int8")


def test_auto_interprets_no_kernel_on_an_accelerators_host():
    params = {"int8": leaves()["int8"]}
    ours, streamed = (
        adam_jax.adamw(1e-3, storage=by_path, implementation=i) for i in ("auto", "stream")
    )
    got = trajectory(ours, params, on_the_host(ours, params))
    chex.assert_trees_all_equal(got, trajectory(streamed, params))


@adam_jax.rule(mu=adam_jax.signed)
def weighted(g, mu, *, b1=0.9):
    """A rule that no kernel can run: it holds an array."""
    mu = adam_jax.ema(b1, mu, g * jnp.asarray(np.full((1, 1), 0.5, np.float32)))
    return mu, mu


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_a_rule_that_no_kernel_can_run_names_the_leaf_and_the_way_out(implementation):
    params = {"int8": [jnp.ones((5, 300)), jnp.ones((7, 300))]}
    tx = adam_jax.scale_by_rule(weighted, storage=by_path, implementation=implementation)
    with pytest.raises(NotImplementedError, match=r"\(5, 300\).*implementation='stream'"):
        kernels(tx, params)


def test_auto_on_a_platform_without_kernels():
    choice._warn_once.cache_clear()
    device = jax.sharding.AbstractDevice("any", num_cores=1, platform="METAL")
    params = {"int8": leaves()["int8"]}
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        with pytest.warns(RuntimeWarning, match="METAL.*implementation='stream'"):
            assert kernels(adam_jax.adamw(1e-3, storage=by_path), params) == 0
        with pytest.raises(NotImplementedError, match="implementation='stream'"):
            kernels(adam_jax.adamw(1e-3, storage=by_path, implementation="pallas"), params)


def test_what_depends_on_scalars_is_computed_in_front():
    def f(s, x):
        return (x + jnp.broadcast_to(jnp.expm1(s[0]), x.shape)) * jnp.sum(jnp.sin(s * 2))

    s, x = jnp.array([0.5, 1.0]), jnp.arange(6.0).reshape(2, 3)
    front, rest = hoist(jax.make_jaxpr(f)(s, x), 1, ())
    handed = front(s)
    assert [h.shape for h in handed] == [(), ()]
    np.testing.assert_allclose(rest(*handed, x)[0], f(s, x), rtol=1e-6)
    names = {eqn.primitive.name for eqn in jax.make_jaxpr(rest)(*handed, x).eqns}
    assert names <= {"add", "mul", "broadcast_in_dim"}

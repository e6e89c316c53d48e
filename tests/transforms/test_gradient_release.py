"""Steps inside the backward pass: equal to the usual step, with the gradient of one layer."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
import layered
from adam_jax import diagnostics
from helpers import QUICKLY, every_mode, leaves_of, nbytes, normal, says, sent, slowly
from layered import MODEL, Plain, difference, trained

pytestmark = pytest.mark.standard_promotion  # Optax's schedules

release = functools.partial(adam_jax.gradient_release, **MODEL)
COUNT = 3


# A model that compiles quickly: a residual network


def mlp(dtype=jnp.float32, width=4):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(np.asarray(rng.normal(size=shape) / 2, dtype))

    return {
        "outer": {"in": draw(2, width), "out": draw(width)},
        "layers": {"kernel": draw(COUNT, width, width), "bias": draw(COUNT, width)},
    }


def first(outer, x):
    return x @ outer["in"]


def layer(p, h):
    return h + jnp.tanh(h @ p["kernel"] + p["bias"][None])


def last(outer, h, x):
    return jnp.mean((h @ outer["out"]).astype(jnp.float32) ** 2)


def with_layout(mesh, function):
    """Return the function of replicated parameters, with its result sharded along the batch."""
    explicit = AxisType.Explicit in mesh.axis_types
    put = jax.reshard if explicit else jax.lax.with_sharding_constraint

    @functools.wraps(function)
    def wrapped(p, *operands):
        h = function(jax.tree.map(lambda x: put(x, NamedSharding(mesh, P())), p), *operands)
        return put(h, NamedSharding(mesh, P("data"))) if h.ndim else h

    return wrapped


def loss(params, x):
    h = first(params["outer"], x)
    for k in range(COUNT):
        h = layer(jax.tree.map(lambda p, k=k: p[k], params["layers"]), h)
    return last(params["outer"], h, x)


small = functools.partial(adam_jax.gradient_release, first=first, layer=layer, last=last)


def inputs(steps=3, size=4, dtype=jnp.float32):
    return normal((steps, size, 2), seed=1, dtype=dtype)


class Usual:
    """The usual step, with one state for the whole tree."""

    def __init__(self, tx, loss=loss):
        self.tx, self.init, self.loss = tx, tx.init, loss

    def __call__(self, params, state, x):
        value, gradient = jax.value_and_grad(self.loss)(params, x)
        updates, state = self.tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value


# Equal to the usual step

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "lamb"])
def test_fifty_steps_of_a_transformer_equal_usual_steps_in_float64(name):
    tx = getattr(adam_jax, name)(SCHEDULE, weight_decay=0.1)
    with jax.enable_x64(True):
        params, tokens = layered.transformer(dtype=jnp.float64), layered.batches(50)
        usual, _, losses = trained(Plain(tx), params, tokens)
        new, _, values = trained(release(tx), params, tokens)
    assert difference(new, usual) < 1e-12
    assert difference(values, losses) < 1e-12
    assert float(losses[-1]) < float(losses[0]) - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "lamb"])
def test_in_float32_released_and_usual_steps_differ_by_a_few_roundings(name):
    """Allow 8 roundings in 50 steps; on CPU, rematerialization alone changes no bit."""
    tx = getattr(adam_jax, name)(SCHEDULE, weight_decay=0.1)
    params, tokens = layered.transformer(), layered.batches(50)
    usual, checkpointed = (
        trained(Plain(tx, checkpoint=c), params, tokens)[0] for c in (False, True)
    )
    new = trained(release(tx), params, tokens)[0]
    rounding = 8 * float(jnp.finfo(jnp.float32).eps)
    assert difference(new, usual) <= max(2 * difference(checkpointed, usual), rounding)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [optax.clip_by_global_norm, adam_jax.clip_by_global_norm])
def test_two_passes_clip_by_the_global_norm(clip):
    tx = adam_jax.adamw(SCHEDULE, weight_decay=0.1)
    step = release(adam_jax.chain(clip(0.5), tx), two_pass=True)
    with jax.enable_x64(True):
        params, tokens = layered.transformer(dtype=jnp.float64), layered.batches(50)
        usual = trained(Plain(tx, clip(0.5)), params, tokens)[0]
        assert difference(trained(step, params, tokens)[0], usual) < 1e-12


def test_the_norms_of_the_gradient_are_in_the_state():
    params, xs = mlp(), inputs(1)
    _, state, _ = trained(small(optax.sgd(1e-3)), params, xs)
    gradient = jax.jit(jax.grad(loss))(params, xs[0])
    chex.assert_trees_all_close(state.gradient_norm, optax.tree.norm(gradient), rtol=1e-6)
    norms = jax.jit(jax.vmap(optax.tree.norm))(gradient["layers"])
    chex.assert_trees_all_close(state.layer_gradient_norms, norms, rtol=1e-6)


# Storage


def by_matrix(storage):
    return lambda path, leaf: storage if leaf.ndim == 2 else "float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    "storage, bound",
    [("bfloat16", 0.02), ("int8", 0.1), ("compact", 2.0)],
)
def test_lossy_state_is_close_to_float32(storage, bound):
    params, xs = mlp(width=8), inputs(3)
    _, state, _ = trained(small(adam_jax.adamw(1e-3, storage=by_matrix(storage))), params, xs)
    _, exact, _ = trained(small(adam_jax.adamw(1e-3)), params, xs)
    assert max(row.error for row in diagnostics.storage_error(state, exact)) < bound


def test_formats_depend_on_the_size_of_one_layer():
    """Check a stack of biases, which looks like a matrix, and matrices that are just too small."""
    shapes = {"kernel": (4, 64, 64), "bias": (4, 2048), "matrix": (4, 63, 64)}
    params = {"outer": {"w": jnp.ones(2)}, "layers": {k: jnp.ones(s) for k, s in shapes.items()}}
    mu, nu = small(adam_jax.adamw(1e-3, storage="compact")).init(params).inner_state[0][1:]
    assert {k: x.dtype.name for k, x in mu.codes["layers"].items()} == {
        "kernel": "int8",
        "bias": "float32",
        "matrix": "float32",
    }
    assert nu.rows["layers"]["kernel"].shape == (4, 64, 1)
    assert nu.rows["layers"]["bias"].shape == (4, 2048)


@pytest.mark.slow
def test_a_layer_steps_in_lossy_state_as_it_does_alone():
    """Step layer 0, whose random bits are the bits of its path."""
    tx = adam_jax.adamw(1e-3, storage=by_matrix("int8"))
    params, xs = mlp(), inputs(1)
    _, state, _ = trained(small(tx), params, xs)
    one = {**params, "layers": jax.tree.map(lambda p: p[0], params["layers"])}
    gradient = jax.grad(loss)(params, xs[0])
    gradient["layers"] = jax.tree.map(lambda g: g[0], gradient["layers"])
    _, alone = tx.update(gradient, tx.init(one), one)
    stacked, wanted = (adam_jax.moments(s)["mu"]["layers"] for s in (state, alone))
    chex.assert_trees_all_close(jax.tree.map(lambda m: m[0], stacked), wanted, rtol=1e-5)


def test_each_layer_has_its_own_random_bits():
    def linear(p, h):
        return h + p["w"][None]

    params = {"outer": {"w": jnp.ones(512)}, "layers": {"w": jnp.ones((3, 512), jnp.bfloat16)}}
    step = adam_jax.gradient_release(
        adam_jax.stochastic_rounding(optax.sgd(1e-3)),
        first=lambda outer, x: x,
        layer=linear,
        last=lambda outer, h, x: jnp.sum((h * outer["w"][None].astype(h.dtype)).astype("float32")),
    )
    new, *_ = trained(step, params, jnp.ones((1, 1, 512), jnp.bfloat16))
    w = np.asarray(new["layers"]["w"], np.float32)
    assert abs(w.mean() - 0.999) < 3e-4  # each layer has the same gradient, 1
    assert all(np.mean(w[i] != w[j]) > 0.3 for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.slow
def test_masters_keep_steps_that_bfloat16_parameters_would_lose():
    params, xs = mlp(jnp.bfloat16), inputs(3, dtype=jnp.bfloat16)
    start, exact = jax.tree.map(lambda x: x.astype(jnp.float32), (params, xs))
    step = small(adam_jax.master_weights(optax.sgd(1e-5), bits=32))
    masters = adam_jax.get_master_weights(*trained(step, params, xs)[:2])
    wanted, *_ = trained(Usual(optax.sgd(1e-5)), start, exact)
    moved, by = (jax.tree.map(np.subtract, new, start) for new in (masters, wanted))
    assert difference(moved, by) < 0.05


# Around and inside the optimizer


@pytest.mark.slow
def test_groups_find_layers_and_outer_parameters_by_path():
    tx = adam_jax.groups(
        adam_jax.adamw,
        {"^layers/bias": {"weight_decay": 0.0}, "^outer/in": "frozen"},
        learning_rate=1e-2,
        weight_decay=0.5,
    )
    params, xs = mlp(), inputs(3)
    new, _, _ = trained(small(tx), params, xs)
    usual, *_ = trained(Usual(tx), params, xs)
    chex.assert_trees_all_close(new, usual, rtol=1e-5)
    chex.assert_trees_all_equal(new["outer"]["in"], params["outer"]["in"])


def test_hyperparameters_are_tunable_and_steps_are_counted_once():
    tx, params = adam_jax.tunable(adam_jax.adamw)(SCHEDULE), mlp()
    step = jax.jit(small(tx))
    state = small(tx).init(params)
    for x in inputs(3):
        params, state, _ = step(params, state, x)
    assert adam_jax.step_count(state) == 3
    rate = adam_jax.get_hyperparams(state)["learning_rate"]
    chex.assert_trees_all_close(rate, SCHEDULE(2).astype(jnp.float32))
    still, state, _ = step(params, adam_jax.set_hyperparams(state, learning_rate=0.0), inputs()[0])
    chex.assert_trees_all_equal(still, params)


@pytest.mark.slow
@pytest.mark.parametrize("two_pass", [False, True])
def test_recorded_measurements_are_of_all_parameters(two_pass):
    clip = adam_jax.clip_by_global_norm(0.1) if two_pass else optax.identity()
    groups = {"kernels": "kernel", "all": ""}
    tx = diagnostics.record(adam_jax.chain(clip, adam_jax.adamw(1e-3)), groups, every=2)
    params, xs = mlp(), inputs(3)
    _, state, _ = trained(small(tx, two_pass=two_pass), params, xs)
    _, usual, _ = trained(Usual(tx), params, xs)
    chex.assert_trees_all_close(diagnostics.read(state), diagnostics.read(usual), rtol=1e-5)


def test_two_passes_skip_a_step_whose_gradient_is_not_finite():
    """Check a gradient that is NaN in one outer parameter alone."""

    def root(outer, x):
        return jnp.sqrt(jnp.abs(outer["out"][0] * x[0, 0]))  # without a derivative at 0

    tx = optax.apply_if_finite(adam_jax.adamw(1e-2), 5)
    params, xs = mlp(), inputs(3).at[1, 0, 0].set(0.0)
    step = small(tx, two_pass=True, last=lambda outer, h, x: last(outer, h, x) + root(outer, x))
    new, state, _ = trained(step, params, xs)
    usual = Usual(tx, lambda params, x: loss(params, x) + root(params["outer"], x))
    wanted, plain, _ = trained(usual, params, xs)
    chex.assert_trees_all_close(new, wanted, rtol=1e-5)
    assert state.inner_state.total_notfinite == plain.total_notfinite == 1
    assert adam_jax.step_count(state) == 2


def test_clip_to_previous_norm_clips_by_the_norm_of_the_previous_step():
    """Check that the first step uses its own norm, and that NaN isn't stored."""
    tx = adam_jax.chain(adam_jax.clip_to_previous_norm(0.1), optax.sgd(0.1))
    params, xs = mlp(), inputs(3)
    norm, expected, gradient_of = None, params, jax.jit(jax.grad(loss))
    for x in xs:
        gradient = gradient_of(expected, x)
        own = optax.tree.norm(gradient)
        scale = jnp.minimum(1, 0.1 / (own if norm is None else norm))
        expected = jax.tree.map(lambda p, g, s=scale: p - 0.1 * s * g, expected, gradient)
        norm = own
    step = jax.jit(small(tx))
    new, state = params, small(tx).init(params)
    for x in xs:
        new, state, _ = step(new, state, x)
    chex.assert_trees_all_close(new, expected, rtol=1e-5)
    chex.assert_trees_all_close(state.inner_state[0].norm, norm, rtol=1e-5)
    _, after, _ = step(new, state, xs[0] * jnp.nan)
    chex.assert_trees_all_equal(after.inner_state[0], state.inner_state[0])


# The model's functions


def test_microbatches_give_the_gradient_of_the_whole_batch():
    tx, params, xs = optax.sgd(1.0), mlp(), inputs(1, size=6)
    usual, *_ = trained(Usual(tx), params, xs)
    for k in (2, 3):
        new, *_ = trained(small(tx, microbatches=k), params, xs)
        chex.assert_trees_all_close(new, usual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("microbatches", [slowly(1), 2])
def test_auxiliary_losses_are_added_and_aux_is_returned(microbatches):
    def with_penalty(p, h):
        h = layer(p, h)
        return h, 0.1 * jnp.mean(h**2)

    def total(params, x):
        h, penalty = first(params["outer"], x), 0.0
        for k in range(COUNT):
            h, own = with_penalty(jax.tree.map(lambda p, k=k: p[k], params["layers"]), h)
            penalty += own
        return last(params["outer"], h, x) + penalty

    params, x = mlp(), inputs()[0]
    step = adam_jax.gradient_release(
        optax.sgd(1.0),
        first=first,
        layer=with_penalty,
        last=lambda outer, h, x: (last(outer, h, x), {"h": h}),
        has_aux=True,
        microbatches=microbatches,
    )
    new, _, (value, aux) = jax.jit(step)(params, step.init(params), x)
    expected, gradient = jax.jit(jax.value_and_grad(total))(params, x)
    chex.assert_trees_all_close(value, expected, rtol=1e-6)
    wanted = jax.tree.map(np.subtract, params, gradient)
    chex.assert_trees_all_close(new, wanted, rtol=1e-5)
    assert aux["h"].shape == (4, 4)


def test_ctx_has_the_layer_index_a_key_and_shared_arrays():
    def noise(key):
        return jax.random.normal(key, (4,))[None]

    def noisy(p, h, ctx):
        scale = 1 + ctx.index.astype(jnp.float32)
        return layer(p, h) * scale + noise(ctx.key) + ctx.shared["bias"][None]

    def total(params, x, key, bias):
        h = first(params["outer"], x)
        for k in range(COUNT):
            p = jax.tree.map(lambda p, k=k: p[k], params["layers"])
            h = layer(p, h) * (1.0 + k) + noise(jax.random.fold_in(key, k)) + bias[None]
        return last(params["outer"], h, x)

    params, x, key, bias = mlp(), inputs()[0], jax.random.key(0), jnp.arange(4.0)
    step = adam_jax.gradient_release(
        optax.sgd(1.0),
        first=lambda outer, x, ctx: first(outer, x),
        layer=noisy,
        last=last,
        remat=jax.checkpoint_policies.nothing_saveable,
    )
    run = jax.jit(step)
    new, _, value = run(params, step.init(params), x, key=key, shared={"bias": bias})
    loss, gradient = jax.jit(jax.value_and_grad(total))(params, x, key, bias)
    chex.assert_trees_all_close(value, loss, rtol=1e-6)
    wanted = jax.tree.map(np.subtract, params, gradient)
    chex.assert_trees_all_close(new, wanted, rtol=1e-4, atol=1e-4)


# Conversion


def test_a_state_converts_to_the_usual_state_and_back():
    tx, params, xs = adam_jax.adamw(1e-2), mlp(), inputs(3)
    _, state, _ = trained(small(tx), params, xs)
    _, usual, _ = trained(Usual(tx), params, xs)
    chex.assert_trees_all_close(adam_jax.convert_state(state, tx, params), usual, rtol=1e-4)
    back = adam_jax.convert_state(usual, small(tx), params)
    chex.assert_trees_all_close(back.inner_state, state.inner_state, rtol=1e-4)


# Errors


@pytest.mark.parametrize(
    "tx, parts",
    [
        (
            optax.chain(optax.clip_by_global_norm(1.0), adam_jax.adam(1e-3)),
            ("stable_adamw", "clip_to_previous_norm", "two_pass=True", "clip each layer"),
        ),
        (
            adam_jax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.adam(1e-3)),
            ("clip_by_global_norm(1.0)", "two_pass=True"),
        ),
        (optax.apply_if_finite(adam_jax.adam(1e-3), 5), ("two_pass=True",)),
        (optax.MultiSteps(adam_jax.adam(1e-3), 2), ("MultiSteps", "microbatches=k")),
        (optax.contrib.prodigy(), ("prodigy", "parameters or the state")),
    ],
    ids=["optax", "ours", "finite", "accumulation", "prodigy"],
)
def test_what_needs_the_whole_gradient_raises(tx, parts):
    with pytest.raises(ValueError, match=says("gradient_release", *parts)):
        small(tx).init(mlp())


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda p: p["layers"], ("params", '"outer"', '"layers"', "kernel")),
        (lambda p: {**p, "outer": {}}, ("outer", "must have a leaf")),
        (
            lambda p: {**p, "layers": {**p["layers"], "bias": jnp.ones((2, 4))}},
            ("layers/kernel: [3]", "layers/bias: [2]"),
        ),
        (
            lambda p: {**p, "outer": {**p["outer"], "n": jnp.arange(2)}},
            ("'outer/n'", "int32", "shared="),
        ),
    ],
    ids=["structure", "empty", "sizes", "integers"],
)
def test_parameters_that_do_not_fit_gradient_release_raise(change, parts):
    with pytest.raises(ValueError, match=says("gradient_release", *parts)):
        small(adam_jax.adam(1e-3)).init(change(mlp()))


@pytest.mark.parametrize(
    "model, parts",
    [
        ({"first": lambda outer, x: jnp.arange(4)}, ("first", "int32", "shared=")),
        ({"layer": lambda p, h: h[:1]}, ("layer", "[4, 4]", "[1, 4]")),
        ({"layer": lambda p, h: (h, h, h)}, ("layer", "auxiliary loss")),
        ({"last": lambda outer, h, x: h}, ("last", "float32[4, 4]", "has_aux=True")),
        ({"microbatches": 3}, ("microbatches=3", "[4, 4]")),
    ],
    ids=["first", "shape", "structure", "last", "microbatches"],
)
def test_wrong_results_of_the_model_functions_raise(model, parts):
    step, params = small(adam_jax.adam(1e-3), **model), mlp()
    with pytest.raises(ValueError, match=says("gradient_release", *parts)):
        step(params, step.init(params), inputs()[0])


# Devices


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("storage", ["float32", "int8"])
@every_mode
def test_sharded_layers_step_as_on_one_device(axis_type, storage):
    """Check FSDP, and that devices gather nothing but single layers' parameters."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    tx = adam_jax.adamw(1e-2, eps=1e-2, storage=by_matrix(storage))
    params, xs = mlp(width=128), inputs(2, size=8)
    functions = {"first": first, "layer": layer, "last": last}
    step = small(tx, **{name: with_layout(mesh, f) for name, f in functions.items()})
    specs = jax.tree.map(lambda p: P(*[None] * (p.ndim - 1), "data"), params)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    sharded = jax.device_put(params, shardings)
    state = step.init(sharded)
    wanted = state.inner_state[0].mu
    codes = wanted if storage == "float32" else wanted.codes
    assert codes["layers"]["kernel"].sharding.spec == P(None, None, "data")
    xs = jax.device_put(xs, NamedSharding(mesh, P(None, "data")))
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(sharded, state, xs[0])
    compiled = lowered.compile(QUICKLY)
    for x in xs:
        sharded, state, _ = compiled(sharded, state, x)
    new, *_ = trained(small(tx), params, jax.device_get(xs))
    chex.assert_trees_all_close(
        jax.device_get(sharded), new, rtol=1e-4, atol=1e-3 if storage == "int8" else 1e-4
    )
    gathered_sizes = {n for kind, _, n in sent(compiled.as_text()) if kind == "all-gather"}
    assert gathered_sizes <= {128 * 128, 128, 2 * 128}, gathered_sizes


@pytest.mark.eight_devices
@pytest.mark.slow
def test_zero1_shards_the_state_of_layers():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = adam_jax.groups(adam_jax.adamw, {"bias": "frozen"}, learning_rate=1e-2, eps=1e-2)
    params, xs = mlp(width=16), inputs(2, size=8)
    step = small(adam_jax.zero1(tx, mesh))
    given = jax.device_put(params, NamedSharding(mesh, P()))
    state = jax.jit(step.init)(given)
    new, jitted = given, jax.jit(step)
    for x in jax.device_put(xs, NamedSharding(mesh, P(None, "data"))):
        new, state, _ = jitted(new, state, x)
    (mu,) = [x for path, x in leaves_of(state) if path.endswith("mu/layers/kernel")]
    assert mu.sharding.shard_shape(mu.shape) == (3, 2, 16)
    chex.assert_trees_all_close(
        jax.device_get(new), trained(small(tx), params, xs)[0], rtol=1e-4, atol=1e-4
    )


# Memory


def test_the_memory_report_counts_the_gradient_of_one_layer():
    params = mlp(width=64)
    tx = adam_jax.adamw(1e-3, storage="compact")
    report = adam_jax.memory_report(tx, params, gradient_release=True)
    gradients = nbytes(params["outer"]) + nbytes(params["layers"]) // COUNT
    assert {row.part: row.bytes for row in report.rows}["gradients"] == gradients
    assert report.state_bytes == nbytes(small(tx).init(params))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "compact"])
def test_a_step_needs_less_memory_than_four_layers_besides_its_operands(storage):
    """Compile 24 layers of width 512: the gradient of all layers would be 24 layers."""
    width, count, length = 512, 24, 64

    def described(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = jax.tree.map(lambda p: described(*p.shape), layered.transformer(count, width))
    tokens = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
    step = release(adam_jax.adamw(1e-3, storage=storage))
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, jax.eval_shape(step.init, params), tokens)
        .compile()
    )
    one = jax.tree.map(lambda p: described(*p.shape[1:]), params["layers"])
    h = described(1, length, width)
    vjp = jax.jit(lambda p, h, c: jax.vjp(layered.layer, p, h)[1](c)).lower(one, h, h).compile()
    layer_bytes = sum(4 * p.size for p in jax.tree.leaves(one))
    allowed = 3.5 * layer_bytes + count * 4 * h.size + vjp.memory_analysis().temp_size_in_bytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes <= allowed

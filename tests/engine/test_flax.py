"""Flax: NNX with its paths and sharded parameters, Linen's TrainState and boxes, and msgpack."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from helpers import QUICKLY, RULES, every_mode, normal, optimizer, slowly, tree, typical_rules

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(16, 4)), jnp.float32)
STEPS = 6
TOLERANCE = 2e-5  # steps are 0.1, and Optax rounds the bias correction
KERNELS, BIASES = ({f"layers/{i}/{name}" for i in range(2)} for name in ("kernel", "bias"))


class Model(nnx.Module):
    """A model with layers in a list and biases that are not zero."""

    def __init__(self, rngs, axes=None, dtype=jnp.float32):
        linear = functools.partial(
            nnx.Linear,
            param_dtype=dtype,
            rngs=rngs,
            kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), axes),
            bias_init=nnx.initializers.ones,
        )
        self.layers = nnx.List([linear(8, 8), linear(8, 4)])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def loss(model):
    return jnp.mean((model(X) - Y) ** 2)


@nnx.jit
def train_step(model, optimizer):
    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def create(tx, **keywords):
    model = Model(nnx.Rngs(0), **keywords)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def train(model, optimizer):
    return [train_step(model, optimizer) for _ in range(STEPS)]


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def arrays(tree):
    return [jnp.asarray(x) for x in jax.tree.leaves(tree)]


def paths(tree):
    """Return the paths of leaves with a true flag, without NNX's ending."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, flag in jax.tree_util.tree_leaves_with_path(tree)
        if flag
    }


# NNX


@pytest.mark.standard_promotion  # Optax's schedules need it
@pytest.mark.parametrize("jit", [lambda f: f, slowly(nnx.jit)], ids=["eager", "jit"])
def test_nnx_optimizer_trains_as_with_optax(jit):
    schedule = optax.warmup_cosine_decay_schedule(0.01, 0.1, warmup_steps=2, decay_steps=STEPS)
    mask = adam_jax.not_matching("bias")
    txs = (
        adam_jax.chain(
            optax.clip_by_global_norm(1.0),
            adam_jax.adamw(schedule, weight_decay=0.1, weight_decay_mask=mask),
        ),
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=mask)
        ),
    )
    (model, mine), (other, theirs) = (jit(functools.partial(create, tx))() for tx in txs)
    losses, expected = train(model, mine), train(other, theirs)
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    chex.assert_trees_all_close(parameters(model), parameters(other), rtol=1e-5, atol=TOLERANCE)

    assert adam_jax.step_count(mine.opt_state) == STEPS
    read = adam_jax.moments(mine.opt_state)
    adam = theirs.opt_state[1][0]
    for ours, optaxs in ((read["mu"], adam.mu), (read["nu"], adam.nu)):
        assert any(jnp.any(x) for x in arrays(ours))
        chex.assert_trees_all_close(arrays(ours), arrays(optaxs), rtol=1e-3, atol=TOLERANCE)


def test_a_path_is_the_same_string_at_init_and_at_update():
    at_init, at_update = [], []

    def storage(path, leaf):
        at_init.append(path)
        return "bfloat16" if path == "layers/0/kernel" else None

    def mask(gradients):
        found = adam_jax.matching("^layers/[01]/(kernel|bias)$")(gradients)
        at_update.append(paths(found))
        return found

    model, opt = create(adam_jax.adamw(0.1, weight_decay_mask=mask, storage=storage))
    assert set(at_init) == KERNELS | BIASES
    train_step(model, opt)
    assert at_update and all(found == set(at_init) for found in at_update)
    nu = opt.opt_state[0].nu
    assert nu["layers"][0]["kernel"].dtype == jnp.bfloat16
    assert nu["layers"][1]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    "mask, decayed",
    [
        (adam_jax.not_matching("bias"), KERNELS),
        (adam_jax.matching("^layers/0/kernel$"), {"layers/0/kernel"}),
        (None, KERNELS | BIASES),
    ],
)
def test_a_mask_keeps_weight_decay_off_nnx_leaves(mask, decayed):
    """With zero gradients, only the leaves that the mask selects shrink."""
    model, opt = create(adam_jax.adamw(0.1, weight_decay=0.5, weight_decay_mask=mask))
    before = jax.tree.map(jnp.copy, parameters(model))
    opt.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    shrunk = paths(jax.tree.map(lambda p, q: bool(jnp.all(q != p)), before, parameters(model)))
    assert shrunk == decayed
    kernel = [p["layers"][0]["kernel"] for p in (before, parameters(model))]
    np.testing.assert_allclose(kernel[1], 0.95 * kernel[0], rtol=1e-6)


@pytest.mark.slow
def test_nnx_rounds_bfloat16_as_a_plain_dict_does():
    """Random bits depend on a leaf's path, which is the same in NNX and in a dict."""
    tx = adam_jax.adamw(0.1, weight_decay=0.1)
    model, opt = create(tx, dtype=jnp.bfloat16)
    params = jax.tree.map(jnp.copy, parameters(model))
    state = tx.init(params)
    for seed in range(3):
        grads = jax.tree.map(lambda p, s=seed: jnp.cos(p * (s + 1)), params)
        opt.update(model, wrapped(model, grads))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(parameters(model), params)
    read = adam_jax.moments(opt.opt_state)
    chex.assert_trees_all_equal(arrays(read["nu"]), arrays(adam_jax.moments(state)["nu"]))


def wrapped(model, grads):
    """Return gradients in the form that nnx.grad returns."""
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, grads)
    return state


@pytest.mark.slow
@pytest.mark.eight_devices
@every_mode
def test_nnx_trains_with_sharded_parameters(axis_type):
    tx = adam_jax.adamw(0.1, weight_decay=0.1)
    alone, opt = create(tx)
    expected = train(alone, opt)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        model, opt = create(tx, axes=("data", None))
        losses = train(model, opt)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name in ("mu", "nu"):
        moment = getattr(opt.opt_state[0], name)["layers"][0]["kernel"]
        assert moment.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None)), 2)


# Linen


class Linen(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, (None, "model")) if self.boxed else init
        for size in (8, 4):
            x = nn.Dense(size, kernel_init=init, bias_init=nn.initializers.ones)(jnp.tanh(x))
        return x


def linen_run(module, tx):
    params = module.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=module.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
    return state


@pytest.mark.standard_promotion  # Optax needs it
@pytest.mark.parametrize("boxed", [slowly(False), True], ids=["plain", "Partitioned"])
def test_linen_train_state_trains_as_with_optax(boxed):
    mask = adam_jax.not_matching("^Dense_[01]/bias$")
    mine = linen_run(Linen(boxed), adam_jax.adamw(0.1, weight_decay=0.5, weight_decay_mask=mask))
    theirs = linen_run(Linen(boxed), optax.adamw(0.1, weight_decay=0.5, mask=mask))
    chex.assert_trees_all_equal_structs(mine.opt_state, theirs.opt_state)
    chex.assert_trees_all_close(mine.params, theirs.params, rtol=1e-5, atol=TOLERANCE)
    assert adam_jax.step_count(mine.opt_state) == mine.step == STEPS
    chex.assert_trees_all_equal_structs(adam_jax.moments(mine.opt_state)["nu"], mine.params)


def test_linen_partitioned_boxes_stay_around_the_moments():
    seen = []
    tx = adam_jax.adamw(0.1, storage=lambda path, leaf: seen.append(path))
    params = Linen(boxed=True).init(jax.random.key(0), X)["params"]
    specs = nn.get_partition_spec(tx.init(params))
    assert set(seen) == {f"Dense_{i}/{name}" for i in range(2) for name in ("kernel", "bias")}
    assert specs[0].nu["Dense_0"] == {"kernel": P(None, "model"), "bias": P()}
    assert specs[0].count == P()


# Serialization


@typical_rules
def test_a_state_survives_msgpack(name):
    """Serialize a state of two dtypes, with schedules and a mask."""
    params = {"a": tree(0), "b": tree(1, jnp.bfloat16)}
    mask = adam_jax.not_matching("bias")
    tx = optimizer(name, lambda t: 0.1, weight_decay=lambda t: 0.1, weight_decay_mask=mask)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(1, 9, size=x.shape)).astype(x.dtype), tx.init(params)
    )
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(restored, state)
    assert set(adam_jax.moments(restored)) == set(RULES[name].moments)


# Linen's partition metadata, as in lm1b and nanodo


PARTITIONED = {
    "optax": lambda: optax.adamw(1e-2),
    "int8": lambda: adam_jax.adamw(1e-2, storage="int8"),
    "master_weights": lambda: adam_jax.master_weights(adam_jax.adamw(1e-2)),
    "both": lambda: adam_jax.master_weights(adam_jax.adamw(1e-2, storage="int8"), bits=24),
    "optax in master_weights": lambda: adam_jax.master_weights(optax.adamw(1e-2)),
    "groups": lambda: adam_jax.groups(
        adam_jax.adamw, {"bias": dict(weight_decay=0.0)}, learning_rate=1e-2, storage="int8"
    ),
}
SIMPLER = [(name, False) for name in ("int8", "master_weights", "optax in master_weights")]
SIMPLER += [("optax", False), ("optax", True), ("groups", False), ("both", True)]


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.standard_promotion
@pytest.mark.parametrize("name, unboxed", [("both", False), *SIMPLER])
def test_partition_metadata_shards_parameters_and_state(name, unboxed):
    """Initialize sharded over 8 devices and train, with boxes (nanodo) or without (lm1b)."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    dtype = jnp.bfloat16 if "master" in name or name == "both" else jnp.float32
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "data"))
    model = nn.Dense(512, kernel_init=kernel_init, param_dtype=dtype)
    tx, x = PARTITIONED[name](), normal((4, 512), seed=1)

    def init(key):
        return TrainState.create(apply_fn=None, params=model.init(key, x)["params"], tx=tx)

    spec = nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, P)
    )
    jitted = jax.jit(init, out_shardings=shardings, compiler_options=QUICKLY)
    state = jitted(jax.random.key(0))
    for leaf in jax.tree.leaves(state.opt_state):
        assert leaf.shape != (512, 512) or leaf.sharding.spec == P(None, "data")
    if unboxed:
        state = nn.meta.unbox(state)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(state):
        def loss(params):
            return jnp.mean(model.apply({"params": nn.meta.unbox(params)}, x) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    before, losses = state, []
    for _ in range(5):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert jax.tree.structure(state) == jax.tree.structure(before)
    boxes = jax.tree.leaves(state.params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert any(isinstance(x, nn.Partitioned) for x in boxes) != unboxed
    for box in boxes:
        assert not isinstance(box, nn.Partitioned) or box.names == (None, "data")


def test_boxes_keep_the_path_of_their_parameter():
    boxed = {"kernel": nn.Partitioned(jnp.ones((4, 4)), (None, "data")), "bias": jnp.ones(4)}
    seen = []
    tx = adam_jax.adamw(1e-3, storage=lambda path, leaf: seen.append((path, leaf.shape)))
    tx.init(boxed)
    assert {("kernel", (4, 4)), ("bias", (4,))} == set(seen)
    assert jax.tree.leaves(adam_jax.matching("^kernel$")(boxed)) == [False, True]

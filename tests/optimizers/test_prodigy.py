"""Prodigy, whose estimate of the learning rate is one number for the whole tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
import reference
from adam_jax import prodigy
from helpers import says, slowly, step_of

STEPS = 40
START = {"kernel": (8, 4), "bias": (8,)}


def parameters(dtype=np.float32, shapes=START):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape).astype(dtype)) for name, shape in shapes.items()
    }


def gradient(params, t):
    """Return the gradient of a quadratic whose minimum moves a little."""
    return jax.tree.map(lambda x: 2 * (x - 1) + 0.1 * jnp.sin(t).astype(x.dtype), params)


def train(tx, params, steps=STEPS, gradient=gradient, step=None):
    """Return the parameters and the state after some steps."""
    step = step or step_of(tx)

    @jax.jit
    def run(params, state):
        def body(carry, t):
            params, state = carry
            return step(params, state, gradient(params, t)), None

        return jax.lax.scan(body, (params, state), jnp.arange(steps))[0]

    return run(params, tx.init(params))


def flat(tree):
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


SETTINGS = {
    "defaults": {},
    "weight decay": {"weight_decay": 0.1},
    "safeguard": {"safeguard_warmup": True, "b3": 0.9, "d_coef": 2.0, "eps": 1e-2},
    "a schedule": {"lr": lambda t: 1 - 0.5 * np.float64(1 / STEPS) * t, "weight_decay": 0.1},
}
NAMES = {"lr": "learning_rate", "b3": "beta3", "d_coef": "estim_lr_coef"}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("setting", SETTINGS)
def test_prodigy_equals_its_reference_in_float64(setting):
    given = SETTINGS[setting]
    with jax.enable_x64(True):
        params = parameters(np.float64)
        expected = reference.Prodigy(flat(params), **given)
        for t in range(STEPS):
            expected.step(flat(gradient({"p": jnp.asarray(expected.p)}, jnp.asarray(t))))
        tx = prodigy(**{NAMES.get(name, name): value for name, value in given.items()})
        params, state = train(tx, params)
        np.testing.assert_allclose(flat(params), expected.p, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state.estim_lr, expected.d, rtol=1e-12)
        assert expected.d > 1e-3


@pytest.mark.standard_promotion
def test_prodigy_continues_a_run_of_optax_and_equals_it_without_eps():
    """In Optax, eps is multiplied by the d of the next step."""
    settings = {"weight_decay": 0.1, "eps": 1e-30}
    with jax.enable_x64(True):
        params = parameters(np.float64)
        theirs = optax.contrib.prodigy(1.0, **settings)
        params, state = train(theirs, params)
        ours = prodigy(1.0, **settings)
        assert jax.tree.structure(ours.init(params)) == jax.tree.structure(state)
        ends = [jax.jit(tx.update)(gradient(params, 0), state, params) for tx in (ours, theirs)]
        np.testing.assert_allclose(*map(flat, ends), rtol=1e-10)


def test_the_estimate_ignores_leaves_outside_of_a_mask_or_a_group():
    params = parameters()
    alone = {"kernel": params["kernel"]}
    _, expected = train(prodigy(), alone)
    masked = optax.masked(prodigy(), {"kernel": True, "bias": False})
    _, state = train(masked, params, steps=STEPS)
    np.testing.assert_allclose(state.inner_state.estim_lr, expected.estim_lr, rtol=1e-5)
    grouped = adam_jax.groups(prodigy, {"bias": {"estim_lr0": 1e-3}})
    _, state = train(grouped, params)
    estimates = sorted(
        {
            float(x)
            for x in optax.tree_utils.tree_get_all_with_path(state, "estim_lr")
            for x in x[1:]
        }
    )
    assert any(np.isclose(x, expected.estim_lr, rtol=1e-5) for x in estimates)
    assert len(estimates) == 2


def test_each_member_of_a_population_has_its_own_estimate():
    population = {k: jnp.stack([x, 10 * x]) for k, x in parameters().items()}
    _, states = jax.vmap(lambda params: train(prodigy(), params))(population)
    each = [train(prodigy(), {k: x[i] for k, x in population.items()})[1] for i in range(2)]
    np.testing.assert_allclose(states.estim_lr, [s.estim_lr for s in each], rtol=1e-5)


@pytest.mark.standard_promotion
def test_accumulated_gradients_count_once():
    _, expected = train(prodigy(), parameters())
    tx = optax.MultiSteps(prodigy(), 2)
    held = lambda params, t: gradient(params, t // 2)  # noqa: E731
    _, state = train(tx, parameters(), 2 * STEPS, held)
    np.testing.assert_allclose(state.inner_opt_state.estim_lr, expected.estim_lr, rtol=1e-5)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("axis_type", "storage"),
    [(AxisType.Explicit, None), slowly(AxisType.Auto, "int8")],
)
def test_the_estimate_sums_over_all_devices(axis_type, storage):
    shapes = {"kernel": (64, 512), "bias": (8,)}
    params = parameters(shapes=shapes)
    tx = prodigy(storage=storage)
    expected_params, expected = train(tx, params, 20)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"kernel": P("data", "model"), "bias": P("data")}
    with jax.set_mesh(mesh):
        sharded = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}
        out, state = train(tx, sharded, 20)
    np.testing.assert_allclose(state.estim_lr, expected.estim_lr, rtol=1e-4)
    np.testing.assert_allclose(flat(out), flat(expected_params), atol=2e-3 if storage else 1e-5)


@pytest.mark.slow
def test_low_memory_state_gives_a_similar_estimate():
    """The initial parameters stay exact in every storage; compact approximates Adam's direction."""
    params = parameters(shapes={"kernel": (64, 128)})
    _, expected = train(prodigy(), params)
    for storage, within in {"bfloat16": 0.02, "int8": 0.02, "compact": 0.5}.items():
        _, state = train(prodigy(storage=storage), params)
        np.testing.assert_array_equal(state.params0["kernel"], params["kernel"])
        np.testing.assert_allclose(state.estim_lr, expected.estim_lr, rtol=within)


def test_apply_with_master_weights_follows_the_float32_run():
    def same_gradient(params, t):
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        grads = gradient(rounded, t)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    params = parameters(jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    _, expected = train(prodigy(storage="float32"), exact, gradient=same_gradient)
    tx = adam_jax.master_weights(prodigy(storage="float32"), bits=32)
    step = lambda params, state, grads: adam_jax.apply(tx, grads, state, params)  # noqa: E731
    _, state = train(tx, params, gradient=same_gradient, step=step)
    (found,) = [s for s in jax.tree.leaves(state, is_leaf=is_prodigy) if is_prodigy(s)]
    np.testing.assert_allclose(found.estim_lr, expected.estim_lr, rtol=1e-3)


def is_prodigy(x):
    return isinstance(x, optax.contrib.ProdigyState)


@pytest.mark.slow
@pytest.mark.parametrize("two_pass", [False, True])
def test_all_layers_share_the_estimate_under_gradient_release(two_pass):
    shapes = {"in": (3, 4), "w": (5, 4, 4), "x": (6, 3)}
    model = {
        "first": lambda outer, x: x @ outer["in"],
        "layer": lambda layer, h: h + jnp.tanh(h @ layer["w"]),
        "last": lambda outer, h, x: jnp.mean((h - 1) ** 2),
    }

    def loss(params):
        h = model["first"](params["outer"], x)
        for k in range(5):
            h = model["layer"]({"w": params["layers"]["w"][k]}, h)
        return model["last"](None, h, x)

    with jax.enable_x64(True):
        arrays = parameters(np.float64, shapes)
        x = arrays["x"]
        params = {"outer": {"in": arrays["in"]}, "layers": {"w": arrays["w"]}}
        plain, expected = train(prodigy(), params, gradient=lambda p, t: jax.grad(loss)(p))
        release = adam_jax.gradient_release(prodigy(), **model, two_pass=two_pass)
        step = lambda params, state, grads: release(params, state, x)[:2]  # noqa: E731
        released, state = train(release, params, step=step, gradient=lambda p, t: None)
    np.testing.assert_allclose(state.inner_state.estim_lr, expected.estim_lr, rtol=1e-10)
    np.testing.assert_allclose(flat(released), flat(plain), rtol=1e-10)


def test_zero_gradients_keep_the_estimate():
    tx = prodigy()
    params = parameters()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zero, tx.init(params), params)
    assert float(state.estim_lr) == pytest.approx(1e-6)
    assert not np.any(flat(updates))


def test_states_of_one_optimizer_share_no_array():
    """Donating one state leaves the others, and the arguments, as they are."""
    tx = prodigy(estim_lr0=jnp.float32(1e-5))
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(2):
        params = parameters(shapes={"w": (3,)})
        update(params, tx.init(params), params)
    assert tx.init({"w": 1.0}).estim_lr == jnp.float32(1e-5)


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        ({"norm": jnp.zeros(2)}, ("a dict of scalars", "norm")),
        ({"other": 1.0}, ("a dict of scalars", "norm", "other")),
        (1.0, ("a dict of scalars", "1.0")),
    ],
)
def test_update_scalars_must_return_the_declared_scalars(returned, parts):
    @adam_jax.rule(norm=adam_jax.scalar, update_scalars=lambda norm: returned)
    def plain(g, *, norm):
        return g

    tx = adam_jax.from_rule(plain, 1.0)
    with pytest.raises(ValueError, match=says("plain: rule plain", "update_scalars", *parts)):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_update_scalars_cannot_take_the_parameter():
    with pytest.raises(TypeError, match=says("rule plain", "update_scalars", "got p")):

        @adam_jax.rule(norm=adam_jax.scalar, update_scalars=lambda norm, *, p: {"norm": norm})
        def plain(g, *, norm):
            return g


def test_betas_must_be_a_pair():
    with pytest.raises(TypeError, match=says("prodigy", "betas", "(b1, b2)", "0.9")):
        prodigy(betas=0.9)


def test_a_users_rule_can_have_scalars():
    """Step by the gradient, divided by the largest global norm so far."""

    def largest(norm, square):
        return {"norm": jnp.maximum(norm, jnp.sqrt(square))}

    @adam_jax.rule(norm=adam_jax.scalar.starting_at("least"), update_scalars=largest)
    def normalized(g, *, norm, scale=1.0):
        return scale * g / norm, {"square": g * g}

    tx = adam_jax.from_rule(normalized, 1.0, least=2.0)
    params, grads = {"a": jnp.zeros(2), "b": jnp.zeros(())}, {"a": jnp.ones(2), "b": jnp.sqrt(7.0)}
    state = tx.init(params)
    for norm in (2.0, 3.0):
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(updates["a"], -1 / norm)
    assert float(state[0].norm) == 3

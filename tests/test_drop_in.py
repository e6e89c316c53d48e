"""Against Optax: its calls mean the same here, its states are ours, and float32 is nearer the truth."""

from __future__ import annotations

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adam_jax

pytestmark = pytest.mark.standard_promotion  # parts of Optax need it

NAMES = """adam adamw nadam nadamw amsgrad adamax adamaxw radam rmsprop sgd
scale_by_adam scale_by_amsgrad scale_by_adamax scale_by_radam scale_by_rms scale_by_stddev
trace""".split()


def both(name):
    return getattr(adam_jax, name), getattr(optax, name)


# Signatures


@pytest.mark.parametrize("name", NAMES)
def test_signature_continues_optax(name):
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in both(name))
    by_name = {p.name: p for p in ours}
    for p in theirs:
        assert (by_name[p.name].kind, by_name[p.name].default) == (p.kind, p.default), p.name
    positional = [[p.name for p in s if p.kind is p.POSITIONAL_OR_KEYWORD] for s in (ours, theirs)]
    assert positional[0] == positional[1]


# Updates

SHAPES = {"dense": {"kernel": (4, 3), "bias": (3,)}, "scale": ()}


def trees(steps, complex_=False):
    """Parameters, and gradients of 1e-3 to 10 in size that pause and change their scale."""
    rng = np.random.default_rng(0)

    def array(*shape):
        x = rng.normal(size=shape)
        return x + 1j * rng.normal(size=shape) if complex_ else x

    def gradient(shape):
        g = array(steps, *shape) * 10.0 ** rng.uniform(-3, 1, size=shape)
        g[steps // 3] = 0
        g[steps // 2 :] *= 0.1
        return jnp.asarray(g)

    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    params = jax.tree.map(lambda shape: jnp.asarray(array(*shape)), SHAPES, **is_shape)
    return params, jax.tree.map(gradient, SHAPES, **is_shape)


def run(tx, params, gradients):
    """The updates of all steps, each at the parameters that the ones before lead to; the state."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (_, state), updates = jax.jit(lambda c, g: jax.lax.scan(step, c, g))(
        (params, tx.init(params)), gradients
    )
    return updates, state


def warmup(count):
    return 1e-2 * (count + 1) / 10


TREE = {"dense": {"kernel": True, "bias": False}, "scale": True}
PREFIX = {"dense": True, "scale": False}


def matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


ADAM = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "eps_root": 1e-8}
RMS = {"decay": 0.8, "eps": 1e-4, "initial_scale": 0.5}
HALF = {"mu_dtype": jnp.float32}
MOMENTUM = {"momentum": 0.9, "nesterov": True}

CALLS = [
    *((name, (1e-2,), {}) for name in NAMES if not name.startswith(("scale_by", "trace"))),
    *((name, (), {}) for name in NAMES if name.startswith("scale_by")),
    *((name, (warmup,), {}) for name in ("adam", "nadamw", "radam", "rmsprop", "sgd")),
    *((name, (None,), {}) for name in ("adam", "adamw", "radam", "rmsprop", "sgd")),
    ("adam", (1e-2, 0.8, 0.99, 1e-6, 1e-8, jnp.float32), {"nesterov": True}),
    ("adam", (1e-2,), {"b1": 0.0, "b2": 0.0}),
    ("adamw", (1e-2, 0.8, 0.99, 1e-6, 1e-8, "float32", 0.1, TREE), {}),
    ("adamw", (1e-2,), {"mask": PREFIX, "weight_decay": 0.1, "nesterov": True}),
    ("adamw", (1e-2,), {"mask": matrices, "weight_decay": 0.1}),
    ("adamw", (warmup,), {"weight_decay": warmup, "mask": matrices}),
    ("adamw", (1e-2,), {"weight_decay": 0.0}),
    ("nadam", (1e-2,), {**ADAM, **HALF}),
    ("nadam", (1e-2,), {"nesterov": False}),
    ("nadamw", (1e-2, 0.8, 0.99, 1e-6, 1e-8, None, 0.1, PREFIX), {"nesterov": False}),
    ("nadamw", (1e-2,), {"weight_decay": warmup, "mask": TREE, **HALF}),
    ("amsgrad", (1e-2, 0.8, 0.99, 1e-6, 1e-8, jnp.float32, False, True), {}),
    ("amsgrad", (1e-2,), {"bias_correction_nu": False, **ADAM}),
    ("adamax", (1e-2, 0.8, 0.99, 1e-4), {}),
    ("adamaxw", (1e-2, 0.8, 0.99, 1e-4, 0.1, matrices), {}),
    ("adamaxw", (1e-2,), {"weight_decay": warmup, "mask": PREFIX}),
    ("radam", (1e-2, 0.8, 0.99, 1e-6, 1e-8, 4.5), {"nesterov": True}),
    ("rmsprop", (1e-2, 0.8, 1e-4, 0.5, False, True, 0.9, True, True), {}),
    ("rmsprop", (warmup,), {**RMS, **MOMENTUM}),
    ("rmsprop", (1e-2,), {"centered": True, "initial_scale": 1.0, "momentum": 0.5}),
    ("rmsprop", (1e-2,), {"bias_correction": True, "eps_in_sqrt": False}),
    ("sgd", (1e-2, 0.9), {}),
    ("sgd", (1e-2, 0.9, True, jnp.float32), {}),
    ("scale_by_adam", (), {**ADAM, **HALF, "nesterov": True}),
    ("scale_by_amsgrad", (), {**ADAM, **HALF, "bias_correction_mu": False}),
    ("scale_by_adamax", (0.8, 0.99, 1e-4), {}),
    ("scale_by_radam", (), {**ADAM, "threshold": 4.5, "nesterov": True}),
    ("scale_by_rms", (), {**RMS, "eps_in_sqrt": False, "bias_correction": True}),
    ("scale_by_stddev", (), {**RMS, "eps_in_sqrt": False}),
    ("scale_by_stddev", (), {"initial_scale": 1.0, "bias_correction": True, "eps": 1e-4}),
    ("trace", (0.9,), {}),
    ("trace", (0.9, True, "float32"), {}),
]


def spelled(call):
    name, args, kwargs = call
    told = [*args, *(f"{k}={v}" for k, v in kwargs.items())]
    return f"{name}({', '.join(getattr(x, '__name__', str(x)) for x in told)})"


@pytest.mark.parametrize("call", CALLS, ids=spelled)
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_same_updates_and_state(call, complex_):
    name, args, kwargs = call
    if complex_ and ({"mu_dtype", "accumulator_dtype"} & kwargs.keys() or _dtype_in(args)):
        pytest.skip("a real mu_dtype would lose imaginary parts: an error here")
    with jax.enable_x64(True):
        params, gradients = trees(30, complex_)
        (ours, mine), (theirs, their) = (
            run(f(*args, **kwargs), params, gradients) for f in both(name)
        )
        chex.assert_trees_all_equal_structs(mine, their)
        chex.assert_trees_all_equal_shapes_and_dtypes((ours, mine), (theirs, their))
        # the cancelling difference of moments keeps fewer digits
        loose = "stddev" in name or "centered" in kwargs or len(args) == 9
        tolerance = 1e-9 if loose else 1e-12
        chex.assert_trees_all_close(ours, theirs, rtol=tolerance, atol=tolerance)
        chex.assert_trees_all_close(mine, their, rtol=tolerance, atol=tolerance)


def _dtype_in(args):
    return any(x in (jnp.float32, "float32") for x in args)


def test_every_argument_of_optax_is_in_a_call():
    """By position or by name, so that a new argument cannot go untested."""
    for name in NAMES:
        parameters = inspect.signature(getattr(optax, name)).parameters
        given = set()
        for _, args, kwargs in (c for c in CALLS if c[0] == name):
            given |= set(list(parameters)[: len(args)]) | set(kwargs)
        assert given == set(parameters), name


@pytest.mark.parametrize("name", ["adamw", "nadam", "amsgrad", "radam", "rmsprop", "sgd"])
def test_a_state_continues_in_the_other(name):
    with jax.enable_x64(True):
        params, gradients = trees(20)
        first, second = (jax.tree.map(lambda g, s=s: g[s], gradients) for s in (np.s_[:10], np.s_[10:]))
        expected, _ = run(optax.identity(), params, second)
        del expected
        mine, theirs = (f(1e-2) for f in both(name))
        _, state = run(theirs, params, first)
        results = [_continue(tx, params, state, second) for tx in (mine, theirs)]
        chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-12)


def _continue(tx, params, state, gradients):
    step = jax.jit(lambda s, g: tx.update(g, s, params)[::-1])
    return jax.lax.scan(step, state, gradients)

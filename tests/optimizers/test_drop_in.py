"""Optax's calls give the same updates and states here, with no larger errors in float32."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
import reference

pytestmark = pytest.mark.standard_promotion  # parts of Optax need it

DIRECTIONS = ["adam", "amsgrad", "adamax", "novograd", "radam", "rms", "stddev"]
DIRECTIONS = [f"scale_by_{name}" for name in DIRECTIONS]
OPTIMIZERS = ["adam", "adamw", "nadam", "nadamw", "amsgrad", "adamax", "adamaxw", "radam"]
OPTIMIZERS += ["novograd", "rmsprop", "sgd"]
NAMES = [*OPTIMIZERS, *DIRECTIONS, "trace"]


def both(name):
    return getattr(adam_jax, name), getattr(optax, name)


# Signatures


@pytest.mark.parametrize("name", NAMES)
def test_a_signature_has_the_arguments_of_optax(name):
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in both(name))
    by_name = {p.name: p for p in ours}
    for p in theirs:
        assert (by_name[p.name].kind, by_name[p.name].default) == (p.kind, p.default), p.name
    positional = [[p.name for p in s if p.kind is p.POSITIONAL_OR_KEYWORD] for s in (ours, theirs)]
    assert positional[0] == positional[1]


def test_adabelief_takes_the_positional_arguments_of_optax_head():
    """After 0.2.8 Optax's adabelief takes both arguments of weight decay by position."""
    flags = {"w": True, "b": False}
    positional = adam_jax.adabelief(1e-2, 0.8, 0.9, 1e-8, 1e-7, 0.1, flags, nesterov=True)
    named = {"b1": 0.8, "b2": 0.9, "eps": 1e-8, "eps_root": 1e-7, "weight_decay": 0.1}
    by_name = adam_jax.adabelief(1e-2, **named, weight_decay_mask=flags, nesterov=True)
    params = {"w": jnp.ones(3), "b": jnp.ones(3)}
    updates = [run(tx, params, [params, params])[0] for tx in (positional, by_name)]
    chex.assert_trees_all_equal(*updates)
    assert updates[0][0]["w"][0] != updates[0][0]["b"][0]
    parameters = list(inspect.signature(optax.adabelief).parameters)  # 0.2.8 has no decay
    ours = list(inspect.signature(adam_jax.adabelief).parameters)
    assert [p for p in ours if p in parameters] == parameters


def test_a_mask_can_be_a_tree_that_is_callable():
    """An Equinox module of bools is one: it isn't called as a function of the parameters."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Linear:
        weight: object
        bias: object

        def __call__(self, x):
            return x @ self.weight + self.bias

    params, mask = Linear(jnp.ones((3, 3)), jnp.ones(3)), Linear(True, False)
    ours = adam_jax.adamw(0.1, weight_decay=0.5, weight_decay_mask=mask)
    theirs = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    updates = [run(tx, params, [params])[0] for tx in (ours, theirs)]
    chex.assert_trees_all_close(*updates, rtol=1e-5)
    assert updates[0][0].weight[0, 0] < updates[0][0].bias[0]


def test_nothing_private_of_another_package_is_imported():
    """A private name of another package may move in any release."""
    for path in Path(adam_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{a.name}" for a in node.names]
            for module in modules:
                private = [part for part in module.split(".") if part.startswith("_")]
                assert module.startswith(("adam_jax.", "__future__.")) or not private, module


# Updates


def trees(steps, has_complex=False):
    """Return parameters, one complex if asked, and gradients that are zero once and then shrink."""
    rng = np.random.default_rng(0)
    kernel, bias, scale = rng.normal(size=(3, 4, 3))
    dense = {"kernel": kernel, "bias": bias + 1j if has_complex else bias}
    params = {"dense": dense, "scale": scale}

    def gradient(p):
        g = rng.normal(size=np.shape(p)) * 10.0 ** rng.uniform(-3, 1, size=np.shape(p))
        return g * (1 - 2j) if np.iscomplexobj(p) else g

    gradients = [jax.tree.map(gradient, params) for _ in range(steps)]
    gradients[steps // 3] = jax.tree.map(np.zeros_like, params)
    for i in range(steps // 2, steps):
        gradients[i] = jax.tree.map(lambda g: 0.1 * g, gradients[i])
    return jax.tree.map(jnp.asarray, (params, gradients))


def run(tx, params, gradients, state=None):
    """Return the updates of all steps, applied to the parameters, and the last state."""
    state, updates = tx.init(params) if state is None else state, []
    for g in gradients:
        u, state = tx.update(g, state, params)
        params = optax.apply_updates(params, u)
        updates.append(u)
    return updates, state


def warmup(count):
    return 1e-2 * (count + 1) / 10


TREE = {"dense": {"kernel": True, "bias": False}, "scale": True}
PREFIX = {"dense": True, "scale": False}


def no_bias(tree):
    return jax.tree_util.tree_map_with_path(lambda path, x: path[-1].key != "bias", tree)


ADAM = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "eps_root": 1e-8}
RMS = {"decay": 0.8, "eps": 1e-4, "initial_scale": 0.5}
HALF = {"mu_dtype": jnp.float32}
MOMENTUM = {"momentum": 0.9, "nesterov": True}

CALLS = [
    *((name, (1e-2,), {}) for name in OPTIMIZERS),
    *((name, (warmup,), {}) for name in ("adam", "sgd")),
    *((name, (None,), {}) for name in ("adamw", "sgd")),
    ("adam", (1e-2, 0.8, 0.99, 1e-6, 1e-8, jnp.float32), {"nesterov": True}),
    ("adam", (1e-2,), {"b1": 0.0, "b2": 0.0}),
    ("adamw", (1e-2, 0.8, 0.99, 1e-6, 1e-8, "float32", 0.1, TREE), {}),
    ("adamw", (1e-2,), {"mask": PREFIX, "weight_decay": 0.1, "nesterov": True}),
    ("adamw", (1e-2,), {"mask": no_bias, "weight_decay": 0.1}),
    ("adamw", (warmup,), {"weight_decay": warmup, "mask": no_bias}),
    ("adamw", (1e-2,), {"weight_decay": 0.0}),
    ("nadam", (1e-2,), {**ADAM, **HALF}),
    ("nadam", (1e-2,), {"nesterov": False}),
    ("nadamw", (1e-2, 0.8, 0.99, 1e-6, 1e-8, None, 0.1, PREFIX), {"nesterov": False}),
    ("nadamw", (1e-2,), {"weight_decay": warmup, "mask": TREE, **HALF}),
    ("amsgrad", (1e-2, 0.8, 0.99, 1e-6, 1e-8, jnp.float32, False, True), {}),
    ("amsgrad", (1e-2,), {"bias_correction_nu": False, **ADAM}),
    ("adamax", (1e-2, 0.8, 0.99, 1e-4), {}),
    ("adamaxw", (1e-2, 0.8, 0.99, 1e-4, 0.1, no_bias), {}),
    ("adamaxw", (1e-2,), {"weight_decay": warmup, "mask": PREFIX}),
    ("novograd", (1e-2, 0.8, 0.3, 1e-4, 1e-8, 0.1), {}),
    ("novograd", (warmup,), {"weight_decay": 0.1}),
    ("radam", (1e-2, 0.8, 0.99, 1e-6, 1e-8, 4.5), {"nesterov": True}),
    ("rmsprop", (1e-2, 0.8, 1e-4, 0.5, False, True, 0.9, True, True), {}),
    ("rmsprop", (warmup,), {**RMS, **MOMENTUM}),
    ("rmsprop", (1e-2,), {"centered": True, "initial_scale": 1.0, "momentum": 0.5}),
    ("rmsprop", (1e-2,), {"bias_correction": True, "eps_in_sqrt": False}),
    ("sgd", (1e-2, 0.9), {}),
    ("sgd", (1e-2, 0.9, True, jnp.float32), {}),
    ("scale_by_adam", (), {**ADAM, **HALF, "nesterov": True}),
    (
        "scale_by_amsgrad",
        (),
        ADAM | HALF | {"bias_correction_mu": False, "bias_correction_nu": True},
    ),
    ("scale_by_adamax", (0.8, 0.99, 1e-4), {}),
    ("scale_by_novograd", (0.8, 0.3, 1e-4, 1e-8, 0.1, "float64"), {}),
    ("scale_by_radam", (), {**ADAM, "threshold": 4.5, "nesterov": True}),
    ("scale_by_rms", (), {**RMS, "eps_in_sqrt": False, "bias_correction": True}),
    ("scale_by_stddev", (), {**RMS, "eps_in_sqrt": False}),
    ("scale_by_stddev", (), {"initial_scale": 1.0, "bias_correction": True, "eps": 1e-4}),
    ("trace", (0.9,), {}),
    ("trace", (0.9, True, "float32"), {}),
]


def spelled(call):
    def word(x):
        return {id(TREE): "tree", id(PREFIX): "prefix"}.get(id(x), getattr(x, "__name__", str(x)))

    name, args, kwargs = call
    told = [*map(word, args), *(f"{k}={word(v)}" for k, v in kwargs.items())]
    return f"{name}({', '.join(told)})"


def is_split(x):
    return x in (jnp.float32, "float32")


@pytest.mark.parametrize("call", CALLS, ids=spelled)
def test_a_call_of_optax_gives_the_same_updates_and_state(call):
    name, args, kwargs = call
    narrow = any(map(is_split, (*args, kwargs.get("mu_dtype"))))
    with jax.enable_x64(True):
        params, gradients = trees(8, has_complex=not kwargs and len(args) <= 1)
        (ours, mine), (theirs, their) = (
            run(f(*args, **kwargs), params, gradients) for f in both(name)
        )
        chex.assert_trees_all_equal_structs(mine, their)
        chex.assert_trees_all_equal_shapes_and_dtypes((ours, mine), (theirs, their))
        # Optax multiplies a float32 moment in float32; a difference of moments keeps fewer digits
        centered = "stddev" in name or "centered" in kwargs or len(args) == 9
        tolerance = 5e-6 if narrow else 1e-9 if centered else 1e-12
        chex.assert_trees_all_close((ours, mine), (theirs, their), rtol=tolerance, atol=tolerance)


def test_every_argument_of_optax_is_tested():
    """Pass each argument by position or by name, so that a new one can't go untested."""
    for name in NAMES:
        parameters = inspect.signature(getattr(optax, name)).parameters
        given = set()
        for _, args, kwargs in (c for c in CALLS if c[0] == name):
            given |= set(list(parameters)[: len(args)]) | set(kwargs)
        assert given == set(parameters), name


@pytest.mark.parametrize(
    "name", ["adamw", "nadam", "amsgrad", "novograd", "radam", "rmsprop", "sgd"]
)
def test_a_state_of_optax_continues_in_adam_jax(name):
    with jax.enable_x64(True):
        params, gradients = trees(20)
        mine, theirs = (f(1e-2) for f in both(name))
        _, state = run(theirs, params, gradients[:10])
        results = [run(tx, params, gradients[10:], state) for tx in (mine, theirs)]
        chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-12)


# Accuracy: the error in float32 against the float64 reference

DECAY = {"weight_decay": 0.1}
P = np.linspace(-1, 1, 40, dtype=np.float32)

REFERENCES = {  # constructor: its reference, its keywords, the reference's
    "adam": (reference.adam, {}, {}),
    "adamw": (reference.adam, DECAY, {}),
    "nadam": (reference.nadam, {}, {}),
    "nadamw": (reference.nadam, DECAY, {}),
    "amsgrad": (reference.amsgrad, {}, {}),
    "adamax": (reference.adamax, {}, {}),
    "adamaxw": (reference.adamax, DECAY, {}),
    "radam": (reference.radam, {}, {}),
    "novograd": (reference.novograd, {}, {"eps": 1e-6}),
    "rmsprop": (reference.rms, {}, {}),
    "rmsprop corrected": (reference.rms, {"bias_correction": True}, {"bias_correction": True}),
    "rmsprop centered": (reference.rms_centered, {"centered": True}, {}),
    "sgd": (reference.trace, {"momentum": 0.9}, {}),
    "sgd nesterov": (reference.trace, MOMENTUM, {"nesterov": True}),
}


def float32_gradients(steps):
    rng = np.random.default_rng(2)
    scale = 10.0 ** rng.uniform(-3, 1, size=P.shape)
    return (rng.normal(size=(steps, *P.shape)) * scale).astype(np.float32)


def directions(tx, gradients):
    """Return the directions for float32 gradients at fixed parameters, as float64."""
    step = jax.jit(lambda s, g: tx.update(g, s, jnp.asarray(P))[::-1])
    _, updates = jax.lax.scan(step, tx.init(jnp.asarray(P)), jnp.asarray(gradients))
    return -np.asarray(updates, np.float64)


def exact(rule, gradients, **given):
    state, out = {}, []
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        u, state = rule(g, state, t=t, **given)
        out.append(u)
    return np.stack(out)


@pytest.mark.parametrize("case", REFERENCES)
def test_float32_errs_no_more_than_optax(case):
    rule, given, given_reference = REFERENCES[case]
    g = float32_gradients(100)
    truth = exact(rule, g, **given_reference) + given.get("weight_decay", 0) * P.astype(np.float64)
    ours, theirs = (
        np.max(np.abs(directions(f(1.0, **given), g) - truth)) for f in both(case.split()[0])
    )
    assert ours <= 1.1 * theirs + 1e-7


@pytest.mark.parametrize("b2", [0.999, 0.99999])
@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "amsgrad"])
def test_the_first_step_keeps_its_digits(name, b2):
    g = float32_gradients(1)
    truth = exact(getattr(reference, name.rstrip("w")), g, b2=b2)
    given = {"b2": b2} | ({"weight_decay": 0.0} if name == "adamw" else {})
    ours, theirs = (np.max(np.abs(directions(f(1.0, **given), g) / truth - 1)) for f in both(name))
    assert ours <= 1e-6
    if b2 == 0.99999:
        assert theirs > 5e-4  # the defect that this is about


@pytest.mark.parametrize("b2", [0.999, 0.99999])
def test_radam_rectifies_accurately_at_large_b2(b2):
    g = float32_gradients(2500)
    truth = exact(reference.radam, g, b2=b2)
    ours, theirs = (
        np.abs(directions(f(1.0, b2=b2), g) - truth) / (1 + np.abs(truth)) for f in both("radam")
    )
    assert np.max(ours) <= 1e-5
    if b2 >= 0.9999:
        assert np.max(theirs) > 1e-3


# Known differences, which a "fix" of either library would remove


@pytest.mark.parametrize(
    "name, given",
    [("amsgrad", {"max_of": "raw"}), ("nadam", {"momentum_decay": 0.004})],
)
def test_forms_of_pytorch_differ_from_optax(name, given):
    """Forms of PyTorch and Keras that Optax doesn't have."""
    ours, theirs = both(name)
    with jax.enable_x64(True):
        params, gradients = trees(30)
        a, b = (run(tx, params, gradients)[0] for tx in (ours(1.0, **given), theirs(1.0)))
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a, b))) > 0.01

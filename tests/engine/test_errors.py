"""Every error names the function, the argument or leaf, its value, what is allowed, and the fix.

Each row has a call, its exception, and parts that the message must contain.
"""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj
from adam_jax import positive, rule, signed
from helpers import says

W, B = jnp.ones((2, 3)), jnp.ones(3)
PARAMS = {"w": W, "b": B}
FLAGS = {"w": True, "b": False}
NAN = float("nan")


def step(tx, grads=PARAMS, params=PARAMS, made_for=PARAMS):
    return tx.update(grads, tx.init(made_for), params)


def row(name, act, error, *parts):
    return pytest.param(act, error, parts, id=name)


def expect(act, error, parts):
    with pytest.raises(error, match=says(*parts)) as caught:
        act()
    assert isinstance(error, tuple) or caught.type is error


# Hyperparameters


@rule(mu=signed)
def mine(g, mu, *, gain, b1=0.9):
    mu = aj.ema(b1, mu, g)
    return gain * mu, mu


RANGES = [
    (aj.adamw, (1e-3,), {"b1": 1.5}, "b1", "[0, 1)", "1.5"),
    (aj.adam, (1e-3,), {"b1": -0.1}, "b1", "[0, 1)", "-0.1"),
    (aj.nadamw, (1e-3,), {"b2": 1.0}, "b2", "[0, 1)", "1.0"),
    (aj.nadam, (1e-3,), {"b2": NAN}, "b2", "[0, 1)", "nan"),
    (aj.amsgrad, (1e-3,), {"b2": np.float32(1.5)}, "b2", "[0, 1)", "1.5"),
    (aj.rmsprop, (1e-3,), {"decay": 1.5}, "decay", "[0, 1]", "1.5"),
    (aj.rmsprop, (1e-3,), {"momentum": 2.0}, "momentum", "[0, 1]", "2.0"),
    (aj.sgd, (1e-3, 1.5), {}, "momentum", "[0, 1]", "1.5"),
    (aj.trace, (1.5,), {}, "decay", "[0, 1]", "1.5"),
    (aj.adamax, (1e-3,), {"eps": -1}, "eps", ">= 0", "finite", "-1"),
    (aj.scale_by_adam, (), {"eps_root": -1e-8}, "eps_root", ">= 0", "finite", "-1e-08"),
    (aj.sgd, (-1,), {}, "learning_rate", ">= 0", "finite", "-1"),
    (aj.adam, (NAN,), {}, "learning_rate", ">= 0", "finite", "nan"),
    (aj.adamaxw, (1e-3,), {"weight_decay": -1}, "weight_decay", ">= 0", "finite", "-1"),
    (aj.nadam, (1e-3,), {"momentum_decay": -1}, "momentum_decay", ">= 0", "finite", "-1"),
    (aj.radam, (1e-3,), {"threshold": 3}, "threshold", ">= 4", "finite", "3"),
    (aj.scale_by_rms, (), {"initial_scale": -1}, "initial_scale", ">= 0", "finite", "-1"),
]
RANGES_OF_A_RULE = [
    (aj.from_rule, (mine, 1e-3), {"gain": 1, "b1": 1.5}, "b1", "[0, 1)", "1.5"),
    (aj.from_rule, (mine, -1), {"gain": 1}, "learning_rate", ">= 0", "finite", "-1"),
    (aj.from_rule, (mine, 1), {"gain": 1, "weight_decay": -1}, "weight_decay", ">= 0", "-1"),
    (aj.scale_by_rule, (mine,), {"gain": 1, "b1": 2}, "b1", "[0, 1)", "2"),
]


@pytest.mark.parametrize(
    "make, args, given, parts",
    [
        *(pytest.param(make, *rest[:2], (make.__name__, *rest[2:])) for make, *rest in RANGES),
        *(pytest.param(make, *rest[:2], ("mine", *rest[2:])) for make, *rest in RANGES_OF_A_RULE),
    ],
)
def test_a_number_out_of_range_is_an_error(make, args, given, parts):
    expect(lambda: make(*args, **given), ValueError, parts)


def not_a_number(name, act, value):
    function, argument = name.split(": ")
    return row(
        name, act, TypeError, function, argument, value, "number", "scalar array", "schedule"
    )


HYPERPARAMS = [
    not_a_number("adamw: b1", lambda: aj.adamw(1e-3, b1="0.9"), "'0.9'"),
    not_a_number("adam: learning_rate", lambda: aj.adam([1e-3]), "[0.001]"),
    not_a_number("radam: b1", lambda: aj.radam(1e-3, b1=0.5j), "0.5j"),
    not_a_number("adamax: b1", lambda: aj.adamax(1e-3, b1=None), "None"),
    not_a_number("adam: learning_rate", lambda: aj.adam(float), "<class 'float'>"),
    not_a_number("adam: learning_rate", lambda: aj.adam(np.array("a")), "array('a', dtype='<U1')"),
    row(
        "vector",
        lambda: aj.adamw(jnp.ones(3)),
        ValueError,
        "adamw",
        "learning_rate",
        "scalar",
        "(3,)",
        "adam_jax.groups",
        "jax.vmap",
    ),
    row(
        "unknown",
        lambda: aj.from_rule(mine, 1e-3, gain=1.0, b3=0.9),
        TypeError,
        "mine",
        "'b3'",
        "gain, b1",
    ),
    row("missing", lambda: aj.from_rule(mine, 1e-3), TypeError, "mine", "'gain'", "gain="),
    row(
        "missing from a direction",
        lambda: aj.scale_by_rule(mine),
        TypeError,
        "mine",
        "'gain'",
        "gain=",
    ),
    row(
        "eps_hat with eps_root",
        lambda: aj.adamw(1e-3, eps_hat=True, eps_root=1e-8),
        ValueError,
        "adamw",
        "eps_hat=True",
        "eps_root=1e-08",
        "nesterov=False",
        "leave out",
    ),
    row(
        "eps_hat with nesterov",
        lambda: aj.scale_by_adam(eps_hat=True, nesterov=True),
        ValueError,
        "scale_by_adam",
        "eps_hat=True",
        "eps_root=0.0",
        "nesterov=True",
        "leave out",
    ),
    row(
        "schedule without a step count",
        lambda: aj.rmsprop(1e-3, decay=lambda count: 0.9),
        ValueError,
        "rmsprop",
        "decay",
        "schedule",
        "ScaleByRmsState",
        "step count",
        "optax.inject_hyperparams",
    ),
    row(
        "schedule of a start",
        lambda: aj.rmsprop(1e-3, initial_scale=lambda count: 1.0, bias_correction=True),
        ValueError,
        "rmsprop",
        "initial_scale",
        "schedule",
        "init",
        "number",
    ),
    row(
        "schedule of vectors",
        lambda: step(aj.adamw(lambda count: jnp.ones(3))),
        TypeError,
        "adamw",
        "schedule",
        "learning_rate",
        "scalar",
        "(3,)",
    ),
    row(
        "schedule of nothing",
        lambda: step(aj.adam(1e-3, b2=lambda count: None)),
        TypeError,
        "adam",
        "schedule",
        "b2",
        "scalar",
        "None",
    ),
]


@pytest.mark.parametrize("act, error, parts", HYPERPARAMS)
def test_a_wrong_hyperparameter_is_an_error(act, error, parts):
    expect(act, error, parts)


def test_traced_values_are_not_validated():
    """Values under inject_hyperparams and vmap are unknown while tracing."""
    made = jax.jit(lambda b1, eps: step(aj.adamw(1e-3, b1=b1, eps=eps))[0])(1.5, -1.0)
    chex.assert_trees_all_equal_shapes(made, PARAMS)
    injected = optax.inject_hyperparams(aj.adam)(1e-3, eps_hat=True)  # eps_root is traced too
    jax.jit(injected.update)(PARAMS, injected.init(PARAMS))


# Choices, storage, masks


FORMAT = ("storage", "'float32'", "'bfloat16'", "'int8'", "'float64'", "complex", "(path, leaf)")
MOMENT_DTYPES = ("float32", "bfloat16", "float64", "complex", "storage=")


def no_format(name, act, function, value):
    return row(name, act, ValueError, function, *FORMAT, value)


CHOICES = [
    row(
        "weight_decay_form",
        lambda: aj.adamw(1e-3, weight_decay_form="L2"),
        ValueError,
        "adamw",
        "weight_decay_form",
        "'decoupled'",
        "'l2'",
        "'L2'",
    ),
    row(
        "weight_decay_form of a rule",
        lambda: aj.from_rule(mine, 1e-3, gain=1.0, weight_decay_form=None),
        ValueError,
        "mine",
        "weight_decay_form",
        "'decoupled'",
        "'l2'",
        "None",
    ),
    row(
        "implementation",
        lambda: aj.adamw(1e-3, implementation="cuda"),
        ValueError,
        "adamw",
        "implementation",
        "'auto'",
        "'xla'",
        "'cuda'",
    ),
    row(
        "implementation of a direction",
        lambda: aj.scale_by_rms(implementation=np.ones(2)),
        ValueError,
        "scale_by_rms",
        "implementation",
        "'auto'",
        "array([1., 1.])",
    ),
    row(
        "max_of",
        lambda: aj.amsgrad(1e-3, max_of="paper"),
        ValueError,
        "amsgrad",
        "max_of",
        "'corrected'",
        "'raw'",
        "'paper'",
    ),
    row(
        "correction",
        lambda: aj.nadamw(1e-3, correction="paper"),
        ValueError,
        "nadamw",
        "correction",
        "'optax'",
        "'algoperf'",
        "'paper'",
    ),
    row(
        "correction of a scheduled momentum",
        lambda: aj.nadam(1e-3, momentum_decay=0.004, correction="algoperf"),
        ValueError,
        "nadam",
        "correction",
        "'optax'",
        "momentum_decay=0.004",
        "'algoperf'",
    ),
    no_format("format", lambda: aj.adamw(1e-3, storage="fp8"), "adamw", "'fp8'"),
    no_format("number", lambda: aj.adam(1e-3, storage=17), "adam", "17"),
    no_format(
        "integer format",
        lambda: aj.scale_by_adam(storage=jnp.int16),
        "scale_by_adam",
        repr(jnp.int16),
    ),
    no_format("class", lambda: aj.adam(1e-3, storage=dict), "adam", "<class 'dict'>"),
    no_format(
        "format in a mapping",
        lambda: aj.from_rule(mine, 1e-3, gain=1.0, storage={"mu": "fp8"}),
        "mine",
        "'fp8'",
    ),
    no_format(
        "mapping in a mapping",
        lambda: aj.adam(1e-3, storage={"mu": {"mu": "bfloat16"}}),
        "adam",
        "{'mu': 'bfloat16'}",
    ),
    no_format(
        "function in a mapping",
        lambda: aj.adam(1e-3, storage={"mu": lambda path, leaf: "bfloat16"}),
        "adam",
        "<function",
    ),
    no_format(
        "format from a function",
        lambda: aj.adam(1e-3, storage=lambda path, leaf: "fp8").init(PARAMS),
        "adam",
        "'fp8'",
    ),
    row(
        "moment in a mapping",
        lambda: aj.adamw(1e-3, storage={"nu_max": "bfloat16"}),
        ValueError,
        "adamw",
        "storage",
        "'nu_max'",
        "mu, nu",
    ),
    *(
        row(
            f"mu_dtype {dtype}",
            lambda dtype=dtype: aj.adamw(1e-3, mu_dtype=dtype),
            ValueError,
            "adamw",
            "mu_dtype",
            repr(dtype),
            *MOMENT_DTYPES,
        )
        for dtype in ("int8", jnp.int32, "fp8", 17)
    ),
    row(
        "accumulator_dtype",
        lambda: aj.sgd(1e-3, 0.9, accumulator_dtype="int8"),
        ValueError,
        "sgd",
        "accumulator_dtype",
        "'int8'",
        *MOMENT_DTYPES,
    ),
    row(
        "mu_dtype and storage",
        lambda: aj.adamw(1e-3, mu_dtype=jnp.float32, storage="bfloat16"),
        ValueError,
        "adamw",
        "mu_dtype=float32",
        "storage='bfloat16'",
        "storage={'mu': 'float32', ...}",
    ),
    row(
        "mu_dtype and a mapping",
        lambda: aj.amsgrad(1e-3, mu_dtype="float32", storage={"mu": "bfloat16"}),
        ValueError,
        "amsgrad",
        "mu_dtype=float32",
        "storage={'mu': 'bfloat16'}",
        "storage={'mu': 'float32', ...}",
    ),
    row(
        "mu_dtype and a function",
        lambda: aj.adam(1e-3, mu_dtype="float32", storage=lambda path, leaf: None),
        ValueError,
        "adam",
        "mu_dtype=float32",
        "storage=<function",
        "storage={'mu': 'float32', ...}",
    ),
    no_format(
        "mu_dtype and no format",
        lambda: aj.adam(1e-3, mu_dtype="float32", storage="fp8"),
        "adam",
        "'fp8'",
    ),
    row(
        "accumulator_dtype and storage",
        lambda: aj.trace(0.9, accumulator_dtype="float32", storage="bfloat16"),
        ValueError,
        "trace",
        "accumulator_dtype=float32",
        "storage='bfloat16'",
        "storage={'trace': 'float32', ...}",
    ),
    row(
        "both masks",
        lambda: aj.adamw(1e-3, mask=FLAGS, weight_decay_mask=aj.matching("w")),
        ValueError,
        "adamw",
        "mask",
        "weight_decay_mask",
        "one of them",
    ),
    *(
        row(
            f"{f.__name__} {pattern!r}",
            lambda f=f, pattern=pattern: f("w", pattern),
            ValueError,
            f.__name__,
            repr(pattern),
            "regular expression",
            "separate strings",
            "re.escape",
        )
        for f in (aj.matching, aj.not_matching)
        for pattern in ("(", 3, ["w"])
    ),
]


@pytest.mark.parametrize("act, error, parts", CHOICES)
def test_a_wrong_storage_mask_or_choice_is_an_error(act, error, parts):
    expect(act, error, parts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: aj.adamw(1e-3, mu_dtype="bfloat16", storage="bfloat16"),
        lambda: aj.adamw(1e-3, mu_dtype=jnp.bfloat16, storage={"nu": "float32"}),
        lambda: aj.adamw(1e-3, storage={"nu": None}),
        lambda: aj.sgd(1e-3, storage="bfloat16", accumulator_dtype="bfloat16"),
        lambda: aj.adamw(1e-3, mask=None, weight_decay_mask=FLAGS),
        lambda: aj.radam(1e-3, threshold=4.0),
        lambda: aj.adamw(0.0, 0.0, 0.0, 0.0, 0.0, weight_decay=None),
    ],
)
def test_arguments_that_agree_are_no_error(make):
    jax.eval_shape(lambda: step(make()))


# Gradients, parameters, and state

KEEP_OUT = ("optax.masked", "optax.partition", "float")
TREE = ("structures", "init")
MADE = "(ScaleByAdamState, EmptyState, EmptyState)"
SAME = "init"
CALL = "update(gradients, state, params)"
ADAMW = aj.adamw(1e-3)
COMPLEX = {"w": jnp.ones(2, jnp.complex64)}


def with_leaf(leaf):
    return {"w": W, "n": {"x": leaf}}


LEAVES = [
    ("integer", jnp.arange(3), "int32"),
    ("bool", jnp.array([True]), "bool"),
    ("key", jax.random.key(0), "PRNG key"),
    ("string", "text", "str"),
    ("object", object(), "object"),
]


@pytest.mark.parametrize("leaf, kind", [x[1:] for x in LEAVES], ids=[x[0] for x in LEAVES])
def test_a_leaf_that_cannot_be_differentiated_is_an_error(leaf, kind):
    floats, other = with_leaf(B), with_leaf(leaf)
    parts = "adamw", "parameter", "'n/x'", kind, *KEEP_OUT
    expect(lambda: ADAMW.init(other), TypeError, parts)
    state = ADAMW.init(floats)
    parts = "adamw", "gradient", "'n/x'", kind, *KEEP_OUT
    expect(lambda: ADAMW.update(other, state, floats), TypeError, parts)


UPDATES = [
    row(
        "integer parameter without a path",
        lambda: ADAMW.init(jnp.arange(3)),
        TypeError,
        "adamw",
        "parameter",
        "int32",
        *KEEP_OUT,
    ),
    row(
        "shape of a gradient",
        lambda: step(ADAMW, grads={"w": jnp.ones((1, 3)), "b": B}),
        ValueError,
        "adamw",
        "gradient",
        "'w'",
        "(1, 3)",
        "mu",
        "(2, 3)",
        "shape",
    ),
    row(
        "shape of a gradient without a path",
        lambda: step(aj.sgd(1e-3, 0.9), B, B, W),
        ValueError,
        "sgd",
        "gradient",
        "(3,)",
        "trace",
        "(2, 3)",
        "shape",
    ),
    row(
        "shape of a parameter",
        lambda: step(ADAMW, params={"w": W, "b": jnp.ones(1)}),
        ValueError,
        "adamw",
        "gradient",
        "'b'",
        "(3,)",
        "parameter",
        "(1,)",
        "shape",
    ),
    row(
        "missing gradient",
        lambda: step(ADAMW, grads={"w": W}),
        ValueError,
        "adamw",
        "gradients",
        "state",
        "without a gradient",
        ": b",
        *TREE,
    ),
    row(
        "extra gradient",
        lambda: step(ADAMW, grads={**PARAMS, "c": B}),
        ValueError,
        "adamw",
        "gradients",
        "not in the state",
        ": c",
        *TREE,
    ),
    row(
        "missing parameter",
        lambda: step(ADAMW, params={"w": W}),
        ValueError,
        "adamw",
        "gradients",
        "not in the parameters",
        ": b",
        *TREE,
    ),
    row(
        "extra parameter",
        lambda: step(ADAMW, params={**PARAMS, "c": {"d": B}}),
        ValueError,
        "adamw",
        "parameters",
        "without a gradient",
        ": c/d",
        *TREE,
    ),
    row(
        "one array for the parameters",
        lambda: step(ADAMW, params=W),
        ValueError,
        "adamw",
        "without a gradient",
        ": one array",
        "not in the parameters",
        ": b, w",
        *TREE,
    ),
    row(
        "tuple for a list",
        lambda: step(ADAMW, (W, B), [W, B], [W, B]),
        ValueError,
        "adamw",
        "gradients",
        "state",
        "PyTreeDef((*, *))",
        "PyTreeDef([*, *])",
        *TREE,
    ),
    row(
        "dict for an array, parameter",
        lambda: step(ADAMW, params={"w": {"x": W}, "b": B}),
        ValueError,
        "adamw",
        "gradient",
        "'w'",
        "one array",
        "parameter",
        "dict",
        TREE[-1],
    ),
    row(
        "dict for an array, state",
        lambda: step(ADAMW, made_for={"w": {"x": W}, "b": B}),
        ValueError,
        "adamw",
        "gradient",
        "'w'",
        "one array",
        "mu",
        "dict",
        TREE[-1],
    ),
    row(
        "gradient for what was None",
        lambda: step(ADAMW, made_for={"w": None, "b": B}),
        ValueError,
        "adamw",
        "'w'",
        "mu",
        "None",
        "init",
    ),
    *(
        row(
            f"no parameters, {form}",
            lambda form=form: step(
                aj.adam(1e-3, weight_decay=0.1, weight_decay_form=form), params=None
            ),
            ValueError,
            "adam",
            "weight_decay",
            "'b'",
            CALL,
        )
        for form in ("decoupled", "independent", "cautious", "l2")
    ),
    row(
        "one parameter is None",
        lambda: step(ADAMW, params={"w": None, "b": B}),
        ValueError,
        "adamw",
        "weight_decay",
        "'w'",
        CALL,
    ),
    row(
        "state of another optimizer",
        lambda: ADAMW.update(PARAMS, aj.amsgrad(1e-3, weight_decay=0.1).init(PARAMS), PARAMS),
        ValueError,
        "adamw",
        "state",
        "(ScaleByAmsgradState, EmptyState, EmptyState)",
        MADE,
        SAME,
    ),
    row(
        "state of the direction",
        lambda: ADAMW.update(PARAMS, aj.scale_by_adam().init(PARAMS), PARAMS),
        ValueError,
        "adamw",
        "ScaleByAdamState, ",
        MADE,
        SAME,
    ),
    row(
        "state of an optimizer for the direction",
        lambda: aj.scale_by_adam().update(PARAMS, ADAMW.init(PARAMS)),
        ValueError,
        "scale_by_adam",
        MADE,
        "ScaleByAdamState",
        SAME,
    ),
    row(
        "parameters for the state",
        lambda: ADAMW.update(PARAMS, PARAMS, ADAMW.init(PARAMS)),
        ValueError,
        "adamw",
        "dict",
        MADE,
        SAME,
    ),
    row(
        "gradient of another shape, Schedule-Free",
        lambda: step(aj.schedule_free_adamw(1e-3), {"w": jnp.ones(2)}, *[{"w": jnp.ones(3)}] * 2),
        ValueError,
        "schedule_free_adamw",
        "gradient",
        "'w'",
        "(2,)",
        "nu",
        "(3,)",
        "shape",
    ),
    row(
        "real mu of a complex leaf",
        lambda: step(aj.adam(1e-3, mu_dtype="float32"), *[COMPLEX] * 3),
        ValueError,
        "adam",
        "mu",
        "'w'",
        "float32",
        "complex dtype",
    ),
    row(
        "no moments",
        lambda: aj.moments(aj.sgd(1e-3).init(PARAMS)),
        ValueError,
        "moments",
        "state",
        "no moments",
        "state[0]",
    ),
    row(
        "moments of several",
        lambda: aj.moments(aj.chain(aj.scale_by_adam(), ADAMW).init(PARAMS)),
        ValueError,
        "moments",
        "0/mu, 1/0/mu, 0/nu, 1/0/nu",
        "state[0]",
    ),
    row(
        "no step count",
        lambda: aj.step_count(aj.sgd(1e-3, 0.9).init(PARAMS)),
        ValueError,
        "step_count",
        "state",
        "sgd",
        "training loop",
        "optax.inject_hyperparams",
    ),
]


@pytest.mark.parametrize("act, error, parts", UPDATES)
def test_wrong_gradients_parameters_or_states_are_errors(act, error, parts):
    expect(act, error, parts)


def test_an_error_in_a_chain_names_the_function_that_the_user_called():
    """Raise under jit, while tracing."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), aj.nadamw(1e-3))
    act = jax.jit(lambda: step(tx, grads={"w": jnp.ones((1, 3)), "b": B}))
    expect(act, ValueError, ("nadamw", "'w'", "(1, 3)"))


def test_an_error_changes_no_state():
    state = ADAMW.init(PARAMS)
    before = jax.tree.map(jnp.copy, state)
    for wrong in ({"w": W}, {"w": W, "b": jnp.ones(1)}, {"w": W, "b": jnp.arange(3)}):
        with pytest.raises((TypeError, ValueError), match="adamw"):
            ADAMW.update(wrong, state, PARAMS)
    chex.assert_trees_all_equal(state, before)
    chex.assert_trees_all_equal(ADAMW.update(PARAMS, state, PARAMS), step(aj.adamw(1e-3)))
    with pytest.raises(ValueError, match=says("sgd")):  # not the name of the error before
        aj.sgd(-1.0)


# Rules


def declared(moments, returned, **more):
    """Return an optimizer whose rule has these moments and returns returned(g)."""

    def homemade(g, mu):
        return returned(g)

    def momentless(g):
        return returned(g)

    return aj.from_rule(rule(**moments, **more)(homemade if moments else momentless), 1e-3)


MU = {"mu": signed}


def swapped(g, nu, mu): ...


def without(g): ...


ORDER = "rule swapped", "(mu, nu)", "(nu, mu)", "order"
RULES = [
    row("declared order", lambda: rule(mu=signed, nu=positive)(swapped), TypeError, *ORDER),
    row(
        "declared but not taken",
        lambda: rule(mu=signed)(without),
        TypeError,
        "rule without",
        "(mu)",
        "()",
    ),
    row(
        "too many moments",
        lambda: step(declared(MU, lambda g: (g, g, g))),
        ValueError,
        "rule homemade",
        "(direction, mu)",
        "3",
    ),
    *(
        row(name, act, ValueError, "rule homemade", result, "(3,)", "float32", *got)
        for name, act, result, *got in (
            ("a moment's shape", lambda: step(declared(MU, lambda g: (g, g.sum()))), "mu", "()"),
            (
                "a moment's dtype",
                lambda: step(declared(MU, lambda g: (g, g.astype(jnp.bfloat16)))),
                "mu",
                "bfloat16",
            ),
            ("a number for a moment", lambda: step(declared(MU, lambda g: (g, 0.0))), "mu", "0.0"),
            (
                "the direction's shape",
                lambda: step(declared(MU, lambda g: (g.sum(), g))),
                "direction",
                "()",
            ),
            ("no direction", lambda: step(declared(MU, lambda g: (None, g))), "direction", "None"),
        )
    ),
    row(
        "moments that were not declared",
        lambda: step(declared({}, lambda g: (g, g))),
        ValueError,
        "rule momentless",
        "direction",
        "(3,)",
        "float32",
    ),
]


@pytest.mark.parametrize("act, error, parts", RULES)
def test_a_wrong_rule_is_an_error(act, error, parts):
    expect(act, error, parts)


# Calls, declarations and masks

EITHER = TypeError, ValueError
CALLS = [
    ("no learning rate", lambda: aj.adamw(), TypeError, "adamw", "learning_rate"),
    ("misspelled", lambda: aj.adamw(1e-3, beta1=0.9), TypeError, "adamw", "beta1"),
    ("not a rule", lambda: aj.from_rule(aj.adam, 1e-3), TypeError, "from_rule", "rule"),
    ("not a rule at all", lambda: aj.scale_by_rule("adam"), TypeError, "scale_by_rule", "'adam'"),
    ("not a moment", lambda: rule(mu=3)(lambda g, mu: (g, mu)), TypeError, "rule", "mu", "signed"),
    ("a moment called count", lambda: step(counting()), EITHER, "rule", "count"),
    ("decay of None", lambda: aj.trace(None), TypeError, "trace", "decay", "number", "None"),
    (
        "schedule of momentum",
        lambda: aj.sgd(1e-3, momentum=lambda count: 0.9),
        ValueError,
        "sgd",
        "momentum",
        "schedule",
    ),
    (
        "state without a mask",
        lambda: aj.adamw(1e-3, mask=FLAGS).update(PARAMS, ADAMW.init(PARAMS), PARAMS),
        ValueError,
        "adamw",
        MADE,
        SAME,
    ),
    (
        "state with a mask",
        lambda: ADAMW.update(PARAMS, aj.adamw(1e-3, mask=FLAGS).init(PARAMS), PARAMS),
        ValueError,
        "adamw",
        MADE,
        SAME,
    ),
    (
        "structure of a mask",
        lambda: step(aj.adamw(1e-3, mask={"w": True})),
        ValueError,
        "adamw",
        "mask",
    ),
    *(
        (
            f"function of a path as {make.__name__}'s mask",
            lambda make=make: step(make(1e-3, mask=lambda path, leaf: True)),
            TypeError,
            make.__name__,
            "mask",
            "one argument",
            "not_matching('bias')",
        )
        for make in (aj.adamw, aj.adamh)
    ),
    (
        "unknown argument",
        lambda: aj.adamw(lr=1e-3),
        TypeError,
        "adamw",
        "'lr'",
        "learning_rate",
    ),
    (
        "name for a mask",
        lambda: step(aj.adamw(1e-3, mask="bias")),
        TypeError,
        "adamw",
        "mask",
        "'bias'",
    ),
    ("no tuple", lambda: step(declared(MU, lambda g: g)), EITHER, "rule homemade", "tuple"),
    (
        "nothing",
        lambda: step(declared(MU, lambda g: None)),
        EITHER,
        "rule homemade",
        "(direction, mu)",
    ),
    (
        "a factor, which is no moment",
        lambda: step(declared(MU, lambda g: (g, g), factor=lambda share: share)),
        EITHER,
        "rule homemade",
        "factor",
    ),
]


def counting():
    def homemade(g, count):
        return g, count

    return aj.from_rule(rule(count=signed)(homemade), 1e-3)


@pytest.mark.parametrize("act, error, parts", [row(*call) for call in CALLS])
def test_a_wrong_call_declaration_or_mask_is_an_error(act, error, parts):
    expect(act, error, parts)


def layers(count):
    return {"outer": {"w": jnp.ones((2, 3))}, "layers": {"k": jnp.ones((count, 3))}}


RELEASE = aj.gradient_release(
    aj.adam(1e-3),
    first=lambda outer, batch: batch @ outer["w"],
    layer=lambda layer, h: h + layer["k"][None],
    last=lambda outer, h, batch: jnp.mean(h),
)
OTHER = ADAMW.init(PARAMS)
MISUSES = [
    *(
        (
            f"state of another optimizer in {name}",
            lambda tx=tx: tx.update(PARAMS, OTHER, PARAMS),
            ValueError,
            name,
            expected,
            "ScaleByAdamState",
            "convert_state(state, tx, params)",
        )
        for name, tx, expected in (
            ("master_weights", aj.master_weights(ADAMW), "MasterWeightsState"),
            ("stochastic_rounding", aj.stochastic_rounding(ADAMW), "StochasticRoundingState"),
            ("tunable", aj.tunable(aj.adamw)(1e-3), "TunableState"),
            ("schedule_free_adamw", aj.schedule_free_adamw(1e-3), "ScheduleFreeState"),
            ("record", aj.diagnostics.record(ADAMW), "RecordState"),
            ("clip_to_previous_norm", aj.clip_to_previous_norm(1.0), "PreviousNormState"),
        )
    ),
    (
        "state of another optimizer in gradient_release",
        lambda: RELEASE(layers(3), OTHER, jnp.ones((1, 2))),
        ValueError,
        "gradient_release",
        "GradientReleaseState",
    ),
    (
        "state of another number of layers",
        lambda: RELEASE(layers(4), RELEASE.init(layers(3)), jnp.ones((1, 2))),
        ValueError,
        "gradient_release",
        "4",
        "3",
        "step.init(params)",
    ),
    ("no gradients", lambda: aj.apply(ADAMW, None, OTHER, PARAMS), ValueError, "apply", "grads"),
    (
        "no parameters",
        lambda: aj.apply(optax.adamw(1e-3), PARAMS, OTHER, None),
        ValueError,
        "apply",
        "params",
    ),
    (
        "the label of other leaves as a pattern",
        lambda: aj.groups(aj.adamw, {"default": {}}, learning_rate=1e-3),
        ValueError,
        "groups",
        "'default'",
        "'(default)'",
    ),
    (
        "a group that isn't there",
        lambda: aj.get_hyperparams(aj.tunable(aj.adamw)(1e-3).init(PARAMS), group="x"),
        ValueError,
        "get_hyperparams",
        "'x'",
    ),
    (
        "a mask function that returns nothing",
        lambda: step(aj.adamw(1e-3, mask=lambda tree: None)),
        TypeError,
        "adamw",
        "mask",
        "None",
    ),
    (
        "another variant's moments",
        lambda: aj.convert_state(OTHER, aj.lion(1e-3), PARAMS),
        ValueError,
        "convert_state",
        "the state has mu, nu",
    ),
    (
        "one path for a storage function",
        lambda: aj.rmsprop(1e-3, centered=True, storage=lambda path: "int8"),
        TypeError,
        "rmsprop",
        "storage",
    ),
    (
        "no second decay rate",
        lambda: aj.prodigy(betas=(0.9, None)),
        TypeError,
        "prodigy",
        "betas[1]",
    ),
    (
        "an optimizer as a direction",
        lambda: aj.hyperball(ADAMW, 1e-3),
        ValueError,
        "hyperball",
        "direction",
        "hyperball(adam_jax.scale_by_adam(), 1e-3)",
    ),
]


@pytest.mark.parametrize("act, error, parts", [row(*misuse) for misuse in MISUSES])
def test_a_misuse_of_states_groups_or_wrappers_is_an_error(act, error, parts):
    expect(act, error, parts)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint32])
def test_a_seed_may_be_a_numpy_integer(dtype):
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    make = functools.partial(aj.stochastic_rounding, ADAMW)
    steps = [step(make(seed), params, params, params) for seed in (5, dtype(5))]
    chex.assert_trees_all_equal(*steps)


def test_a_mask_may_wrap_a_function_of_more_arguments():
    def longer_than(tree, length):
        return jax.tree.map(lambda x: x.size > length, tree)

    @functools.wraps(longer_than)
    def mask(tree):
        return longer_than(tree, 1)

    step(aj.adamw(1e-3, mask=mask))


def test_rmsprop_stores_its_trace_as_requested():
    state = aj.rmsprop(1e-3, momentum=0.9, storage={"trace": "bfloat16"}).init(PARAMS)
    assert optax.tree_utils.tree_get(state, "trace")["w"].dtype == jnp.bfloat16


# Misuse of functions that take a transformation, a constructor, a schedule, or a mapping

CLIP = optax.clip_by_global_norm(1.0)
MESH = jax.sharding.AbstractMesh((1,), ("data",))
COUNTED = {"learning_rate": 1e-3}


def wrong(act, *parts, error=TypeError):
    """Return a row with the function and the argument as its id."""
    return row(" ".join(parts[:3]), act, error, *parts)


CALL_IT = "adamw(1e-3)"
WRAPPERS = {
    "chain": lambda tx: aj.chain(CLIP, tx),
    "master_weights": aj.master_weights,
    "stochastic_rounding": aj.stochastic_rounding,
    "zero1": lambda tx: aj.zero1(tx, MESH),
    "state_sharding": lambda tx: aj.state_sharding(tx, PARAMS),
    "record": aj.diagnostics.record,
    "cautious": aj.cautious,
    "grams": aj.grams,
    "mars": aj.mars,
    "apply": lambda tx: aj.apply(tx, PARAMS, (), PARAMS),
    "memory_report": lambda tx: aj.memory_report(tx, PARAMS),
    "convert_state": lambda tx: aj.convert_state((), tx, PARAMS),
    "from_torch": lambda tx: aj.interop.from_torch(EMPTY, tx, PARAMS),
}
EMPTY = {"state": {}, "param_groups": []}


class Model:
    """An object that is callable, but no constructor."""

    def __call__(self, x):
        return x


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_constructor_in_place_of_a_transformation_is_an_error(name):
    argument = "argument 2" if name == "chain" else "tx"
    for given, got, fix in (
        (aj.adamw, "adamw", CALL_IT),
        (0.5, "0.5", f"{name}("),
        (None, "None", f"{name}("),
        (PARAMS, "dict", f"{name}("),
        (Model(), "Model", f"{name}("),
        ([CLIP, ADAMW], "list", "adam_jax.chain("),
    ):
        expect(
            lambda given=given: WRAPPERS[name](given),
            TypeError,
            (name, argument, "Optax transformation", got, fix),
        )


class Duck:
    """A transformation of another library, with Optax's two functions but not its class."""

    def init(self, params):
        return optax.EmptyState()

    def update(self, updates, state, params=None, **extra):
        return jax.tree.map(lambda g: -g, updates), state


def test_anything_with_init_and_update_is_a_transformation():
    duck = Duck()
    wrappers = aj.chain, aj.master_weights, aj.stochastic_rounding, aj.diagnostics.record, aj.mars
    for tx in (duck, *(wrap(duck) for wrap in wrappers)):
        params, _ = aj.apply(tx, PARAMS, tx.init(PARAMS), PARAMS)
        assert params["w"][0, 0] < 1
        assert aj.memory_report(tx, PARAMS).state_bytes >= 0
    frozen = aj.groups(aj.adamw, {"w": duck}, learning_rate=1e-3)
    assert step(frozen)[0]["w"][0, 0] == -1


UPDATED = {
    **{name: wrap for name, wrap in WRAPPERS.items() if name in ("chain", "record", "mars")},
    "master_weights": aj.master_weights,
    "stochastic_rounding": aj.stochastic_rounding,
    "cautious": lambda tx: aj.cautious(aj.scale_by_adam()),
    "tunable": lambda tx: aj.tunable(aj.adamw)(1e-3),
    "groups": lambda tx: aj.groups(aj.adamw, {}, learning_rate=1e-3),
    "schedule_free_adamw": lambda tx: aj.schedule_free_adamw(1e-3),
}


@pytest.mark.parametrize("name", UPDATED)
def test_update_without_a_state_is_an_error(name):
    tx = UPDATED[name](aj.adamw(1e-3))
    parts = name, "state", CALL
    expect(lambda: tx.update(PARAMS), TypeError, parts)


def constant(value):
    return lambda count: value


FACTORY = "call the function"
STATIC = "optax.inject_hyperparams(adamw, static_args=('storage',))"
MISUSE = [
    wrong(
        lambda: aj.chain([CLIP, ADAMW]),
        "chain",
        "argument 1",
        "list",
        "adam_jax.chain(clip, adamw)",
    ),
    wrong(lambda: aj.chain(1.0, ADAMW), "chain", "argument 1", "1.0", "chain("),
    wrong(
        lambda: aj.memory_report(PARAMS, ADAMW),
        "memory_report",
        "tx",
        "dict",
        "memory_report(tx, params)",
    ),
    wrong(
        lambda: aj.convert_state(ADAMW, ADAMW.init(PARAMS), PARAMS),
        "convert_state",
        "tx",
        "tuple",
        "convert_state(state, tx, params)",
    ),
    wrong(
        lambda: aj.groups(ADAMW, {}, **COUNTED),
        "groups",
        "constructor",
        "function",
        "transformation",
        "groups(adam_jax.adamw, {...}, learning_rate=1e-3)",
    ),
    wrong(
        lambda: aj.groups(aj.adamw, ["bias"], **COUNTED),
        "groups",
        "patterns",
        "mapping",
        "['bias']",
        "{'bias': {'weight_decay': 0.0}}",
    ),
    wrong(
        lambda: aj.diagnostics.record(ADAMW, groups=["a"]),
        "record",
        "groups",
        "mapping",
        "['a']",
        "groups={'biases': 'bias'}",
    ),
    wrong(
        lambda: aj.tunable(ADAMW),
        "tunable",
        "constructor",
        "function",
        "transformation",
        "tunable(adam_jax.adamw)(1e-3)",
    ),
    wrong(lambda: aj.tunable("adamw"), "tunable", "constructor", "function", "'adamw'"),
    wrong(
        lambda: aj.zero1(ADAMW, 8),
        "zero1",
        "mesh",
        "jax.sharding.Mesh",
        "8",
        "jax.make_mesh((jax.device_count(),), ('data',))",
    ),
    wrong(lambda: aj.zero1(ADAMW, jax.devices()), "zero1", "mesh", "list"),
    wrong(
        lambda: aj.interop.from_torch(object(), ADAMW, PARAMS),
        "from_torch",
        "state_dict",
        "'state'",
        "'param_groups'",
        "object",
        "optimizer.state_dict()",
    ),
    wrong(
        lambda: aj.interop.from_torch({"layer.weight": 1}, ADAMW, PARAMS),
        "from_torch",
        "state_dict",
        "dict",
        "optimizer.state_dict()",
    ),
    wrong(
        lambda: aj.adamw(optax.cosine_decay_schedule),
        "adamw",
        "learning_rate",
        "cosine_decay_schedule",
        FACTORY,
    ),
    wrong(
        lambda: step(aj.adamw(optax.constant_schedule)),
        "adamw",
        "learning_rate",
        "scalar",
        "function",
        FACTORY,
    ),
    wrong(
        lambda: aj.adamw(lambda: 1e-3),
        "adamw",
        "learning_rate",
        "<lambda>",
        "lambda count: ...",
    ),
    wrong(
        lambda: aj.adamw(1e-3, weight_decay=lambda path, leaf: 0.1),
        "adamw",
        "weight_decay",
        "one argument",
        "lambda count: ...",
    ),
    wrong(
        lambda: aj.from_rule(mine, 1e-3, gain=lambda: 1.0),
        "mine",
        "gain",
        "one argument",
        "lambda count: ...",
    ),
    wrong(
        lambda: aj.adamw(1e-3, storage=lambda path: "int8"),
        "adamw",
        "storage",
        "two",
        "lambda path, leaf: ...",
    ),
    wrong(
        lambda: aj.schedule_free_adamw(1e-3, storage=lambda path: "int8"),
        "schedule_free_adamw",
        "storage",
        "lambda path, leaf: ...",
    ),
    *(
        wrong(
            lambda f=f: optax.inject_hyperparams(aj.adamw)(1e-3, storage=f).init(PARAMS),
            "adamw",
            "storage",
            "path",
            "leaf",
            "step count",
            STATIC,
        )
        for f in (lambda path, leaf: "int8", lambda path, leaf=None: "int8")
    ),
    *(
        wrong(
            lambda value=value: aj.set_hyperparams(
                aj.tunable(aj.adamw)(1e-3).init(PARAMS), learning_rate=value
            ),
            "set_hyperparams",
            "learning_rate",
            *allowed,
            f"{value}",
            error=error,
        )
        for value, error, *allowed in (
            (True, TypeError, "number", ">= 0", "finite"),
            (np.True_, TypeError, "number", ">= 0", "finite"),
            (float("inf"), ValueError, ">= 0", "finite"),
            (NAN, ValueError, ">= 0", "finite"),
        )
    ),
    *(
        wrong(
            lambda name=name: aj.adamw(**{"learning_rate": 1e-3, name: float("inf")}),
            "adamw",
            name,
            ">= 0",
            "finite",
            "inf",
            error=ValueError,
        )
        for name in ("learning_rate", "eps", "eps_root", "weight_decay")
    ),
    wrong(lambda: aj.adamw(1e-3, b1=np.inf), "adamw", "b1", "inf", error=ValueError),
    wrong(lambda: aj.adamw(True), "adamw", "learning_rate", "number", "True", "float"),
    wrong(
        lambda: aj.radam(1e-3, threshold=np.inf),
        "radam",
        "threshold",
        ">= 4",
        "finite",
        "inf",
        error=ValueError,
    ),
]


@pytest.mark.parametrize("act, error, parts", MISUSE)
def test_misuse_is_an_error_that_shows_the_fix(act, error, parts):
    expect(act, error, parts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: aj.adamw(optax.cosine_decay_schedule(1e-3, 10)),
        lambda: aj.adamw(lambda count, scale=1e-3: scale),
        lambda: aj.adamw(lambda *counts: 1e-3),
        lambda: aj.adamw(jax.jit(lambda count: 1e-3 * count)),
        lambda: aj.adamw(functools.partial(lambda rate, count: rate, 1e-3)),
        lambda: aj.adamw(1e-3, storage=lambda *leaf: None),
        lambda: optax.inject_hyperparams(aj.adamw, static_args=("storage",))(
            1e-3, storage=lambda path, leaf: "bfloat16"
        ),
        lambda: optax.inject_hyperparams(aj.adamw)(constant(1e-3), storage="bfloat16"),
        lambda: aj.tunable(aj.adamw)(1e-3, storage=lambda path, leaf: "bfloat16"),
        lambda: aj.tunable(functools.partial(aj.adamw, b1=0.5))(1e-3),
    ],
)
@pytest.mark.standard_promotion
def test_schedules_and_functions_that_fit_are_no_error(make):
    jax.eval_shape(lambda: step(make()))


# Formats that cannot hold a moment


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", jnp.float8_e5m2, jnp.float16])
def test_a_format_too_narrow_for_squares_is_an_error(dtype):
    works = "'float32'", "'bfloat16'", "'int8'"
    for storage in (dtype, {"nu": dtype}):
        expect(
            lambda storage=storage: aj.adamw(1e-3, storage=storage),
            ValueError,
            ("adamw", "storage", repr(dtype), *works),
        )
    chosen = aj.adamw(1e-3, storage=lambda path, leaf: dtype)
    expect(lambda: chosen.init(PARAMS), ValueError, ("adamw", repr(dtype), *works))
    for name, act in {
        "adamw: mu_dtype": lambda: aj.adamw(1e-3, mu_dtype=dtype),
        "sgd: accumulator_dtype": lambda: aj.sgd(1e-3, 0.9, accumulator_dtype=dtype),
        "schedule_free_adamw: state_dtype": lambda: aj.schedule_free_adamw(state_dtype=dtype),
    }.items():
        function, argument = name.split(": ")
        expect(act, ValueError, (function, argument, repr(dtype), *MOMENT_DTYPES))


def test_floating_point_formats_hold_moments():
    for storage in ("float32", jnp.bfloat16, np.float64, {"mu": "complex64"}, jnp.complex128):
        aj.adamw(1e-3, storage=storage).init(PARAMS)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), PARAMS)
    assert aj.adamw(1e-3).init(half)[0].nu["w"].dtype == jnp.float32


# Masks without a match, and finished optimizers

TREE_OF_PATHS = {"dense": {"kernel": W, "bias": B}, "norm": B}


@pytest.mark.parametrize("make", [aj.matching, aj.not_matching])
def test_a_mask_that_matches_nothing_warns_once(make):
    tx = aj.adamw(1e-3, mask=make("bais", "nrom"))
    state = tx.init(TREE_OF_PATHS)
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            tx.update(TREE_OF_PATHS, state, TREE_OF_PATHS)
    (message,) = [str(w.message) for w in caught]
    parts = "'bais'", "'nrom'", "dense/bias", "dense/kernel", "norm", "pattern"
    assert re.search(says(make.__name__, *parts), message), message


def test_a_mask_that_may_match_does_not_warn():
    """One matching pattern is enough, and masked leaves or a single leaf bring no warning."""
    masked = aj.not_matching("bias", "bais")
    masked(TREE_OF_PATHS)
    aj.not_matching()(TREE_OF_PATHS)
    aj.not_matching("bias")({"kernel": W})
    aj.not_matching("bias")({"kernel": W, "scale": B, "bias": None})
    aj.not_matching("bias")({"kernel": W, "scale": B, "dense": optax.MaskedNode()})
    decay = {"weight_decay": 0.1, "weight_decay_mask": aj.not_matching("bias")}
    tx = aj.groups(aj.adamw, {"kernel|norm": {"b1": 0.5}}, learning_rate=1e-3, **decay)
    step(tx, TREE_OF_PATHS, TREE_OF_PATHS, TREE_OF_PATHS)
    labels = {"dense": "a", "norm": "b"}
    parts = {"a": aj.adamw(1e-3), "b": aj.adamw(1e-3, mask=aj.not_matching("bias"))}
    step(optax.partition(parts, labels), TREE_OF_PATHS, TREE_OF_PATHS, TREE_OF_PATHS)


@pytest.mark.parametrize("wrap", [aj.cautious, aj.grams])
def test_cautious_and_grams_refuse_a_finished_optimizer_of_optax(wrap):
    warmup = optax.linear_schedule(0.0, 1e-3, 10)
    for make in (
        lambda: optax.adamw(1e-3),
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: optax.adam(warmup),
        lambda: optax.contrib.adopt(1e-3),
        lambda: optax.chain(CLIP, aj.adamw(1e-3)),
        lambda: optax.inject_hyperparams(aj.adamw)(1e-3),
        lambda: aj.adamw(1e-3),
    ):
        parts = "tx", "direction", "an optimizer", "adam_jax.scale_by_adam()"
        expect(lambda make=make: wrap(make()), ValueError, (wrap.__name__, *parts))
    under_jit = jax.jit(lambda: step(wrap(optax.adamw(1e-3)))[0])
    expect(under_jit, ValueError, (wrap.__name__, *parts))


@pytest.mark.parametrize("wrap", [aj.cautious, aj.grams])
@pytest.mark.standard_promotion
def test_cautious_and_grams_take_a_direction_of_optax(wrap):
    flags = {"w": True, "b": False}
    for tx in (
        optax.scale_by_adam(),
        optax.scale_by_lion(),
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
        optax.masked(optax.scale_by_adam(), flags),  # fits no other tree
        optax.identity(),
    ):
        step(wrap(tx))
    # a traced learning rate has no known sign
    jax.jit(lambda rate: step(wrap(optax.chain(optax.scale_by_adam(), optax.scale(rate))))[0])(0.5)


# Leaves without a gradient and without moments


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.0}])
@pytest.mark.standard_promotion
def test_without_moments_a_leaf_may_be_anything(options):
    """Accept functions as leaves, as Optax does; their gradients are None."""
    model = {"w": W, "activation": jax.nn.relu, "n": 3, "key": jax.random.key(0)}
    grads = {"w": W, "activation": None, "n": None, "key": None}
    arrays = grads | {"w": W}
    decay = options.get("weight_decay") or 0.0
    for make in (aj.sgd, lambda rate, **kw: aj.chain(CLIP_FAR, aj.sgd(rate, **kw))):
        tx = make(0.5, **options)
        state = tx.init(model)
        for params in (model, arrays):
            updates, _ = tx.update(grads, state, params)
            assert updates["activation"] is None and updates["key"] is None
            np.testing.assert_allclose(updates["w"], -0.5 * (1 + decay) * W)
            new, _ = aj.apply(tx, grads, state, params)
            np.testing.assert_allclose(new["w"], W - 0.5 * (1 + decay) * W)
            assert {k: v for k, v in new.items() if k != "w"} == {
                k: v for k, v in params.items() if k != "w"
            }
    expect(
        lambda: aj.sgd(0.5, momentum=0.9).init(model), TypeError, ("sgd", "'activation'", "masked")
    )


CLIP_FAR = optax.clip_by_global_norm(1e6)

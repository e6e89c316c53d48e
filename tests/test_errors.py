"""Every message: whom it names, the argument or leaf, the value, what is allowed, the fix.

Each row is an id, what to do, the exception and its whole message (or a pattern for all of it).
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

W, B = jnp.ones((2, 3)), jnp.ones(3)
PARAMS = {"w": W, "b": B}
FLAGS = {"w": True, "b": False}
NAN = float("nan")


def step(tx, grads=PARAMS, params=PARAMS, made_for=PARAMS):
    return tx.update(grads, tx.init(made_for), params)


def table(*rows):
    return pytest.mark.parametrize(
        "act, error, message", [r[1:] for r in rows], ids=[r[0] for r in rows]
    )


def expect(act, error, message):
    with pytest.raises(error) as caught:
        act()
    assert type(caught.value) is error
    if isinstance(message, re.Pattern):
        assert message.fullmatch(str(caught.value)), str(caught.value)
    else:
        assert str(caught.value) == message


# Hyperparameters


@rule(mu=signed)
def mine(g, mu, *, gain, b1=0.9):
    mu = aj.ema(b1, mu, g)
    return gain * mu, mu


RANGES = [
    (aj.adamw, (1e-3,), {"b1": 1.5}, "adamw: b1 must be in [0, 1), got 1.5"),
    (aj.adam, (1e-3,), {"b1": -0.1}, "adam: b1 must be in [0, 1), got -0.1"),
    (aj.nadamw, (1e-3,), {"b2": 1}, "nadamw: b2 must be in [0, 1), got 1"),
    (aj.nadam, (1e-3,), {"b2": NAN}, "nadam: b2 must be in [0, 1), got nan"),
    (aj.amsgrad, (1e-3,), {"b2": np.float32(1.5)}, "amsgrad: b2 must be in [0, 1), got 1.5"),
    (aj.rmsprop, (1e-3,), {"decay": 1.5}, "rmsprop: decay must be in [0, 1], got 1.5"),
    (aj.rmsprop, (1e-3,), {"momentum": 2.0}, "rmsprop: momentum must be in [0, 1], got 2.0"),
    (aj.sgd, (1e-3, 1.5), {}, "sgd: momentum must be in [0, 1], got 1.5"),
    (aj.trace, (1.5,), {}, "trace: decay must be in [0, 1], got 1.5"),
    (aj.adamax, (1e-3,), {"eps": -1}, "adamax: eps must be >= 0 and finite, got -1"),
    (
        aj.scale_by_adam,
        (),
        {"eps_root": -1e-8},
        "scale_by_adam: eps_root must be >= 0 and finite, got -1e-08",
    ),
    (aj.sgd, (-1,), {}, "sgd: learning_rate must be >= 0 and finite, got -1"),
    (aj.adam, (NAN,), {}, "adam: learning_rate must be >= 0 and finite, got nan"),
    (
        aj.adamaxw,
        (1e-3,),
        {"weight_decay": -1},
        "adamaxw: weight_decay must be >= 0 and finite, got -1",
    ),
    (
        aj.nadam,
        (1e-3,),
        {"momentum_decay": -1},
        "nadam: momentum_decay must be >= 0 and finite, got -1",
    ),
    (aj.radam, (1e-3,), {"threshold": 3}, "radam: threshold must be >= 4 and finite, got 3"),
    (
        aj.scale_by_rms,
        (),
        {"initial_scale": -1},
        "scale_by_rms: initial_scale must be >= 0 and finite, got -1",
    ),
    (aj.from_rule, (mine, 1e-3), {"gain": 1, "b1": 1.5}, "mine: b1 must be in [0, 1), got 1.5"),
    (aj.from_rule, (mine, -1), {"gain": 1}, "mine: learning_rate must be >= 0 and finite, got -1"),
    (
        aj.from_rule,
        (mine, 1),
        {"gain": 1, "weight_decay": -1},
        "mine: weight_decay must be >= 0 and finite, got -1",
    ),
    (aj.scale_by_rule, (mine,), {"gain": 1, "b1": 2}, "mine: b1 must be in [0, 1), got 2"),
]


@pytest.mark.parametrize("make, args, given, message", RANGES, ids=[r[-1] for r in RANGES])
def test_out_of_range(make, args, given, message):
    expect(lambda: make(*args, **given), ValueError, message)


SCALAR = "must be a number, a scalar array or a schedule, got"
HYPERPARAMS = [
    ("string", lambda: aj.adamw(1e-3, b1="0.9"), TypeError, f"adamw: b1 {SCALAR} '0.9'"),
    ("list", lambda: aj.adam([1e-3]), TypeError, f"adam: learning_rate {SCALAR} [0.001]"),
    ("complex", lambda: aj.radam(1e-3, b1=0.5j), TypeError, f"radam: b1 {SCALAR} 0.5j"),
    ("none", lambda: aj.adamax(1e-3, b1=None), TypeError, f"adamax: b1 {SCALAR} None"),
    ("class", lambda: aj.adam(float), TypeError, f"adam: learning_rate {SCALAR} <class 'float'>"),
    (
        "array of strings",
        lambda: aj.adam(np.array("a")),
        TypeError,
        f"adam: learning_rate {SCALAR} array('a', dtype='<U1')",
    ),
    (
        "vector",
        lambda: aj.adamw(jnp.ones(3)),
        ValueError,
        "adamw: learning_rate must be a scalar, got an array of shape (3,); "
        "for a value per leaf use optax.partition, for a population jax.vmap",
    ),
    (
        "unknown",
        lambda: aj.from_rule(mine, 1e-3, gain=1.0, b3=0.9),
        TypeError,
        "mine: there is no hyperparameter 'b3'; it has gain, b1",
    ),
    (
        "missing",
        lambda: aj.from_rule(mine, 1e-3),
        TypeError,
        "mine: the hyperparameter 'gain' has no default; give gain=",
    ),
    (
        "missing from a direction",
        lambda: aj.scale_by_rule(mine),
        TypeError,
        "mine: the hyperparameter 'gain' has no default; give gain=",
    ),
    (
        "eps_hat with eps_root",
        lambda: aj.adamw(1e-3, eps_hat=True, eps_root=1e-8),
        ValueError,
        "adamw: eps_hat=True has neither eps_root nor nesterov, got eps_root=1e-08, "
        "nesterov=False; leave them out, or eps_hat",
    ),
    (
        "eps_hat with nesterov",
        lambda: aj.scale_by_adam(eps_hat=True, nesterov=True),
        ValueError,
        "scale_by_adam: eps_hat=True has neither eps_root nor nesterov, got eps_root=0.0, "
        "nesterov=True; leave them out, or eps_hat",
    ),
    (
        "schedule without a step count",
        lambda: aj.rmsprop(1e-3, decay=lambda count: 0.9),
        ValueError,
        "rmsprop: decay cannot be a schedule, because ScaleByRmsState has no step count; "
        "wrap the constructor in optax.inject_hyperparams",
    ),
    (
        "schedule of a start",
        lambda: aj.rmsprop(1e-3, initial_scale=lambda count: 1.0, bias_correction=True),
        ValueError,
        "rmsprop: initial_scale cannot be a schedule, because it is used once, in init; "
        "give a number",
    ),
    (
        "schedule of vectors",
        lambda: step(aj.adamw(lambda count: jnp.ones(3))),
        TypeError,
        "adamw: the schedule of learning_rate must return a scalar, got an array of shape (3,)",
    ),
    (
        "schedule of nothing",
        lambda: step(aj.adam(1e-3, b2=lambda count: None)),
        TypeError,
        "adam: the schedule of b2 must return a scalar, got None",
    ),
]


@table(*HYPERPARAMS)
def test_hyperparameter(act, error, message):
    expect(act, error, message)


def test_traced_values_are_not_validated():
    """They can't be looked at: inject_hyperparams and vmap go through."""
    made = jax.jit(lambda b1, eps: step(aj.adamw(1e-3, b1=b1, eps=eps))[0])(1.5, -1.0)
    chex.assert_trees_all_equal_shapes(made, PARAMS)
    injected = optax.inject_hyperparams(aj.adam)(1e-3, eps_hat=True)  # eps_root is traced too
    jax.jit(injected.update)(PARAMS, injected.init(PARAMS))


# Choices, storage, masks


@pytest.fixture(autouse=True)
def only_built_in_formats(monkeypatch):
    """A message lists the formats that other tests have registered, too."""
    for name in set(aj.storage.FORMATS) - {"int8"}:
        monkeypatch.delitem(aj.storage.FORMATS, name)


FORMAT = (
    "storage must be one of 'float32', 'bfloat16', 'int8', 'float64' or a complex dtype, a mapping "
    "from moments to these or a function (path, leaf) of these, got"
)
FUNCTION = r"<function .*>"
CONFLICT = "; drop mu_dtype and write storage={'mu': 'float32', ...}"


CHOICES = [
    (
        "weight_decay_form",
        lambda: aj.adamw(1e-3, weight_decay_form="L2"),
        ValueError,
        re.compile(r"adamw: weight_decay_form must be one of 'decoupled', .*'l2', got 'L2'"),
    ),
    (
        "weight_decay_form of a rule",
        lambda: aj.from_rule(mine, 1e-3, gain=1.0, weight_decay_form=None),
        ValueError,
        re.compile(r"mine: weight_decay_form must be one of 'decoupled', .*'l2', got None"),
    ),
    (
        "implementation",
        lambda: aj.adamw(1e-3, implementation="cuda"),
        ValueError,
        re.compile(r"adamw: implementation must be one of 'auto', 'xla'.*, got 'cuda'"),
    ),
    (
        "implementation of a direction",
        lambda: aj.scale_by_rms(implementation=np.ones(2)),
        ValueError,
        re.compile(r"scale_by_rms: implementation must be one of .*, got array\(\[1., 1.\]\)"),
    ),
    (
        "max_of",
        lambda: aj.amsgrad(1e-3, max_of="paper"),
        ValueError,
        "amsgrad: max_of must be one of 'corrected', 'raw', got 'paper'",
    ),
    ("format", lambda: aj.adamw(1e-3, storage="fp8"), ValueError, f"adamw: {FORMAT} 'fp8'"),
    ("number", lambda: aj.adam(1e-3, storage=8), ValueError, f"adam: {FORMAT} 8"),
    (
        "integer format",
        lambda: aj.scale_by_adam(storage=jnp.int16),
        ValueError,
        f"scale_by_adam: {FORMAT} {jnp.int16!r}",
    ),
    ("class", lambda: aj.adam(1e-3, storage=dict), ValueError, f"adam: {FORMAT} <class 'dict'>"),
    (
        "format in a mapping",
        lambda: aj.from_rule(mine, 1e-3, gain=1.0, storage={"mu": "fp8"}),
        ValueError,
        f"mine: {FORMAT} 'fp8'",
    ),
    (
        "mapping in a mapping",
        lambda: aj.adam(1e-3, storage={"mu": {"mu": "bfloat16"}}),
        ValueError,
        f"adam: {FORMAT} {{'mu': 'bfloat16'}}",
    ),
    (
        "function in a mapping",
        lambda: aj.adam(1e-3, storage={"mu": lambda path, leaf: "bfloat16"}),
        ValueError,
        re.compile(re.escape(f"adam: {FORMAT} ") + FUNCTION),
    ),
    (
        "format from a function",
        lambda: aj.adam(1e-3, storage=lambda path, leaf: "fp8").init(PARAMS),
        ValueError,
        f"adam: {FORMAT} 'fp8'",
    ),
    (
        "moment in a mapping",
        lambda: aj.adamw(1e-3, storage={"nu_max": "bfloat16"}),
        ValueError,
        "adamw: storage names the moment 'nu_max'; it has mu, nu",
    ),
    *(
        (
            f"mu_dtype {dtype}",
            lambda dtype=dtype: aj.adamw(1e-3, mu_dtype=dtype),
            ValueError,
            re.compile(
                rf"adamw: mu_dtype must be float32, bfloat16, float64 or a complex dtype, got "
                rf"{re.escape(repr(dtype))}; for other formats use storage= \(float32, bfloat16.*\)"
            ),
        )
        for dtype in ("int8", jnp.int32, "fp8", 3)
    ),
    (
        "accumulator_dtype",
        lambda: aj.sgd(1e-3, 0.9, accumulator_dtype="int8"),
        ValueError,
        re.compile(
            r"sgd: accumulator_dtype must be float32, bfloat16, float64 or a complex dtype, got "
            r"'int8'; for other formats use storage= \(float32, bfloat16.*\)"
        ),
    ),
    (
        "mu_dtype and storage",
        lambda: aj.adamw(1e-3, mu_dtype=jnp.float32, storage="bfloat16"),
        ValueError,
        "adamw: mu_dtype=float32 conflicts with storage='bfloat16'" + CONFLICT,
    ),
    (
        "mu_dtype and a mapping",
        lambda: aj.amsgrad(1e-3, mu_dtype="float32", storage={"mu": "bfloat16"}),
        ValueError,
        "amsgrad: mu_dtype=float32 conflicts with storage={'mu': 'bfloat16'}" + CONFLICT,
    ),
    (
        "mu_dtype and a function",
        lambda: aj.adam(1e-3, mu_dtype="float32", storage=lambda path, leaf: None),
        ValueError,
        re.compile(
            f"adam: mu_dtype=float32 conflicts with storage={FUNCTION}{re.escape(CONFLICT)}"
        ),
    ),
    (
        "mu_dtype and no format",
        lambda: aj.adam(1e-3, mu_dtype="float32", storage="fp8"),
        ValueError,
        f"adam: {FORMAT} 'fp8'",
    ),
    (
        "accumulator_dtype and storage",
        lambda: aj.trace(0.9, accumulator_dtype="float32", storage="bfloat16"),
        ValueError,
        "trace: accumulator_dtype=float32 conflicts with storage='bfloat16'; "
        "drop accumulator_dtype and write storage={'trace': 'float32', ...}",
    ),
    (
        "both masks",
        lambda: aj.adamw(1e-3, mask=FLAGS, weight_decay_mask=aj.matching("w")),
        ValueError,
        "adamw: mask and weight_decay_mask are one argument; give one of them",
    ),
    *(
        (
            f"{f.__name__} {pattern!r}",
            lambda f=f, pattern=pattern: f("w", pattern),
            ValueError,
            re.compile(
                rf"matching: {re.escape(repr(pattern))} is not a regular expression \(.+\); "
                r"pass patterns as separate strings, and escape special characters with re.escape"
            ),
        )
        for f in (aj.matching, aj.not_matching)
        for pattern in ("(", 3, ["w"])
    ),
]


@table(*CHOICES)
def test_choice(act, error, message):
    expect(act, error, message)


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
def test_what_agrees_is_no_error(make):
    step(make())


# Gradients, parameters and state

KEEP_OUT = (
    "which has no gradient to follow; keep it out of the optimizer, e.g. with optax.masked or "
    "optax.partition, or make it a float"
)
TREE = "; pass the tree that init was given"
MADE = "init makes (ScaleByAdamState, EmptyState, EmptyState)"
SAME = "; use the state of the same optimizer, or make a new one"
ADAMW = aj.adamw(1e-3)
COMPLEX = {"w": jnp.ones(2, jnp.complex64)}


def with_leaf(leaf):
    return {"w": W, "n": {"x": leaf}}


LEAVES = [
    ("integer", jnp.arange(3), "of type int32"),
    ("bool", jnp.array([True]), "of type bool"),
    ("key", jax.random.key(0), "a PRNG key"),
    ("string", "text", "of type str"),
    ("object", object(), "of type object"),
]


@pytest.mark.parametrize("leaf, kind", [x[1:] for x in LEAVES], ids=[x[0] for x in LEAVES])
def test_leaf_without_a_gradient(leaf, kind):
    floats, other = with_leaf(B), with_leaf(leaf)
    expect(
        lambda: ADAMW.init(other), TypeError, f"adamw: the parameter 'n/x' is {kind}, {KEEP_OUT}"
    )
    state = ADAMW.init(floats)
    expect(
        lambda: ADAMW.update(other, state, floats),
        TypeError,
        f"adamw: the gradient of 'n/x' is {kind}, {KEEP_OUT}",
    )


UPDATES = [
    (
        "integer parameter without a path",
        lambda: ADAMW.init(jnp.arange(3)),
        TypeError,
        f"adamw: the parameter is of type int32, {KEEP_OUT}",
    ),
    (
        "shape of a gradient",
        lambda: step(ADAMW, grads={"w": jnp.ones((1, 3)), "b": B}),
        ValueError,
        "adamw: the gradient of 'w' has shape (1, 3), its mu (2, 3); they must be equal "
        "(nothing is broadcast)",
    ),
    (
        "shape of a gradient without a path",
        lambda: step(aj.sgd(1e-3, 0.9), B, B, W),
        ValueError,
        "sgd: the gradient has shape (3,), its trace (2, 3); they must be equal "
        "(nothing is broadcast)",
    ),
    (
        "shape of a parameter",
        lambda: step(ADAMW, params={"w": W, "b": jnp.ones(1)}),
        ValueError,
        "adamw: the gradient of 'b' has shape (3,), its parameter (1,); they must be equal "
        "(nothing is broadcast)",
    ),
    (
        "missing gradient",
        lambda: step(ADAMW, grads={"w": W}),
        ValueError,
        "adamw: the gradients and the state have different structures "
        f"(without a gradient: b){TREE}",
    ),
    (
        "extra gradient",
        lambda: step(ADAMW, grads={**PARAMS, "c": B}),
        ValueError,
        f"adamw: the gradients and the state have different structures (not in the state: c){TREE}",
    ),
    (
        "missing parameter",
        lambda: step(ADAMW, params={"w": W}),
        ValueError,
        "adamw: the gradients and the parameters have different structures "
        f"(not in the parameters: b){TREE}",
    ),
    (
        "extra parameter",
        lambda: step(ADAMW, params={**PARAMS, "c": {"d": B}}),
        ValueError,
        "adamw: the gradients and the parameters have different structures "
        f"(without a gradient: c/d){TREE}",
    ),
    (
        "one array for the parameters",
        lambda: step(ADAMW, params=W),
        ValueError,
        "adamw: the gradients and the parameters have different structures "
        f"(without a gradient: one array; not in the parameters: b, w){TREE}",
    ),
    (
        "tuple for a list",
        lambda: step(ADAMW, (W, B), [W, B], [W, B]),
        ValueError,
        "adamw: the gradients and the state have different structures "
        f"(PyTreeDef((*, *)) against PyTreeDef([*, *])){TREE}",
    ),
    (
        "dict for an array, parameter",
        lambda: step(ADAMW, params={"w": {"x": W}, "b": B}),
        ValueError,
        f"adamw: the gradient of 'w' is one array, its parameter is a dict{TREE}",
    ),
    (
        "dict for an array, state",
        lambda: step(ADAMW, made_for={"w": {"x": W}, "b": B}),
        ValueError,
        f"adamw: the gradient of 'w' is one array, its mu is a dict{TREE}",
    ),
    (
        "gradient for what was None",
        lambda: step(ADAMW, made_for={"w": None, "b": B}),
        ValueError,
        "adamw: the parameter 'w' has a gradient but no mu in the state; "
        "it was None when init was called: make the state anew",
    ),
    *(
        (
            f"no parameters, {form}",
            lambda form=form: step(
                aj.adam(1e-3, weight_decay=0.1, weight_decay_form=form), params=None
            ),
            ValueError,
            "adam: weight_decay needs the parameters, and the gradient of 'b' came without one; "
            "call update(gradients, state, params)",
        )
        for form in ("decoupled", "independent", "cautious", "l2")
    ),
    (
        "one parameter is None",
        lambda: step(ADAMW, params={"w": None, "b": B}),
        ValueError,
        "adamw: weight_decay needs the parameters, and the gradient of 'w' came without one; "
        "call update(gradients, state, params)",
    ),
    (
        "state of another optimizer",
        lambda: ADAMW.update(PARAMS, aj.amsgrad(1e-3, weight_decay=0.1).init(PARAMS), PARAMS),
        ValueError,
        "adamw: this state is not of its making: got (ScaleByAmsgradState, EmptyState, "
        f"EmptyState), {MADE}{SAME}",
    ),
    (
        "state of the direction",
        lambda: ADAMW.update(PARAMS, aj.scale_by_adam().init(PARAMS), PARAMS),
        ValueError,
        f"adamw: this state is not of its making: got ScaleByAdamState, {MADE}{SAME}",
    ),
    (
        "state of an optimizer for the direction",
        lambda: aj.scale_by_adam().update(PARAMS, ADAMW.init(PARAMS)),
        ValueError,
        "scale_by_adam: this state is not of its making: got (ScaleByAdamState, EmptyState, "
        f"EmptyState), init makes ScaleByAdamState{SAME}",
    ),
    (
        "parameters for the state",
        lambda: ADAMW.update(PARAMS, PARAMS, ADAMW.init(PARAMS)),
        ValueError,
        f"adamw: this state is not of its making: got dict, {MADE}{SAME}",
    ),
    (
        "gradient of another shape, Schedule-Free",
        lambda: step(aj.schedule_free_adamw(1e-3), {"w": jnp.ones(2)}, *[{"w": jnp.ones(3)}] * 2),
        ValueError,
        "schedule_free_adamw: the gradient of 'w' has shape (2,), its nu (3,); they must be equal "
        "(nothing is broadcast)",
    ),
    (
        "real mu of a complex leaf",
        lambda: step(aj.adam(1e-3, mu_dtype="float32"), *[COMPLEX] * 3),
        ValueError,
        "adam: mu of the complex leaf 'w' is stored as float32 and would lose its imaginary part; "
        "choose a complex dtype, or none",
    ),
    (
        "no moments",
        lambda: aj.moments(aj.sgd(1e-3).init(PARAMS)),
        ValueError,
        "moments: the state holds no moments; pass the state of an optimizer that has some, or of "
        "one, e.g. state[0]",
    ),
    (
        "moments of several",
        lambda: aj.moments(aj.chain(aj.scale_by_adam(), ADAMW).init(PARAMS)),
        ValueError,
        "moments: the state holds several of a name (0/mu, 1/0/mu, 0/nu, 1/0/nu); pass the state "
        "of an optimizer that has some, or of one, e.g. state[0]",
    ),
    (
        "no step count",
        lambda: aj.step_count(aj.sgd(1e-3, 0.9).init(PARAMS)),
        ValueError,
        "step_count: nothing in this state counts steps (plain sgd does not); count them in the "
        "training loop, or use optax.inject_hyperparams",
    ),
]


@table(*UPDATES)
def test_update(act, error, message):
    expect(act, error, message)


def test_the_outermost_name_is_the_one_that_the_user_called():
    """Also in a chain, and under jit, where the message arrives while tracing."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), aj.nadamw(1e-3))
    act = jax.jit(lambda: step(tx, grads={"w": jnp.ones((1, 3)), "b": B}))
    expect(act, ValueError, re.compile(r"nadamw: the gradient of 'w' has shape \(1, 3\).*"))


def test_after_an_error_all_is_as_before():
    state = ADAMW.init(PARAMS)
    before = jax.tree.map(jnp.copy, state)
    for wrong in ({"w": W}, {"w": W, "b": jnp.ones(1)}, {"w": W, "b": jnp.arange(3)}):
        with pytest.raises((TypeError, ValueError), match="adamw"):
            ADAMW.update(wrong, state, PARAMS)
    chex.assert_trees_all_equal(state, before)
    chex.assert_trees_all_equal(ADAMW.update(PARAMS, state, PARAMS), step(aj.adamw(1e-3)))
    with pytest.raises(ValueError, match=r"^sgd: "):  # not the name of the error before
        aj.sgd(-1.0)


# Rules


def declared(moments, returned, **more):
    """An optimizer from a rule called `homemade` with these moments, which returns returned(g)."""

    def homemade(g, mu):
        return returned(g)

    def momentless(g):
        return returned(g)

    return aj.from_rule(rule(**moments, **more)(homemade if moments else momentless), 1e-3)


MU = {"mu": signed}


def swapped(g, nu, mu): ...


def without(g): ...


RULES = [
    (
        "declared order",
        lambda: rule(mu=signed, nu=positive)(swapped),
        TypeError,
        "rule swapped: the arguments after the gradient must be the declared moments (mu, nu) in "
        "that order, got (nu, mu)",
    ),
    (
        "declared but not taken",
        lambda: rule(mu=signed)(without),
        TypeError,
        "rule without: the arguments after the gradient must be the declared moments (mu) in "
        "that order, got ()",
    ),
    (
        "too many moments",
        lambda: step(declared(MU, lambda g: (g, g, g))),
        ValueError,
        "rule homemade: must return the tuple (direction, mu), returned 3 values",
    ),
    (
        "a moment's shape",
        lambda: step(declared(MU, lambda g: (g, g.sum()))),
        ValueError,
        "rule homemade: the mu must have shape (3,) and dtype float32, got () and float32",
    ),
    (
        "a moment's dtype",
        lambda: step(declared(MU, lambda g: (g, g.astype(jnp.bfloat16)))),
        ValueError,
        "rule homemade: the mu must have shape (3,) and dtype float32, got (3,) and bfloat16",
    ),
    (
        "a number for a moment",
        lambda: step(declared(MU, lambda g: (g, 0.0))),
        ValueError,
        "rule homemade: the mu must have shape (3,) and dtype float32, got 0.0",
    ),
    (
        "the direction's shape",
        lambda: step(declared(MU, lambda g: (g.sum(), g))),
        ValueError,
        "rule homemade: the direction must have shape (3,) and dtype float32, got () and float32",
    ),
    (
        "no direction",
        lambda: step(declared(MU, lambda g: (None, g))),
        ValueError,
        "rule homemade: the direction must have shape (3,) and dtype float32, got None",
    ),
    (
        "moments that were not declared",
        lambda: step(declared({}, lambda g: (g, g))),
        ValueError,
        re.compile(
            r"rule momentless: the direction must have shape \(3,\) and dtype float32, got \(.*\)"
        ),
    ),
]


@table(*RULES)
def test_rule(act, error, message):
    expect(act, error, message)


# Calls, declarations and masks. A row has what its message must say, at least.

CALLS = [
    ("no learning rate", lambda: aj.adamw(), TypeError, "adamw.*learning_rate"),
    ("misspelled", lambda: aj.adamw(1e-3, beta1=0.9), TypeError, "adamw.*beta1"),
    ("not a rule", lambda: aj.from_rule(aj.adam, 1e-3), TypeError, "from_rule.*rule"),
    ("not a rule at all", lambda: aj.scale_by_rule("adam"), TypeError, "scale_by_rule.*rule"),
    ("not a moment", lambda: rule(mu=3)(lambda g, mu: (g, mu)), TypeError, "rule.*mu.*signed"),
    ("a moment called count", lambda: step(counting()), (TypeError, ValueError), "rule.*count"),
    ("decay of None", lambda: aj.trace(None), TypeError, "trace: decay must be a number"),
    (
        "schedule of momentum",
        lambda: aj.sgd(1e-3, momentum=lambda count: 0.9),
        ValueError,
        "sgd: momentum cannot be a schedule",
    ),
    (
        "state without a mask",
        lambda: aj.adamw(1e-3, mask=FLAGS).update(PARAMS, ADAMW.init(PARAMS), PARAMS),
        ValueError,
        "adamw: this state is not of its making",
    ),
    (
        "state with a mask",
        lambda: ADAMW.update(PARAMS, aj.adamw(1e-3, mask=FLAGS).init(PARAMS), PARAMS),
        ValueError,
        "adamw: this state is not of its making",
    ),
    (
        "structure of a mask",
        lambda: step(aj.adamw(1e-3, mask={"w": True})),
        ValueError,
        "adamw.*mask",
    ),
    ("name for a mask", lambda: step(aj.adamw(1e-3, mask="bias")), TypeError, "adamw.*mask"),
    ("no tuple", lambda: step(declared(MU, lambda g: g)), (TypeError, ValueError), "rule.*tuple"),
    ("nothing", lambda: step(declared(MU, lambda g: None)), (TypeError, ValueError), "rule homem"),
    (
        "factor without its mean",
        lambda: step(declared(MU, lambda g: (g, g), factor=lambda share: share)),
        (TypeError, ValueError),
        "rule homemade.*factor",
    ),
]


def counting():
    def homemade(g, count):
        return g, count

    return aj.from_rule(rule(count=signed)(homemade), 1e-3)


@pytest.mark.parametrize("act, error, message", [r[1:] for r in CALLS], ids=[r[0] for r in CALLS])
def test_calls_declarations_and_masks(act, error, message):
    with pytest.raises(error, match=f"^{message}"):
        act()


def test_rmsprop_stores_its_trace_as_told():
    state = aj.rmsprop(1e-3, momentum=0.9, storage={"trace": "bfloat16"}).init(PARAMS)
    assert optax.tree_utils.tree_get(state, "trace")["w"].dtype == jnp.bfloat16


# Misuse of the functions that take a transformation, a constructor, a schedule or a mapping: the
# function, the argument with its value, and the fix, each of which the message must contain.

CLIP = optax.clip_by_global_norm(1.0)
MESH = jax.sharding.AbstractMesh((1,), ("data",))
COUNTED = {"learning_rate": 1e-3}


def wrong(act, *parts, error=TypeError):
    """A row: its id is the function and the argument."""
    return pytest.param(act, error, parts, id=" ".join(parts[:3]))


def raises_with(act, error, parts):
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert message.startswith(f"{parts[0]}: "), message
    for part in parts[1:]:
        assert part in message, message


CALL_IT = "call it first, e.g. adamw(1e-3)"
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
    """Callable, but no constructor."""

    def __call__(self, x):
        return x


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_constructor_is_no_transformation(name):
    argument = "argument 2" if name == "chain" else "tx"
    must = f"{argument} must be an Optax transformation, got"
    for given, got, fix in (
        (aj.adamw, "the function adamw", CALL_IT),
        (0.5, "0.5", f"call {name}("),
        (None, "None", f"call {name}("),
        (PARAMS, "a dict", f"call {name}("),
        (Model(), "a Model", f"call {name}("),
        ([CLIP, ADAMW], "a list", "separate arguments, e.g. adam_jax.chain"),
    ):
        raises_with(lambda given=given: WRAPPERS[name](given), TypeError, (name, must, got, fix))


class Duck:
    """A transformation of another library: not Optax's class, but its two functions."""

    def init(self, params):
        return optax.EmptyState()

    def update(self, updates, state, params=None, **extra):
        return jax.tree.map(lambda g: -g, updates), state


def test_whatever_has_init_and_update_is_a_transformation():
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
def test_update_without_a_state(name):
    tx = UPDATED[name](aj.adamw(1e-3))
    parts = name, "must be given the state", "call update(gradients, state, params)"
    raises_with(lambda: tx.update(PARAMS), TypeError, parts)


def constant(value):
    return lambda count: value


FACTORY = "call the function that makes the schedule"
STATIC = "optax.inject_hyperparams(adamw, static_args=('storage',))"
MISUSE = [
    wrong(
        lambda: aj.chain([CLIP, ADAMW]),
        "chain",
        "argument 1",
        "got a list",
        "adam_jax.chain(clip, adamw)",
    ),
    wrong(lambda: aj.chain(1.0, ADAMW), "chain", "argument 1", "got 1.0", "call chain("),
    wrong(
        lambda: aj.memory_report(PARAMS, ADAMW),
        "memory_report",
        "tx must be",
        "got a dict",
        "call memory_report(tx, params)",
    ),
    wrong(
        lambda: aj.convert_state(ADAMW, ADAMW.init(PARAMS), PARAMS),
        "convert_state",
        "tx must be",
        "got a tuple",
        "call convert_state(state, tx, params)",
    ),
    wrong(
        lambda: aj.groups(ADAMW, {}, **COUNTED),
        "groups",
        "constructor must be a function",
        "got a transformation",
        "groups(adam_jax.adamw, {...}, learning_rate=1e-3)",
    ),
    wrong(
        lambda: aj.groups(aj.adamw, ["bias"], **COUNTED),
        "groups",
        "patterns must be a mapping",
        "got ['bias']",
        "write {'bias': {'weight_decay': 0.0}}",
    ),
    wrong(
        lambda: aj.diagnostics.record(ADAMW, groups=["a"]),
        "record",
        "groups must be a mapping",
        "got ['a']",
        "write groups={'biases': 'bias'}",
    ),
    wrong(
        lambda: aj.tunable(ADAMW),
        "tunable",
        "constructor must be a function",
        "got a transformation",
        "tunable(adam_jax.adamw)(1e-3)",
    ),
    wrong(lambda: aj.tunable("adamw"), "tunable", "constructor must be a function", "got 'adamw'"),
    wrong(
        lambda: aj.zero1(ADAMW, 8),
        "zero1",
        "mesh must be a jax.sharding.Mesh",
        "got 8",
        "jax.make_mesh((jax.device_count(),), ('data',))",
    ),
    wrong(lambda: aj.zero1(ADAMW, jax.devices()), "zero1", "mesh must be", "got a list"),
    wrong(
        lambda: aj.interop.from_torch(object(), ADAMW, PARAMS),
        "from_torch",
        "state_dict must be a mapping with 'state' and 'param_groups'",
        "got an object",
        "pass optimizer.state_dict()",
    ),
    wrong(
        lambda: aj.interop.from_torch({"layer.weight": 1}, ADAMW, PARAMS),
        "from_torch",
        "state_dict must be",
        "got a dict",
        "pass optimizer.state_dict()",
    ),
    wrong(
        lambda: aj.adamw(optax.cosine_decay_schedule),
        "adamw",
        "learning_rate must be",
        "got the function cosine_decay_schedule",
        FACTORY,
    ),
    wrong(
        lambda: step(aj.adamw(optax.constant_schedule)),
        "adamw",
        "learning_rate must return a scalar",
        "got the function",
        FACTORY,
    ),
    wrong(
        lambda: aj.adamw(lambda: 1e-3),
        "adamw",
        "learning_rate must be",
        "got the function <lambda>",
        "write lambda count: ...",
    ),
    wrong(
        lambda: aj.adamw(1e-3, weight_decay=lambda path, leaf: 0.1),
        "adamw",
        "weight_decay must be",
        "cannot be called with one argument",
        "write lambda count: ...",
    ),
    wrong(
        lambda: aj.from_rule(mine, 1e-3, gain=lambda: 1.0),
        "mine",
        "gain must be",
        "cannot be called with one argument",
        "write lambda count: ...",
    ),
    wrong(
        lambda: aj.adamw(1e-3, storage=lambda path: "int8"),
        "adamw",
        "storage must be",
        "cannot be called with two",
        "write lambda path, leaf: ...",
    ),
    wrong(
        lambda: aj.schedule_free_adamw(1e-3, storage=lambda path: "int8"),
        "schedule_free_adamw",
        "storage must be",
        "write lambda path, leaf: ...",
    ),
    *(
        wrong(
            lambda f=f: optax.inject_hyperparams(aj.adamw)(1e-3, storage=f).init(PARAMS),
            "adamw",
            "storage must be called with a path and a leaf",
            "got a step count",
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
            f"learning_rate must be {kind}>= 0 and finite",
            f"got {value}",
            error=error,
        )
        for value, kind, error in (
            (True, "a number ", TypeError),
            (np.True_, "a number ", TypeError),
            (float("inf"), "", ValueError),
            (NAN, "", ValueError),
        )
    ),
    *(
        wrong(
            lambda name=name: aj.adamw(**{"learning_rate": 1e-3, name: float("inf")}),
            "adamw",
            f"{name} must be >= 0 and finite",
            "got inf",
            error=ValueError,
        )
        for name in ("learning_rate", "eps", "eps_root", "weight_decay")
    ),
    wrong(lambda: aj.adamw(1e-3, b1=np.inf), "adamw", "b1 must be", "got inf", error=ValueError),
    wrong(lambda: aj.adamw(True), "adamw", "learning_rate must be a number", "got True", "float"),
    wrong(
        lambda: aj.radam(1e-3, threshold=np.inf),
        "radam",
        "threshold must be >= 4 and finite",
        "got inf",
        error=ValueError,
    ),
]


@pytest.mark.parametrize("act, error, parts", MISUSE)
def test_misuse(act, error, parts):
    raises_with(act, error, parts)


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
def test_schedules_and_functions_that_fit(make):
    step(make())


# Formats that cannot hold a moment


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", jnp.float8_e5m2, jnp.float16])
def test_a_format_too_narrow_for_squares(dtype):
    works = ("'float32', 'bfloat16', 'int8'", "use 'bfloat16' or 'int8'")
    for storage in (dtype, {"nu": dtype}):
        raises_with(
            lambda storage=storage: aj.adamw(1e-3, storage=storage),
            ValueError,
            ("adamw", "storage must be", repr(dtype), *works),
        )
    chosen = aj.adamw(1e-3, storage=lambda path, leaf: dtype)
    raises_with(lambda: chosen.init(PARAMS), ValueError, ("adamw", repr(dtype), *works))
    for name, act in {
        "adamw: mu_dtype": lambda: aj.adamw(1e-3, mu_dtype=dtype),
        "sgd: accumulator_dtype": lambda: aj.sgd(1e-3, 0.9, accumulator_dtype=dtype),
        "schedule_free_adamw: state_dtype": lambda: aj.schedule_free_adamw(state_dtype=dtype),
    }.items():
        function, argument = name.split(": ")
        must = f"{argument} must be float32, bfloat16, float64 or a complex dtype"
        raises_with(act, ValueError, (function, must, repr(dtype), "storage="))


def test_the_formats_that_hold_moments():
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
    parts = "'bais'", "'nrom'", "dense/bias", "dense/kernel", "norm", "correct the pattern"
    assert message.startswith(f"{make.__name__}: ")
    assert all(part in message for part in parts), message


def test_a_mask_that_may_match_does_not_warn():
    """One pattern is enough; a single leaf, None, and what another mask hides count as well."""
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
def test_a_finished_optimizer_of_optax(wrap):
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
        parts = "tx must be a direction", "finished optimizer", "adam_jax.scale_by_adam()"
        raises_with(lambda make=make: wrap(make()), ValueError, (wrap.__name__, *parts))
    under_jit = jax.jit(lambda: step(wrap(optax.adamw(1e-3)))[0])
    raises_with(under_jit, ValueError, (wrap.__name__, *parts))


@pytest.mark.parametrize("wrap", [aj.cautious, aj.grams])
@pytest.mark.standard_promotion
def test_a_direction_of_optax_is_none(wrap):
    flags = {"w": True, "b": False}
    for tx in (
        optax.scale_by_adam(),
        optax.scale_by_lion(),
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
        optax.masked(optax.scale_by_adam(), flags),  # of another tree than the scalar
        optax.identity(),
    ):
        step(wrap(tx))
    # numbers that are traced can't be looked at
    jax.jit(lambda rate: step(wrap(optax.chain(optax.scale_by_adam(), optax.scale(rate))))[0])(0.5)


# Leaves that have no gradient, where nothing is kept for them


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.0}])
@pytest.mark.standard_promotion
def test_without_moments_a_leaf_may_be_anything(options):
    """As in Optax: a model with functions among its leaves, of which gradients are None."""
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
    raises_with(
        lambda: aj.sgd(0.5, momentum=0.9).init(model), TypeError, ("sgd", "'activation'", "masked")
    )


CLIP_FAR = optax.clip_by_global_norm(1e6)

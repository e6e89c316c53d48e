"""Helpers of several test modules: rules with their references, trees, steps, compiled programs.

Every rule in `adam_jax.rules.RULES` is tested, with the default hyperparameters of its reference.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import adam_jax
import reference
from adam_jax import positive, rule, signed
from adam_jax._backends.choice import has_triton
from adam_jax.analysis.catalogue import constructors

MB = 10**6
QUICKLY = {"xla_backend_optimization_level": 0}  # halves the time that compilation takes
CALL = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
"""A kernel's custom call, by platform."""
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs a JAX with Pallas on Triton")

# Rules


@rule(mu=signed, nu=positive)
def homemade(g, mu, nu, *, t, b1=0.9, b2=0.99, eps=1e-8):
    """Return Adam's direction, written as in a paper: plain arithmetic on the decay rates."""
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * abs(g) ** 2
    return mu / (1 - b1**t) / (adam_jax.sqrt(nu / (1 - b2**t)) + eps), mu, nu


def homemade_reference(g, s, *, t, b1=0.9, b2=0.99, eps=1e-8):
    return reference.adam(g, s, t=t, b1=b1, b2=b2, eps=eps)


def mars_reference(g, s, *, t, gamma=0.025, b1=0.95):
    previous = s.get("g_prev", np.zeros_like(g))
    return reference.mars(g, previous, gamma=gamma, b1=b1), {"g_prev": g}


STEPS = ("hyperball", "schedule_free")
EVERY_RULE = {**adam_jax.rules.RULES, "homemade": homemade}
REFERENCES = {"homemade": homemade_reference, "mars": mars_reference}
RULES = {
    "homemade": homemade,
    # every rule with moments, except STEPS, which step the parameter instead
    **{k: r for k, r in adam_jax.rules.RULES.items() if r.moments and k not in STEPS},
}
REFERENCES = {name: f for name, f in vars(reference).items() if name in RULES} | REFERENCES
if missing := RULES.keys() - REFERENCES.keys():
    raise pytest.UsageError(
        f"tests/reference.py must define {', '.join(sorted(missing))}: the float64 reference of a "
        f"rule has the rule's name"
    )

every_rule = pytest.mark.parametrize("name", RULES)

TYPICAL = ("adam", "amsgrad", "stable_adamw", "trace")
"""Rules for tests of the engine: a plain one, with a maximum, with a mean, without a step count."""

BY_DEFAULT = ("adam", "stable_adamw")
"""Typical rules for which these tests run by default; for the other rules they are slow."""


def slowly(*values, **details):
    """Leave this case of a parametrized test to the slow set."""
    return pytest.param(*values, marks=pytest.mark.slow, **details)


def slow_unless_by_default(name, *values, **details):
    case = pytest.param if name in BY_DEFAULT else slowly
    return case(name, *values, **details)


def other_rules_slowly(names):
    """Parametrize a test of the engine by the rules."""
    return pytest.mark.parametrize("name", [slow_unless_by_default(name) for name in names])


typical_rules = other_rules_slowly(TYPICAL)


def defaults(name):
    """Return the hyperparameters of a rule's reference that have defaults."""
    return {
        k: p.default
        for k, p in inspect.signature(REFERENCES[name]).parameters.items()
        if p.default is not p.empty and k != "p"
    }


def optimizer(name, learning_rate=1e-2, **keywords):
    """Make an optimizer of a rule with its reference's hyperparameters."""
    return adam_jax.from_rule(RULES[name], learning_rate, **defaults(name), **keywords)


FINISHED = {k: make for k, make in constructors().items() if k != "schedule_free_adamw"}
DECAYED = [k for k, f in FINISHED.items() if "cautious" in inspect.signature(f).parameters]
"""The optimizers that share all options; others have their own weight decay, or none."""
every_optimizer = pytest.mark.parametrize("name", FINISHED)


def updates_over(tx, gradients, params=None):
    """Return the updates for given gradients at fixed parameters."""
    params = jnp.zeros_like(gradients[0]) if params is None else params
    update = functools.partial(tx.update, params=params)
    return jax.lax.scan(lambda s, g: update(g, s)[::-1], tx.init(params), jnp.asarray(gradients))[1]


def run_reference(name, gradients, **changes):
    """Return the direction of a rule's reference for each gradient, at parameters of 1."""
    state, out = {}, []
    given = {**defaults(name), **changes}
    if "p" in RULES[name].inputs:
        given["p"] = np.ones_like(gradients[0])
    for t, g in enumerate(gradients, start=1):
        u, state = REFERENCES[name](np.asarray(g), state, t=t, **given)
        out.append(u)
    return np.stack(out)


def gradients_with_everything(steps=60):
    """Draw gradients from 1e-3 to 10 whose signs flip; one element and one step are zero."""
    rng = np.random.default_rng(1)
    g = rng.normal(size=(steps, 5, 3)) * 10.0 ** rng.uniform(-3, 1, size=(1, 5, 3))
    g[:, 0, 0] = 0
    g[7] = 0
    return g


# Storage


@rule(signed=signed, positive=positive)
def keep(g, signed, positive):
    """Store the gradient and its magnitude."""
    return g, g, abs(g)


class Stored(NamedTuple):
    """Decoded moments, by kind."""

    signed: jax.Array
    positive: jax.Array


def stored(x, storage):
    """Return x and |x| as moments of this storage hold them, rounded once."""
    tx = adam_jax.scale_by_rule(keep, storage=storage)
    _, state = tx.update(jnp.asarray(x), tx.init(jnp.zeros_like(x)))
    return Stored(**adam_jax.moments(state))


# Trees

# two leaves share a shape, because each rule is compiled for each shape
SHAPES = {"dense": {"kernel": (8, 4), "gate": (8, 4)}, "scale": ()}


def tree(seed=0, dtype=np.float32, shapes=SHAPES, scale=1.0):
    """Draw normal arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(np.asarray(scale * rng.normal(size=shape), dtype)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def normal(shape, seed=0, dtype=np.float32, scale=1.0):
    """Draw a normal array; `jax.random` would compile a program for each shape."""
    return tree(seed, dtype, shape, scale)


def shaped(tree):
    """Replace shapes by descriptions of float32 arrays."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def gpt2_small():
    """Return the shapes of GPT-2 small's 148 leaves."""
    layer = {
        "ln_1": {"scale": (768,), "bias": (768,)},
        "attn": {"kernel": (768, 2304), "bias": (2304,), "out": (768, 768), "out_bias": (768,)},
        "ln_2": {"scale": (768,), "bias": (768,)},
        "mlp": {"fc": (768, 3072), "fc_bias": (3072,), "proj": (3072, 768), "proj_bias": (768,)},
    }
    tree = {"wte": (50257, 768), "wpe": (1024, 768), "ln_f": {"scale": (768,), "bias": (768,)}}
    return shaped(tree | {f"h{i}": layer for i in range(12)})


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def leaves_of(tree):
    """Return the leaves with their paths."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


# Steps


def step_of(tx):
    """Return the step of a training loop as Optax writes it."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@contextlib.contextmanager
def traces():
    """Return a list that grows by a name for each function that JAX traces inside."""
    names = []

    def listen(event, duration, fun_name="", **details):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
        count = len(names)
        jax.jit(lambda: 0)()
        assert len(names) > count, "JAX reports traces by another name"
        del names[count:]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def masters(tx):
    """Keep 8 more bits of each bfloat16 parameter."""
    return adam_jax.master_weights(tx, bits=24)


# Devices


def modes(slow=None):
    """Parametrize a test by a mesh's axis types; the type `slow` runs in the slow set."""
    names = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    marks = {slow: pytest.mark.slow}
    return pytest.mark.parametrize(
        "axis_type", [pytest.param(m, id=k, marks=marks.get(k, ())) for k, m in names.items()]
    )


every_mode, auto_slowly, explicit_slowly = modes(), modes(slow="auto"), modes(slow="explicit")

SENT = re.compile(r"= (.*) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)\(")


def sent(program):
    """Return (operation, dtype, elements) of the collectives in a compiled program."""
    found = []
    for match in SENT.finditer(program):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            found.append((match[2], dtype, math.prod(int(n) for n in shape.split(",") if n)))
    return found


def largest_sent(program):
    """Return the size of the largest array that a collective sends."""
    return max((n for *_, n in sent(program)), default=0)


# Messages


def says(function, *parts):
    """Return a pattern for messages of a function that contain these parts in any order."""

    def whole(part):
        start, end = (r"\b" if part[k].isalnum() else "" for k in (0, -1))
        return start + re.escape(part) + end

    return rf"(?s)^{re.escape(function)}\b" + "".join(f"(?=.*{whole(part)})" for part in parts)


# Processes


class Without:
    """An import finder that hides a package, as if it weren't installed."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

"""States equal Optax's, and survive Orbax and pickle unchanged."""

from __future__ import annotations

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import adam_jax
from adam_jax import positive, rule, signed
from helpers import RULES, TYPICAL, optimizer, slow_unless_by_default, slowly, tree

STEPS = 5


def warmup(count):
    return 1e-3 * jnp.asarray(count + 1, jnp.float32)


def matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def stepper(tx):
    """Return a compiled step."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(step, params, state, seeds):
    """Return the parameters and the state after a step for each seed."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(
            lambda p, rng=rng: jnp.asarray(np.asarray(rng.normal(size=p.shape), p.dtype)), params
        )
        params, state = step(params, state, grads)
    return params, state


def through_orbax(directory, written, like):
    """Save with Orbax, and restore into the structure of `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", written)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "checkpoint", like)


def assert_same(a, b):
    """Check for equal structures, classes, dtypes, and bits."""
    chex.assert_trees_all_equal_structs(a, b)
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(a, b)


# Optax's checkpoints

CALLS = [
    ("adam", (1e-2,), {}),
    ("adam", (warmup,), {"mu_dtype": jnp.bfloat16, "nesterov": True}),
    ("adamw", (1e-2,), {}),
    ("adamw", (warmup,), {"mask": matrices, "weight_decay": 0.1}),
    ("adamw", (warmup,), {"mask": matrices, "weight_decay": warmup}),
    ("adamw", (1e-2,), {"weight_decay": 0.0}),
    ("adamw", (None,), {"weight_decay": warmup}),
    ("nadam", (warmup,), {}),
    ("nadamw", (1e-2,), {"weight_decay": warmup, "mask": {"dense": True, "scale": False}}),
    ("amsgrad", (1e-2,), {"mu_dtype": "bfloat16"}),
    ("adamax", (warmup,), {}),
    ("adamaxw", (1e-2,), {"weight_decay": warmup, "mask": matrices}),
    ("radam", (1e-2,), {"nesterov": True}),
    ("rmsprop", (1e-2,), {}),
    ("rmsprop", (1e-2,), {"centered": True}),
    ("rmsprop", (warmup,), {"momentum": 0.9, "nesterov": True, "bias_correction": True}),
    ("rmsprop", (1e-2,), {"momentum": 0.9, "centered": True, "bias_correction": True}),
    ("sgd", (1e-2,), {}),
    ("sgd", (warmup,), {"momentum": 0.9}),
    ("sgd", (1e-2,), {"momentum": 0.9, "nesterov": True, "accumulator_dtype": jnp.bfloat16}),
]


def spelled(call):
    name, args, kwargs = call
    told = [f"{k}={getattr(v, '__name__', v)}" for k, v in [*enumerate(args), *kwargs.items()]]
    return f"{name}({', '.join(told)})"


@pytest.mark.parametrize("call", CALLS, ids=spelled)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_makes_the_state_of_optax(call, dtype):
    name, args, kwargs = call
    params = tree(0, dtype)
    ours, theirs = (getattr(m, name)(*args, **kwargs).init(params) for m in (adam_jax, optax))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.standard_promotion  # Optax needs it
@pytest.mark.parametrize("direction", ["from Optax", "to Optax"])
@pytest.mark.parametrize("call", [slowly(CALLS[2]), CALLS[4]], ids=spelled)
def test_a_checkpoint_moves_between_optax_and_adam_jax(tmp_path, call, direction):
    """A run that changes libraries halfway equals the run that doesn't."""
    name, args, kwargs = call
    ours, theirs = (getattr(m, name)(*args, **kwargs) for m in (adam_jax, optax))
    first, second = (theirs, ours) if direction == "from Optax" else (ours, theirs)
    start = tree(0)
    half = run(stepper(first), start, first.init(start), range(STEPS))
    restored = through_orbax(tmp_path, half, (start, second.init(start)))
    changed = run(stepper(second), *restored, range(STEPS, 2 * STEPS))
    stayed = run(stepper(first), *half, range(STEPS, 2 * STEPS))
    chex.assert_trees_all_equal_structs(changed, stayed)
    chex.assert_trees_all_close(changed, stayed, rtol=2e-5, atol=2e-6)
    assert adam_jax.step_count(changed[1]) == 2 * STEPS


# Typical rules, and one that is unusual


@rule(first=signed, energy=positive.starting_at(0.5), last=signed)
def unusual(g, first, energy, last, *, t, b1=0.9, b2=0.99):
    """Return a direction from moments that no state of Optax has."""
    first = adam_jax.ema(b1, first, g - last)
    energy = adam_jax.ema(b2, energy, g * g)
    return (g + first) / adam_jax.sqrt(energy), first, energy, g


def every_kind(name):
    """Return an optimizer with schedules and a mask, and parameters of two dtypes."""
    keywords = {"weight_decay": warmup, "weight_decay_mask": adam_jax.not_matching("bias")}
    if name == "unusual":
        tx = adam_jax.from_rule(unusual, warmup, **keywords)
    else:
        tx = optimizer(name, warmup, **keywords)
    wide, narrow = ({"kernel": (4, 3), "bias": ()}, {"kernel": (4, 3)})
    return tx, {"wide": tree(0, shapes=wide), "narrow": tree(1, jnp.bfloat16, narrow)}


typical_rules = pytest.mark.parametrize(
    "name", ["unusual", *(slow_unless_by_default(name) for name in TYPICAL)]
)


@typical_rules
def test_a_run_resumes_from_orbax_bit_for_bit(tmp_path, name):
    """Include bfloat16 parameters, for which moments are rounded stochastically."""
    tx, params = every_kind(name)
    step = stepper(tx)
    half = run(step, params, tx.init(params), range(STEPS))
    restored = through_orbax(tmp_path, half, (params, tx.init(params)))
    assert_same(restored, half)
    assert adam_jax.step_count(restored[1]) == STEPS
    whole = run(step, *half, range(STEPS, 2 * STEPS))
    assert_same(run(step, *restored, range(STEPS, 2 * STEPS)), whole)


@typical_rules
def test_a_state_survives_pickle_and_copy(name):
    """Copy it with pickle, deepcopy, and copy, whatever its class."""
    tx, params = every_kind(name)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(rng.uniform(1, 9, size=x.shape), x.dtype)),
        tx.init(params),
    )
    for copied in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state), copy.copy(state)):
        assert_same(copied, state)
        assert type(copied[0]) is type(state[0])
        assert list(adam_jax.moments(copied)) == list({**RULES, "unusual": unusual}[name].moments)

"""Properties of every composition of optimizer, storage, wrappers, parameters, and mesh.

Hypothesis draws the compositions, a few in every run and many in the slow tests. To reproduce a
failure, add the printed `Composition(...)` to `FAILED_ONCE`, where it stays.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import re
import tempfile

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, Phase, given, settings
from jax.sharding import NamedSharding, PartitionSpec as P

import adam_jax
from adam_jax import not_matching
from compositions import Composition, Leaf, compositions, small_int8
from helpers import leaves_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(int8|compact)")  # all leaves are too small


one_or_eight = pytest.mark.parametrize(
    "devices", [1, pytest.param(8, marks=pytest.mark.eight_devices)]
)


@one_or_eight
def test_a_few_random_compositions_pass_all_checks(devices):
    """Draw the same compositions in every run."""
    fuzz(1, devices, max_examples=3 if devices == 1 else 1, phases=[Phase.generate])


@pytest.mark.slow
@one_or_eight
@pytest.mark.parametrize("part", range(2))
def test_many_random_compositions_pass_all_checks(devices, part):
    """Draw the same compositions in every run; CI at night sets another COMPOSITIONS_SEED."""
    seed = int(os.environ.get("COMPOSITIONS_SEED", 1000))
    fuzz(seed + part, devices, max_examples=30, thorough=True)


def fuzz(seed, devices, thorough=False, **given_settings):
    """Check compositions drawn with a seed, all on one device or all on a mesh."""

    @settings(
        **given_settings,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @hypothesis.seed(seed)
    @given(compositions(devices, thorough))
    def run(composition):
        check(composition, thorough)

    run()


FAILED_ONCE = {
    "int8 state made eagerly on an explicit mesh, by zero1": Composition(
        "adamw", {"storage": "int8"}, ("zero1",), {"w": Leaf((64, 128))}, mesh="explicit"
    ),
    "int8 state made eagerly on an explicit mesh, of sharded parameters": Composition(
        "adamw", {"storage": "int8"}, leaves={"w": Leaf((64, 128))}, mesh="explicit", layout="rows"
    ),
    "the edge of a shard cuts a block of a small leaf": Composition(
        "adamw",
        {"storage": small_int8},
        leaves={"w": Leaf((8, 384))},
        mesh="explicit",
        layout="columns",
        in_mesh_context=True,
    ),
    "the edge of a shard cuts a block, in xla": Composition(
        "adamw",
        {"storage": small_int8, "implementation": "xla"},
        leaves={"w": Leaf((8, 384))},
        mesh="explicit",
        layout="columns",
        in_mesh_context=True,
    ),
    "scales in Linen's boxes": Composition(
        "adamw",
        {"storage": "int8"},
        leaves={"w": Leaf((8, 512))},
        container="linen boxes",
        mesh="auto",
        layout="columns",
    ),
    "groups in zero1 of parameters in Linen's boxes": Composition(
        "adam",
        wrappers=("groups", "zero1"),
        leaves={"w": Leaf((8, 512))},
        container="linen boxes",
        mesh="auto",
    ),
    "zero1 of parameters in Linen's boxes": Composition(
        "adam",
        wrappers=("zero1",),
        leaves={"w": Leaf((8, 512))},
        container="linen boxes",
        mesh="auto",
    ),
    "sums over a tree with None, and a learning rate that the state computes": Composition(
        "prodigy", wrappers=("record",), container="list"
    ),
    "what master_weights keeps for float32 parameters, in Linen's boxes": Composition(
        "adamw",
        wrappers=("master_weights(32)",),
        leaves={"w": Leaf((8, 512))},
        container="linen boxes",
        mesh="auto",
        layout="columns",
    ),
    "a large gradient in a block of codes": Composition(
        "adamw", {"storage": "int8"}, leaves={"w": Leaf((64, 128))}, gradients="large"
    ),
    "a mask and a leaf called value": Composition(
        "adamw",
        {"weight_decay_mask": not_matching("value")},
        leaves={"key": Leaf((2,)), "value": Leaf((2,))},
        container="nested",
    ),
    "a group with a leaf called value": Composition(
        "adamw",
        wrappers=("groups",),
        leaves={"key": Leaf((2,)), "value": Leaf((2,))},
        container="nested",
    ),
    "moments of leaves with the same path": Composition("adamw", container="same paths"),
    "a record of leaves with the same path": Composition(
        "sgd", wrappers=("record",), container="same paths"
    ),
    "another's argument called apply": Composition("adamw", way="extra arguments"),
    "a complex leaf in float32": Composition(
        "adamw", {"storage": "float32"}, leaves={"w": Leaf((3,), "complex64")}
    ),
    "a complex leaf in bfloat16": Composition(
        "adamw", {"storage": "bfloat16"}, leaves={"w": Leaf((3,), "complex64")}
    ),
    "a complex iterate in float32": Composition(
        "schedule_free_adamw", {"storage": "float32"}, leaves={"w": Leaf((3,), "complex64")}
    ),
    "NumPy parameters in int8": Composition(
        "adamw", {"storage": "int8"}, leaves={"w": Leaf((64, 200))}, arrays="numpy"
    ),
    "moments of a coded leaf without elements": Composition(
        "adamw", {"storage": small_int8}, leaves={"w": Leaf((0, 3))}
    ),
    "schedule-free without leaves": Composition(
        "schedule_free_adamw", {"storage": small_int8}, container="no leaves"
    ),
}


# each has a test of its own, which is faster
TESTED_ELSEWHERE = {
    "the edge of a shard cuts a block, in xla",  # the same in tiles, above
    "groups in zero1 of parameters in Linen's boxes",  # test_flax
    "zero1 of parameters in Linen's boxes",
    "what master_weights keeps for float32 parameters, in Linen's boxes",
    "NumPy parameters in int8",  # test_contract
    "a complex leaf in bfloat16",  # in float32, above
    "a complex iterate in float32",
    "int8 state made eagerly on an explicit mesh, by zero1",  # test_sharding
    "int8 state made eagerly on an explicit mesh, of sharded parameters",
    "a large gradient in a block of codes",  # test_lossy
    "a mask and a leaf called value",  # test_paths
    "moments of leaves with the same path",
    "a record of leaves with the same path",
    "another's argument called apply",  # test_chain
}
assert FAILED_ONCE.keys() > TESTED_ELSEWHERE


@pytest.mark.parametrize(
    "composition",
    [
        pytest.param(
            c,
            id=name,
            marks=[
                *([pytest.mark.eight_devices] if c.mesh else []),
                *([pytest.mark.slow] if name in TESTED_ELSEWHERE else []),
            ],
        )
        for name, c in FAILED_ONCE.items()
    ],
)
def test_compositions_that_failed_once_pass_all_checks(composition):
    """Check compositions that showed a defect."""
    check(composition)


# What must hold


def check(composition, thorough=False):
    """Check everything that must hold for a composition."""
    one = composition.on_one_device()
    with jax.numpy_dtype_promotion(composition.promotion()):
        tx, params = one.transformation(), one.params()
        if hypothesis.currently_in_test_context():
            hypothesis.note(f"where one device has {tx!r}")
        if refused(composition, tx, params):
            return
        state = tx.init(params)
        check_init(one, tx, params, state)
        check_paths(one, params)
        check_report(tx, params, state)
        trajectory = scanned(tx, (params, state), one.grads())
        for params, state in trajectory:
            check_params(params)
            check_moments(one, params, state)
        check_recorded(one, state)
        check_steps(composition, trajectory)
        check_checkpoint(tx, trajectory[-1], thorough)


def refused(composition, tx, params):
    """Whether `init` refuses to store complex numbers as real ones, which is allowed."""
    try:
        tx.init(params)
    except (TypeError, ValueError) as error:
        if composition.stores_complex_as_real() and "complex" in str(error):
            return True
        raise
    return False


def check_init(composition, tx, params, state):
    """Check that a jitted `init` equals an eager one, on the devices of `state_sharding`."""
    mesh = composition.device_mesh()
    if mesh is None:
        jitted = jax.jit(tx.init)(params)
    elif composition.container == "linen boxes":  # as Flax's users do it
        specs = nn.get_partition_spec(jax.eval_shape(tx.init, params))
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
        )
        jitted = jax.jit(tx.init, out_shardings=shardings)(params)
    else:
        shardings = adam_jax.state_sharding(tx, params)
        jitted = jax.jit(tx.init, out_shardings=shardings)(params)
        for (path, x), sharding in zip(leaves_of(state), jax.tree.leaves(shardings), strict=True):
            whole = x.sharding.is_fully_replicated and sharding.is_fully_replicated
            assert whole or x.sharding.is_equivalent_to(sharding, x.ndim), path
    assert_types(jitted, state)
    for (path, x), y in zip(leaves_of(jitted), jax.tree.leaves(state), strict=True):
        if "radius" in path.split("/"):  # a norm, which each program sums in its own order
            np.testing.assert_allclose(x, y, rtol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(x, y, path)


def check_paths(composition, params):
    """Check that patterns match every leaf by its own path."""
    paths = composition.paths()
    for path in paths:
        found = adam_jax.matching(f"^{re.escape(path)}$")(nn.unbox(params))
        assert jax.tree.leaves(found) == [other == path for other in paths], path


def check_report(tx, params, state):
    """Check that the memory report counts the bytes of the state."""
    actual = sum(x.nbytes for x in jax.tree.leaves(state))
    assert adam_jax.memory_report(tx, params).state_bytes == actual


def check_params(params):
    """Check that finite gradients keep parameters finite."""
    for path, p in leaves_of(params):
        assert np.all(np.isfinite(np.asarray(p, np.complex64))), f"{path} isn't finite"


def check_moments(composition, params, state):
    """Check that moments have the parameters' structure, and their shapes or one number each."""
    several = "groups" in composition.wrappers
    none = composition.optimizer == "sgd" and "momentum" not in composition.arguments
    if several or none:
        return
    rule = adam_jax.rules.RULES.get(composition.optimizer)
    numbers = [k for k, m in rule.moments.items() if m.one_per_leaf] if rule else []
    for name, moment in adam_jax.moments(state).items():
        here, there = nn.unbox(moment), nn.unbox(params)
        assert jax.tree.structure(here) == jax.tree.structure(there), name
        if name in numbers:
            assert not any(map(np.ndim, jax.tree.leaves(here))), name
        else:
            chex.assert_trees_all_equal_shapes(here, there)


def check_recorded(composition, state):
    """Check that the recorded norm counts every leaf."""
    if "record" not in composition.wrappers or "MultiSteps" in composition.wrappers:
        return
    recorded = adam_jax.diagnostics.read(state)["gradient_norm/all"]
    grads = [np.asarray(g, np.complex64) for _, g in leaves_of(composition.grads()[-1])]
    norm = np.sqrt(sum(np.sum(np.abs(g) ** 2) for g in grads))
    assert recorded == pytest.approx(norm, rel=1e-2), "the norm of the gradients"


def check_steps(composition, trajectory):
    """Check that the steps follow the trajectory in one trace, and change no type.

    Every step starts on the trajectory, so that rounding doesn't add up.
    """
    traces = []
    tx, step = composition.transformation(), stepper(composition)

    def counted(here, grads):
        traces.append(here)
        return step(here, grads)

    run = counted if composition.way == "eager" else jax.jit(counted)
    with composition.context():
        params = composition.params()
        state = tx.init(params)
        if composition.mesh is not None:
            check_init(composition, tx, params, state)
        after, gradients = (params, state), composition.grads()
        last = gradients[-1]
        for grads, start, end in zip(gradients, trajectory[:-1], trajectory[1:], strict=True):
            here = placed_as(after, start)
            if grads is last and composition.mesh is None:
                here = jax.device_get(here)  # NumPy arrays, as msgpack restores them
            after = run(here, grads)
            assert_types(after, here)
            assert_close(composition, after, end, start)
    # outside of a mesh context, an eager init puts counts on one device, as Optax's does
    allowed = 1 if composition.mesh is None or composition.in_mesh_context else 2
    assert composition.way == "eager" or len(traces) <= allowed, f"{len(traces)} traces"


def check_checkpoint(tx, last, thorough):
    """Check that a checkpoint restores what was saved."""
    assert_same(pickle.loads(pickle.dumps(last)), last)
    if thorough and all(x.size for x in jax.tree.leaves(last)):  # Orbax saves no empty array
        params, state = jax.tree.map(jnp.asarray, last)
        with tempfile.TemporaryDirectory() as directory:
            read = through_orbax(directory, (params, state), (params, tx.init(params)))
        assert_same(read, last)


# Ways to step


def scanned(tx, start, grads):
    """Return parameters and state before and after each step of a scan."""

    def body(here, grads):
        after = update(tx, here, grads)
        return after, after

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    _, ends = jax.jit(functools.partial(jax.lax.scan, body, length=len(grads)))(start, stacked)
    ends = jax.device_get(ends)
    return [start, *(jax.tree.map(lambda x, t=t: x[t], ends) for t in range(len(grads)))]


def stepper(composition):
    """Return a function that makes a step in the composition's way."""
    tx, way = composition.transformation(), composition.way
    if way == "apply":
        return lambda here, grads: adam_jax.apply(tx, grads, here[1], here[0])
    if way == "extra arguments":  # our functions must reserve none of these names
        return functools.partial(update, tx, apply=True, beside=1.0, value=1.0)
    if way == "xla":
        arguments = {**composition.arguments, "implementation": "xla"}
        tx = dataclasses.replace(composition, arguments=arguments).transformation()
    return functools.partial(update, tx)


def update(tx, here, grads, **extra):
    """Make a step as Optax does."""
    params, state = here
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def placed_as(like, values):
    """Return the values in the structure and the layout of another tree.

    A state may have lost the boxes that a state without `zero1` keeps.
    """

    def place(x, y):
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            return jax.device_put(np.asarray(y), x.sharding)
        return jnp.asarray(y) if isinstance(x, jax.Array) else np.asarray(y)

    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(map(place, leaves, jax.tree.leaves(values)))


# Comparisons


def assert_types(after, before):
    """Check for equal structures, classes, shapes, and dtypes, and no weak types."""
    chex.assert_trees_all_equal_structs(after, before)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert not [path for path, x in leaves_of(after) if getattr(x, "weak_type", False)]


def assert_same(ours, expected):
    """Check for equal types and bits."""
    assert_types(ours, expected)
    chex.assert_trees_all_equal(jax.device_get(ours), jax.device_get(expected))


def assert_close(composition, ours, expected, before):
    """Check for equality up to rounding: XLA fuses a step differently in each program.

    Floating-point numbers may differ by a few units in the last place of the leaf's largest
    element, before or after the step. Stochastic rounding can turn that into the next code.
    """
    split = {"master_weights(32)", "master_weights(24)"} & {*composition.wrappers}
    if split:
        ours, expected, before = map(with_masters, (ours, expected, before))
    eps = composition.rounding()
    trees = zip(leaves_of(ours), *map(jax.tree.leaves, (expected, before)), strict=True)
    for (path, x), y, z in trees:
        x, y, z = map(np.asarray, (x, y, z))
        if split and "rest" in path.split("/"):
            continue  # a residual; the masters that it belongs to are compared
        if "signal_to_noise" in path:
            continue  # a histogram: rounding moves values on the edge of a bin
        if x.dtype in (np.int8, np.uint8):
            apart = np.abs(x.astype(np.int32) - y.astype(np.int32))
            assert not apart.size or apart.max() <= 1, f"{path}: codes {apart.max()} apart"
        elif not jnp.issubdtype(x.dtype, jnp.inexact):
            np.testing.assert_array_equal(x, y, path)
        elif x.size:
            atol = 8 * max(eps, float(jnp.finfo(x.dtype).eps)) * max(largest(y), largest(z))
            x, y, z = (np.asarray(a, np.complex128) for a in (x, y, z))
            if path.startswith("0"):  # a parameter, whose update was rounded
                atol += 2 * composition.rounding_of_gradients() * largest(y - z)
            np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=path)


def largest(x):
    """Return the largest finite magnitude."""
    x = np.abs(np.asarray(x, np.complex128))
    return np.max(x, where=np.isfinite(x), initial=0)


def with_masters(here):
    return *here, adam_jax.get_master_weights(*here)


def through_orbax(directory, written, like):
    """Return what Orbax reads back."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{directory}/checkpoint", written)
        checkpointer.wait_until_finished()
        return checkpointer.restore(f"{directory}/checkpoint", like)

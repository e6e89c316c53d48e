"""Programs compile for a described TPU or GPU with its real compiler, on a machine without one.

Needs pip install "adam_jax[aot]". Without it these tests are skipped, but not in CI.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import adam_jax
from benchmarks import aot

WHEELS = ("libtpu", "jax_cuda13_plugin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.standard_promotion,  # Optax's schedules
    pytest.mark.skipif(
        None in map(importlib.util.find_spec, WHEELS) and not os.environ.get("CI"),
        reason="needs libtpu and JAX's CUDA plugin",
    ),
]
every_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
SHAPE = (2048, 4096)


def described_mesh(kind):
    return Mesh(np.array(aot.devices(aot.TPU)), ("data",), axis_types=(kind,))


def canonical(mesh, storage):
    """Return the README's stack."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 10_000)
    mask = adam_jax.not_matching("bias", "norm")
    tx = adam_jax.chain(
        adam_jax.clip_by_global_norm(1.0),
        adam_jax.adamw(schedule, weight_decay=0.1, weight_decay_mask=mask, storage=storage),
    )
    return adam_jax.zero1(adam_jax.master_weights(tx, bits=24), mesh)


def compiled(tx, mesh, spec, dtype=jnp.bfloat16, applied=False):
    """Return the step of a kernel and a bias, compiled for the devices of the mesh."""
    sharding = NamedSharding(mesh, spec)
    params = {
        "kernel": jax.ShapeDtypeStruct(SHAPE, dtype, sharding=sharding),
        "bias": jax.ShapeDtypeStruct((16,), dtype, sharding=NamedSharding(mesh, P())),
    }
    step = functools.partial(adam_jax.apply, tx) if applied else tx.update
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            adam_jax.state_sharding(tx, params),
        )
        step = jax.jit(step, donate_argnums=(1, 2) if applied else (1,))
        return step.trace(params, state, params).lower(lowering_platforms=("tpu",)).compile()


def kernels(program):
    return program.as_text().count(f'custom_call_target="{aot.TPU.call}"')


def gathers(program):
    return aot.all_gathers(program.as_text())


@every_kind
@pytest.mark.parametrize(
    "applied, storage", [(False, "int8"), (True, "int8"), (True, "compact")], ids=str
)
def test_the_canonical_stack_compiles_to_one_kernel_per_coded_leaf(kind, applied, storage):
    mesh = described_mesh(kind)
    program = compiled(canonical(mesh, storage), mesh, P(), applied=applied)
    assert kernels(program) == 1
    assert gathers(program) == 1  # of the parameter, or of its update
    if applied:  # an update is a float32 array of the leaf's size
        assert program.memory_analysis().temp_size_in_bytes <= 2**21


@every_kind
def test_a_sharded_parameter_is_stepped_by_one_kernel_without_a_gather(kind):
    """On automatic axes zero1 gets the specs; explicit ones are in the types."""
    mesh = described_mesh(kind)
    tx = adam_jax.adamw(1e-3, storage="int8")
    if kind == AxisType.Auto:
        tx = adam_jax.zero1(tx, mesh, specs={"kernel": P("data"), "bias": P()})
    program = compiled(tx, mesh, P("data"), jnp.float32, applied=True)
    assert kernels(program) == 1 and gathers(program) == 0


def test_unknown_shardings_on_automatic_axes_warn_with_the_fix():
    mesh = described_mesh(AxisType.Auto)
    tx = adam_jax.adamw(1e-3, storage="int8")
    with pytest.warns(RuntimeWarning, match=r"explicit axes.*zero1\(tx, mesh, specs=specs\)"):
        program = compiled(tx, mesh, P("data"), jnp.float32, applied=True)
    assert kernels(program) == 0 and gathers(program) == 0


every_storage = pytest.mark.parametrize("storage", aot.STORAGES)
TPU_LIMITS = {"bfloat16": 0.5, "int8": 1.35, "compact": 1.2, "int8, master weights": 2.2}
"""The time of a kernel's instructions on a v5e, over the time of its memory traffic."""
GPU_LIMITS = {"int8": 90, "compact": 96, "int8, master weights": 133}
"""The instructions of a kernel per element on an H100."""


@every_storage
def test_a_step_on_tpu_moves_only_what_it_must(storage):
    program = aot.leaf("tpu", storage, "apply")
    assert aot.moved(program) <= 1.02
    assert program.temporaries <= 2**18
    assert aot.kernels(program) == (storage in TPU_LIMITS)
    if storage in TPU_LIMITS:
        assert aot.compute_over_memory(program) <= TPU_LIMITS[storage]


@every_storage
def test_a_step_on_gpu_moves_only_what_it_must(storage):
    """With the gradient donated: else XLA copies float32 moments, Optax's, too."""
    way = "apply" if storage == "int8, master weights" else "update"  # an update is a new array
    program = aot.leaf("gpu", storage, way)
    assert aot.moved(program) <= 1.03
    assert program.temporaries <= (6e6 if storage == "compact" else 2**16)  # partial sums
    assert aot.kernels(program) == (storage in GPU_LIMITS)
    if storage in GPU_LIMITS:
        code = aot.sass(program)
        assert code.per_element <= GPU_LIMITS[storage]
        assert code.spilled == 0 and code.narrow == 0


@pytest.mark.parametrize("storage, most", [("float32", 160), ("bfloat16", 190), ("int8", 180)])
def test_a_tree_takes_about_one_launch_for_each_of_its_148_leaves(storage, most):
    program = aot.gpt2("gpu", storage, "update")
    assert aot.launches(program) <= most


@pytest.mark.parametrize(
    "chip, way, most_moved, temporaries",
    [(aot.GPU, "update", 1.45, 16e6), (aot.TPU, "apply", 2.5, 70e6)],  # TPU: all but 2 MB in VMEM
    ids=["gpu", "tpu"],
)
def test_int8_without_a_kernel_keeps_no_float32_moments(chip, way, most_moved, temporaries):
    """The way to go on GPU when JAX removes Triton, and on TPU where a sharding is unknown."""
    tx = adam_jax.adamw(1e-3, storage="int8", implementation="xla")
    params = jax.ShapeDtypeStruct((8192, 4096), jnp.float32)
    program = aot.compiled(chip, tx, params, way)
    assert aot.kernels(program) == 0 and aot.moved(program) <= most_moved
    assert program.temporaries <= temporaries

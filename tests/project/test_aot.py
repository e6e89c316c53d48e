"""Programs compile for a TPU or GPU with its real compiler, on a machine that has neither.

Needs pip install "adam_jax[aot]". Without it these tests are skipped, but not in CI.
"""

from __future__ import annotations

import importlib.util
import os

import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P

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


@every_kind
@pytest.mark.parametrize(
    "way, storage", [("update", "int8"), ("apply", "int8"), ("apply", "compact")]
)
def test_adamw_with_masters_and_zero1_takes_one_kernel_per_quantized_leaf(kind, way, storage):
    program = aot.stack(storage, kind, way)
    assert aot.kernels(program) == 1
    assert aot.all_gathers(program) == 1  # of the parameter, or of its update
    if way == "apply":  # an update is a float32 array of the leaf's size
        assert program.temporaries <= 2**21


@every_kind
def test_a_sharded_parameter_is_stepped_by_one_kernel_without_a_gather(kind):
    """On automatic axes, zero1 gets the specs; on explicit axes, they are in the types."""
    mesh = aot.mesh(kind)
    tx = adam_jax.adamw(1e-3, storage="int8")
    if kind == AxisType.Auto:
        tx = adam_jax.zero1(tx, mesh, specs={"kernel": P("data"), "bias": P()})
    program = aot.sharded(tx, mesh, P("data"), jnp.float32)
    assert aot.kernels(program) == 1 and aot.all_gathers(program) == 0


@every_kind
def test_an_embedding_whose_shards_cut_blocks_moves_little_more_than_it_must(kind):
    """XLA stores its 192 columns per device as rows, so a kernel would need a copy."""
    mesh, spec = aot.mesh(kind), P(None, "data")
    tx = adam_jax.adamw(1e-3, storage="int8")
    if kind == AxisType.Auto:
        tx = adam_jax.zero1(tx, mesh, specs={"kernel": spec, "bias": P()})
    program = aot.sharded(tx, mesh, spec, jnp.float32, shape=(50257, 768))
    on_each = aot.moved(program) * mesh.size  # the least is the whole leaf's
    assert on_each <= 1.1 and program.temporaries <= 2**20
    assert aot.all_gathers(program) == 0


def test_unknown_shardings_on_automatic_axes_warn_with_the_fix():
    mesh = aot.mesh(AxisType.Auto)
    tx = adam_jax.adamw(1e-3, storage="int8")
    with pytest.warns(RuntimeWarning, match=r"explicit axes.*zero1\(tx, mesh, specs=specs\)"):
        program = aot.sharded(tx, mesh, P("data"), jnp.float32)
    assert aot.kernels(program) == 0 and aot.all_gathers(program) == 0


every_storage = pytest.mark.parametrize("storage", aot.STORAGES)
TPU_LIMITS = {"bfloat16": 0.5, "int8": 1.2, "compact": 1.0, "int8, master weights": 1.71}
"""The time of a kernel's instructions on a v5e, over the time of its memory traffic."""
GPU_LIMITS = {"int8": 85, "compact": 76, "int8, master weights": 105}
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
    """Donate the gradient; otherwise XLA copies float32 moments, as it does for Optax."""
    way = "apply" if storage == "int8, master weights" else "update"  # an update is a new array
    program = aot.leaf("gpu", storage, way)
    assert aot.moved(program) <= 1.03
    assert program.temporaries <= (6e6 if storage == "compact" else 2**16)  # partial sums
    assert aot.kernels(program) == (storage in GPU_LIMITS)
    if storage in GPU_LIMITS:
        code = aot.sass(program)
        assert code.per_element <= GPU_LIMITS[storage]
        assert code.spilled == 0 and code.narrow == 0


@pytest.mark.parametrize("storage, most", [("float32", 160), ("bfloat16", 160), ("int8", 180)])
def test_a_tree_takes_about_one_launch_for_each_of_its_148_leaves(storage, most):
    program = aot.gpt2("gpu", storage, "update")
    assert aot.launches(program) <= most


@pytest.mark.parametrize(
    "name, way, most_moved, temporaries",
    [("gpu", "update", 1.45, 16e6), ("tpu", "apply", 2.5, 70e6)],  # TPU: all but 2 MB in VMEM
)
def test_int8_without_a_kernel_keeps_no_float32_moments(name, way, most_moved, temporaries):
    """This is the fallback on GPU if JAX removes Triton, and on TPU for unknown shardings."""
    program = aot.fallback(name, "int8", way)
    assert aot.kernels(program) == 0 and aot.moved(program) <= most_moved
    assert program.temporaries <= temporaries


def test_master_weights_by_update_need_few_instructions_on_gpu():
    """The kernel rounds as `optax.apply_updates` does with float32 updates."""
    code = aot.sass(aot.leaf("gpu", "int8, master weights", "update"))
    assert code.per_element <= 125 and code.spilled == 0


@pytest.mark.parametrize("chip", aot.CHIPS)
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_sums_over_a_leaf_need_no_second_pass(chip, storage):
    program = aot.leaf_of(chip, adam_jax.prodigy(storage=storage))
    assert aot.moved(program) <= 1.03
    assert program.temporaries <= 2**20

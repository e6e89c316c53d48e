"""Programs compile for a described TPU with its real compiler, on a machine without a TPU.

Needs libtpu, pip install "adam_jax[aot]". Without it these tests are skipped, but not in CI.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import adam_jax

os.environ |= {  # read when libtpu is loaded, which is at the first topology
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes of pytest-xdist load it, too
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.standard_promotion,  # Optax's schedules
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None and not os.environ.get("CI"),
        reason="needs libtpu",
    ),
]
every_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
SHAPE = (2048, 4096)


def described_mesh(kind):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    return Mesh(np.array(devices), ("data",), axis_types=(kind,))


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


def count(program, operation):
    return len(re.findall(rf"\b{operation}(?:-start)?\(", program.as_text()))


def kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')


@every_kind
@pytest.mark.parametrize(
    "applied, storage", [(False, "int8"), (True, "int8"), (True, "compact")], ids=str
)
def test_the_canonical_stack_compiles_to_one_kernel_per_coded_leaf(kind, applied, storage):
    mesh = described_mesh(kind)
    program = compiled(canonical(mesh, storage), mesh, P(), applied=applied)
    assert kernels(program) == 1
    assert count(program, "all-gather") == 1  # of the parameter, or of its update
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
    assert kernels(program) == 1 and count(program, "all-gather") == 0


def test_unknown_shardings_on_automatic_axes_warn_with_the_fix():
    mesh = described_mesh(AxisType.Auto)
    tx = adam_jax.adamw(1e-3, storage="int8")
    with pytest.warns(RuntimeWarning, match=r"explicit axes.*zero1\(tx, mesh, specs=specs\)"):
        program = compiled(tx, mesh, P("data"), jnp.float32, applied=True)
    assert kernels(program) == 0 and count(program, "all-gather") == 0

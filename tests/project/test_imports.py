"""What `import adam_jax` and a step import, and the platform that decides it."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from adam_jax._engine.leaf import target_platform

STEP = """if True:
    import sys
    import jax, jax.numpy as jnp, adam_jax
    tx = adam_jax.adamw(1e-3, storage={storage!r}, implementation={implementation!r})
    params = {{"w": jnp.ones((8, 1024)), "b": jnp.ones(8)}}
    jax.jit(tx.update)(params, tx.init(params), params)
    print(*sorted(sys.modules), sep="\\n")
"""


def imported(storage, implementation):
    """The modules that a process with warnings as errors has imported after a step."""
    code = STEP.format(storage=storage, implementation=implementation)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def below(modules, *packages):
    return [m for m in modules if any(f"{m}.".startswith(f"{package}.") for package in packages)]


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_step_without_a_kernel_imports_no_pallas(storage):
    modules = imported(storage, "auto")
    assert "adam_jax._backends.choice" in modules
    assert below(modules, "jax.experimental.pallas", "jax._src.pallas") == []


def test_an_interpreted_kernel_imports_no_triton():
    modules = imported("int8", "pallas")
    assert "jax.experimental.pallas" in modules
    assert below(modules, "jax.experimental.pallas.triton", "jax._src.pallas.triton") == []


@pytest.mark.parametrize("platform", ["cuda", "rocm", "gpu", "tpu"])
def test_the_target_platform(platform, monkeypatch):
    assert target_platform() == jax.default_backend()
    device = AbstractDevice("any", num_cores=1, platform=platform)
    expected = "tpu" if platform == "tpu" else "gpu"
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert target_platform() == expected
    monkeypatch.setattr(jax, "default_backend", lambda: expected)
    assert target_platform() == expected
    for cpu in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(cpu):
            assert target_platform() == "cpu"
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert target_platform() == "cpu"  # of the mesh's devices

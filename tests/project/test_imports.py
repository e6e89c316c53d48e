"""`import adam_jax` and a step import no more than they need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """if True:
    import sys
    import jax, jax.numpy as jnp, adam_jax
    params = {"w": jnp.ones((8, 1024)), "b": jnp.ones(8)}
    for implementation, *storages in (("auto", "float32", "int8"), ("pallas", "int8")):
        for storage in storages:
            tx = adam_jax.adamw(1e-3, storage=storage, implementation=implementation)
            jax.jit(tx.update)(params, tx.init(params), params)
        print(*sorted(sys.modules))
"""


def below(modules, *packages):
    return [m for m in modules if any(f"{m}.".startswith(f"{package}.") for package in packages)]


@pytest.mark.slow
def test_only_a_step_with_a_kernel_imports_pallas_and_none_on_cpu_imports_triton():
    """Run in a process of its own, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEPS],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    plain, kernel = map(str.split, done.stdout.splitlines())
    assert "adam_jax" in plain
    assert below(plain, "jax.experimental.pallas", "jax._src.pallas") == []
    assert "jax.experimental.pallas" in kernel
    assert below(kernel, "jax.experimental.pallas.triton", "jax._src.pallas.triton") == []

"""Several processes, killed processes, and the documented memory of models."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_jax
from benchmarks.devices import MODES
from helpers import masters, sent, slowly, step_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_two_processes_train_and_save_and_one_resumes():
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / "two_processes.py"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    lines = re.findall(
        r"(\d) process.*steps (\d+) to (\d+), loss ([\d.]+); a device holds \((\d+),", ran.stdout
    )
    assert [line[:3] for line in lines] == [("2", "0", "15"), ("1", "15", "30"), ("1", "0", "30")]
    assert {line[4] for line in lines} == {"4"}  # of 32 rows, on each of 8 devices
    resumed, whole = (float(line[3]) for line in lines[1:])
    assert abs(resumed - whole) <= 1e-3


KILLED = """
import os, pathlib, signal, sys
import jax.numpy as jnp, orbax.checkpoint as ocp
import adam_jax

tx = adam_jax.adamw(1e-3, storage="int8")
params = {"w": jnp.ones((8192, 4096))}
state = tx.init(params)
manager = ocp.CheckpointManager(pathlib.Path(sys.argv[1]))
manager.save(1, args=ocp.args.StandardSave({"params": params, "state": state}))
manager.wait_until_finished()
manager.save(2, args=ocp.args.StandardSave({"params": params, "state": state}))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, env=ENVIRONMENT, timeout=120).returncode == -signal.SIGKILL
    tx = adam_jax.adamw(1e-3, storage="int8")
    like = {"params": {"w": jax.ShapeDtypeStruct((8192, 4096), jnp.float32)}}
    like["state"] = jax.eval_shape(tx.init, like["params"])
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 1
        read = manager.restore(1, args=ocp.args.StandardRestore(like))
    assert adam_jax.step_count(read["state"]) == 0 and jnp.all(read["params"]["w"] == 1)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "mode",
    [mode if "apply" in mode else slowly(mode) for mode in MODES],
)
@pytest.mark.standard_promotion
def test_the_documented_bytes_equal_those_of_real_programs(mode):
    """Count bytes from a device's buffers, and gathered arrays from the compiled program."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    narrow, spread = "bf16" in mode, mode.startswith("FSDP")
    tx = adam_jax.adamw(1e-3, storage="int8" if narrow else None)
    tx = masters(tx) if narrow else tx
    tx = adam_jax.zero1(tx, mesh) if mode.startswith("zero1") else tx
    p = jnp.ones((512, 1024), jnp.bfloat16 if narrow else jnp.float32)
    p = jax.device_put(p, NamedSharding(mesh, P("data") if spread else P()))
    state = tx.init(p)
    buffers = jax.tree.leaves((p, p, state))  # a gradient is as large as its parameter
    kept = sum(x.addressable_shards[0].data.nbytes for x in buffers)
    assert abs(kept / MODES[mode].kept(p.size, 8) - 1) <= 0.01

    def apply(p, state, g):
        return adam_jax.apply(tx, g, state, p)

    step = apply if mode.endswith("apply") else step_of(tx)
    program = jax.jit(step).lower(p, state, p).compile().as_text()
    gathered = [c for c in sent(program) if c[0] == "all-gather"]
    assert [n for *_, n in gathered] == ([p.size] if mode.startswith("zero1") else [])
    if mode.endswith("update"):  # with apply it is the parameter, which XLA:CPU gathers as float32
        assert gathered[0][1] == "f32" and MODES[mode].gathered == 4

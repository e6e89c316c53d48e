"""Train one model with ZeRO-1 in two processes, save it, and resume with one process.

    python examples/two_processes.py

starts two processes on this machine, each with four virtual CPU devices. They communicate over
loopback, as hosts of a cluster do over their network. They train, save with Orbax, and stop. One
process with all eight devices then resumes. Training in one process without a stop gives the same
loss up to rounding. On a cluster, each host executes `run`, and jax.distributed.initialize()
usually finds the other hosts by itself.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

DEVICES = 8
STEPS = 30


def run(directory: Path, until: int) -> float:
    """Train from the last checkpoint, if there is one, to step `until`, and save."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    import adam_jax

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    tx = adam_jax.chain(optax.clip_by_global_norm(1.0), adam_jax.adamw(1e-2, storage="int8"))
    tx = adam_jax.zero1(adam_jax.master_weights(tx, bits=24), mesh)

    def init():
        keys = jax.random.split(jax.random.key(0))
        params = {
            "in": 0.1 * jax.random.normal(keys[0], (32, 256)),
            "out": 0.1 * jax.random.normal(keys[1], (256, 8)),
        }
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def loss(params, x, y):
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return jnp.mean((jnp.tanh(x @ wide["in"]) @ wide["out"] - y) ** 2)

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        params, state = adam_jax.apply(tx, grads, state, params)
        return params, state, value

    def batch(t):
        """Return this process's part of the step's batch."""
        rng = np.random.default_rng(t)
        x, y = rng.normal(size=(64, 32)), rng.normal(size=(64, 8))
        mine = np.array_split(np.arange(64), jax.process_count())[jax.process_index()]
        return [
            jax.make_array_from_process_local_data(rows, a[mine].astype(np.float32)) for a in (x, y)
        ]

    params = jax.jit(init, out_shardings=whole)()
    start, state = 0, jax.jit(tx.init)(params)
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions()) as manager:
        if manager.latest_step() is not None:
            start = manager.latest_step()
            restored = manager.restore(
                start, args=ocp.args.StandardRestore({"params": params, "state": state})
            )
            params, state = restored["params"], restored["state"]
        value = None
        for t in range(start, until):
            params, state, value = step(params, state, *batch(t))
        manager.save(until, args=ocp.args.StandardSave({"params": params, "state": state}))
    codes = state.inner_state[1][0].mu.codes["in"]
    if jax.process_index() == 0:
        part = codes.addressable_shards[0].data.shape
        print(
            f"{jax.process_count()} process(es), {jax.device_count()} devices: steps {start} to "
            f"{until}, loss {value:.6f}; a device holds {part} of mu's {codes.shape}",
            flush=True,
        )
    return float(value)


def launch(processes: int, directory: Path, until: int) -> None:
    """Start the processes of one cluster and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
    }
    command = [sys.executable, __file__, "--directory", str(directory), "--until", str(until)]
    command += ["--processes", str(processes), "--port", str(port), "--process"]
    children = [subprocess.Popen([*command, str(i)], env=environment) for i in range(processes)]
    for child in children:
        if child.wait(timeout=110):
            raise SystemExit(f"a process ended with {child.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where checkpoints are kept")
    parser.add_argument("--until", type=int, default=STEPS, help="the total number of steps")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--process", type=int, help="the number of this process")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    if args.process is not None:
        if args.processes > 1:
            import jax

            jax.distributed.initialize(
                f"127.0.0.1:{args.port}", num_processes=args.processes, process_id=args.process
            )
        run(args.directory, args.until)
        return
    with tempfile.TemporaryDirectory() as scratch:
        changing, alone = Path(scratch) / "changing", Path(scratch) / "alone"
        launch(args.processes, changing, args.until // 2)
        launch(1, changing, args.until)
        launch(1, alone, args.until)


if __name__ == "__main__":
    main()

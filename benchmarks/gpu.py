"""The time of a step on a GPU, beside Optax, PyTorch, and the device's own copy.

python -m benchmarks.gpu            # writes results/gpu.json; includes torch if it has CUDA
python -m benchmarks.gpu --tiny     # small leaves, for interpreted kernels; implied on CPU

There are three trees: one leaf, GPT-2 XL, and many small leaves. "update" is update and
apply_updates in one jit, as in Flax; "apply" is adam_jax.apply. Parameters and state are donated.
An optimizer moves every parameter and all state twice, and every gradient once.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory for torch

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import adam_jax
from benchmarks import report, trees

ROUNDS = 15


class Case(NamedTuple):
    """An optimizer, its parameters' dtype, and its kinds of step."""

    make: Callable[[str], Any]
    dtype: Any = jnp.float32
    ways: tuple[str, ...] = ("update", "apply")
    in_place: bool = False
    """Whether the update is a separate array, which then takes the gradient's memory."""


def _ours(name: str, storage: str, **settings: Any) -> Callable[[str], Any]:
    make = getattr(adam_jax, name)
    return lambda kind: make(1e-3, storage=storage, implementation=kind, **settings)


def _masters(kind: str) -> Any:
    return adam_jax.master_weights(_ours("adamw", "int8")(kind), bits=24)


CASES = {
    "optax.adamw": Case(lambda _: optax.adamw(1e-3), ways=("update",)),
    "adamw float32": Case(_ours("adamw", "float32")),
    "adamw bfloat16": Case(_ours("adamw", "bfloat16")),
    "adamw int8": Case(_ours("adamw", "int8"), in_place=True),
    "adamw int8, bf16 + master_weights(24)": Case(_masters, jnp.bfloat16),
    "nadamw int8": Case(_ours("nadamw", "int8"), in_place=True),
    "lion int8": Case(_ours("lion", "int8"), in_place=True),
    "stable_adamw int8": Case(_ours("stable_adamw", "int8"), in_place=True),
}


TREES = {
    "one leaf, 512M": trees.one(2**29),
    "GPT-2 XL, 1.6B": trees.gpt2(48, 1600),
    "2000 leaves, 16M": {f"w{k}": (64, 128) for k in range(2000)},
}
TINY = {
    "one leaf": {"w": (48, 256)},
    "GPT-2's shape": trees.gpt2(1, 64, 257, 16),
    "3 leaves": {f"w{k}": (64, 128) for k in range(3)},
}


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class Run:
    """A run of an optimizer on a tree: each call makes a step and returns its seconds."""

    def __init__(self, case: Case, way: str, shapes: Any, kind: str):
        tx = case.make(kind)
        self.params, self.grads = (trees.arrays(shapes, case.dtype) for _ in range(2))
        self.state = tx.init(self.params)

        def step(grads: Any, state: Any, params: Any) -> Any:
            if way == "apply":
                return (None, *adam_jax.apply(tx, grads, state, params)[::-1])
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return updates if case.in_place else None, state, params

        self.donates_grads = case.in_place and way == "update"
        donated = (0, 1, 2) if self.donates_grads else (1, 2)
        lowered = jax.jit(step, donate_argnums=donated).lower(self.grads, self.state, self.params)
        self.step: Any = lowered.compile()
        held = bytes_of((self.params, self.grads, self.state))
        self.moved = 2 * held - bytes_of(self.grads)
        self.peak = report.peak(self.step)
        self.overhead = self.peak / held - 1

    def __call__(self) -> float:
        start = time.perf_counter()
        updates, self.state, self.params = self.step(self.grads, self.state, self.params)
        jax.block_until_ready(self.params)
        if self.donates_grads:
            self.grads = updates
        return time.perf_counter() - start


class TorchRun:
    """A run of torch.optim.AdamW(fused=True) on a tree."""

    def __init__(self, shapes: Any):
        import torch

        self.torch = torch
        torch.cuda.reset_peak_memory_stats()
        sizes = trees.shapes(shapes)
        params = [torch.nn.Parameter(torch.ones(size, device="cuda")) for size in sizes]
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        self.optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
        self.optimizer.step()
        total = sum(p.numel() for p in params)
        self.moved, self.peak, self.overhead = 28 * total, torch.cuda.max_memory_allocated(), None

    def __call__(self) -> float:
        self.torch.cuda.synchronize()
        start = time.perf_counter()
        self.optimizer.step()
        self.torch.cuda.synchronize()
        return time.perf_counter() - start


def copy_bandwidth(elements: int) -> float:
    """Return the bytes that an in-place copy reads and writes per second."""
    copy = jax.jit(lambda x: -x, donate_argnums=0)
    x = copy(jnp.ones(elements))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / float(np.median(times))


def torch_has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small leaves, implementation=pallas")
    tiny = parser.parse_args().tiny or jax.default_backend() == "cpu"
    sizes, kind = (TINY, "pallas") if tiny else (TREES, "auto")
    bandwidth = copy_bandwidth(2**14 if tiny else 2**29)
    runs: list[tuple[str, str, str, Callable[[], Any]]] = [
        (tree, name, way, lambda c=case, w=way, s=shapes: Run(c, w, s, kind))
        for tree, shapes in sizes.items()
        for name, case in CASES.items()
        for way in case.ways
    ]
    if torch_has_cuda():
        runs += [
            (tree, "torch.optim.AdamW(fused=True)", "step", lambda s=s: TorchRun(s))
            for tree, s in sizes.items()
        ]
    rows, base = [], {}
    for tree, name, way, make in tqdm(runs, leave=False):
        run = make()
        run()  # warm-up
        seconds = float(np.median([run() for _ in range(ROUNDS)]))
        base.setdefault(tree, seconds)
        rows.append(
            {
                "tree": tree,
                "optimizer": name,
                "through": way,
                "ms": f"{1e3 * seconds:.3g}",
                "× optax": f"{seconds / base[tree]:.2f}",
                "of the copy's bandwidth": f"{run.moved / seconds / bandwidth:.0%}",
                "peak, GB": f"{run.peak / 1e9:.3g}",
                "beside its operands": "-" if run.overhead is None else f"{run.overhead:.1%}",
            }
        )
        del run
        gc.collect()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    report.write("gpu-tiny" if tiny else "gpu", rows)


if __name__ == "__main__":
    main()

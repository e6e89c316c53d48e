"""The time of AdamW's step, compared with Optax, PyTorch, 8-bit packages, and the memory limit.

python -m benchmarks.step                  # all trees, 50 minutes
python -m benchmarks.step "10k" "ResNet"   # trees with one of these in their names

pip install torch==2.13.0 torchao==0.18.0 flashoptim-jax==0.1.0 adds the other packages.

A step is (params, state, gradients) → (params, state). Params and state are donated. Operands and
results are in the same order, because a donated array goes to the next result of its shape. Four
processes measure each tree, two of them with the optimizers built in reverse order. In a process,
all optimizers take turns. "× optax" is the median ratio over rounds, averaged over processes.
Programs whose operands have equal shapes and dtypes share arrays, so that memory addresses don't
favor one of them. The limit is the time to move a float32 step's 28 bytes per element at the rate
of scaling an array in place.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import adam_jax
from benchmarks import report, trees

PROCESSES = 4
ROUNDS = 12
SECONDS = 0.1  # per turn, or one step if longer
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}  # PyTorch's threads must not spin in others' turns


class Run:
    """A timed step: each call repeats it and returns the seconds per step."""

    state_bytes: int | None = None
    temporaries: int | None = None
    repeats = 1

    def step(self) -> None:
        raise NotImplementedError

    def __call__(self) -> float:
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.step()
        return (time.perf_counter() - start) / self.repeats

    def warmed(self) -> Run:
        self()
        self.repeats = max(1, round(SECONDS / self()))
        return self


class Jitted(Run):
    """A jitted step of (params, state, gradients)."""

    shared: ClassVar[dict[Any, tuple[list[jax.Array], Any]]] = {}
    """Leaves of params and state, and the gradients, by the leaves' shapes and dtypes."""

    def __init__(self, step: Callable[..., Any], params: Any, state: Any, grads: Any):
        leaves, self.treedef = jax.tree.flatten((params, state))
        types = tuple((x.shape, x.dtype) for x in leaves)
        self.arrays, self.grads = self.shared.setdefault(types, (leaves, grads))
        self.jitted = jax.jit(step, donate_argnums=(0, 1))
        compiled: Any = self.jitted.lower(params, state, grads).compile()
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        self.temporaries = compiled.memory_analysis().temp_size_in_bytes

    def step(self) -> None:
        self.held = jax.block_until_ready(self.jitted(*self.held, self.grads))

    def __call__(self) -> float:
        self.held = self.treedef.unflatten(self.arrays)
        seconds = super().__call__()
        self.arrays[:] = jax.tree.leaves(self.held)
        return seconds


def stepped(way: Callable[..., Any], tx: optax.GradientTransformation, tree: Any) -> Run:
    params = trees.arrays(tree)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return way(tx, grads, state, params)

    return Jitted(step, params, tx.init(params), trees.arrays(tree))


def update(tx: optax.GradientTransformation, grads: Any, state: Any, params: Any) -> Any:
    """Step as Optax users do."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def ours(storage: str, way: Callable[..., Any], tree: Any) -> Run:
    return stepped(way, adam_jax.adamw(1e-3, storage=storage), tree)


def optax_adamw(mu_dtype: Any, tree: Any) -> Run:
    return stepped(update, optax.adamw(1e-3, mu_dtype=mu_dtype), tree)


def flashoptim(tree: Any) -> Run:
    import flashoptim_jax  # pyright: ignore[reportMissingImports]

    params = trees.arrays(tree)
    made = flashoptim_jax.flash_adamw(1e-3, master_weight_bits=None, fused=False)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return made.step(params, state, grads)

    return Jitted(step, params, made.init(params), trees.arrays(tree))


class Torch(Run):
    """A PyTorch or torchao optimizer."""

    def __init__(self, make: Callable[[Any], Any], tree: Any):
        import torch

        params = [torch.nn.Parameter(torch.ones(shape)) for shape in trees.shapes(tree)]
        for p in params:
            p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32)).reshape(p.shape)
        self.optimizer = make(params)

    def step(self) -> None:
        self.optimizer.step()


def torch_adamw(way: str, tree: Any) -> Run:
    import torch

    return Torch(functools.partial(torch.optim.AdamW, lr=1e-3, **{way: True}), tree)


def torchao_adamw(tree: Any) -> Run:
    import torchao.optim  # pyright: ignore[reportMissingImports]

    return Torch(functools.partial(torchao.optim.AdamW8bit, lr=1e-3), tree)


class Limit(Run):
    """The time to move a float32 step's bytes, at the rate of scaling in place."""

    def __init__(self, tree: Any):
        self.x = jnp.ones(trees.elements(tree))
        self.scale = jax.jit(lambda x: x * 1.0001, donate_argnums=0)

    def step(self) -> None:
        self.x = jax.block_until_ready(self.scale(self.x))

    def __call__(self) -> float:
        return super().__call__() * 28 / 8


MAKERS: dict[str, Callable[[Any], Run]] = {
    "optax.adamw": functools.partial(optax_adamw, None),
    "adam_jax float32": functools.partial(ours, "float32", update),
    "torch fused": functools.partial(torch_adamw, "fused"),
    "torch foreach": functools.partial(torch_adamw, "foreach"),
    "limit of float32": Limit,
    "optax.adamw, mu_dtype=bfloat16": functools.partial(optax_adamw, jnp.bfloat16),
    "adam_jax bfloat16": functools.partial(ours, "bfloat16", update),
    "adam_jax int8, update": functools.partial(ours, "int8", update),
    "adam_jax int8, apply": functools.partial(ours, "int8", adam_jax.apply),
    "adam_jax compact, apply": functools.partial(ours, "compact", adam_jax.apply),
    "flashoptim-jax 8-bit": flashoptim,
    "torchao 8-bit": torchao_adamw,
}
EXACT = tuple(MAKERS)[:4]
TREES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "one leaf, 64M": (lambda: trees.one(2**26), tuple(MAKERS)),
    "GPT-2 small, 148 leaves, 124M": (trees.gpt2, tuple(MAKERS)[:-2]),
    "ResNet-50, 161 leaves, 26M": (trees.resnet50, tuple(MAKERS)[:-2]),
    "2000 equal leaves, 4M": (lambda: trees.equal(2000), EXACT),
    "2000 distinct leaves, 3M": (lambda: trees.distinct(2000), EXACT),
    "10k parameters, 6 leaves": (trees.mlp, EXACT),
}


def measure(name: str, backwards: bool) -> dict[str, Any]:
    """Return each optimizer's seconds in every round on one tree, and its bytes."""
    make, makers = TREES[name]
    tree, runs = make(), dict[str, Run]()
    for maker in tqdm(makers[::-1] if backwards else makers, desc=name, leave=False):
        try:
            runs[maker] = MAKERS[maker](tree).warmed()
        except ImportError as error:
            print(f"{maker}: {error}; skipped", file=sys.stderr)
    seconds = report.turns(runs, ROUNDS)
    return {
        maker: [seconds[maker].tolist(), run.state_bytes, run.temporaries]
        for maker, run in runs.items()
    }


def rows(name: str) -> list[dict[str, str]]:
    """Measure a tree in several processes, which differ in memory addresses."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:  # compile 2000 shapes once, not in every process
        env = os.environ | QUIET | {"JAX_COMPILATION_CACHE_DIR": cache}
        for k in range(PROCESSES):
            order = "backwards" if k % 2 else ""
            command = [sys.executable, "-m", "benchmarks.step", "--measure", name, order]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
            found.append(json.loads(ran.stdout))
    elements = trees.elements(TREES[name][0]())

    def row(maker: str) -> dict[str, str]:
        seconds = np.array([process[maker][0] for process in found])
        base = np.array([process["optax.adamw"][0] for process in found])
        _, state, temporaries = found[0][maker]
        # a geometric mean, so that both build orders count equally
        ratio = np.exp(np.log(np.median(seconds / base, axis=1)).mean())
        return {
            "tree": name,
            "AdamW": maker,
            "ms": f"{1e3 * np.median(seconds):.3g}",
            "× optax": f"{ratio:.2f}",
            "state, bytes per parameter": "" if state is None else f"{state / elements:.2f}",
            "temporaries, MB": "" if temporaries is None else f"{temporaries / 1e6:.1f}",
        }

    return [row(maker) for maker in TREES[name][1] if maker in found[0]]


def summary(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return × optax for each optimizer and tree."""
    names = dict.fromkeys(row["tree"] for row in table)
    found = {(row["AdamW"], row["tree"]): row["× optax"] for row in table}
    return [
        {"AdamW, × optax.adamw": maker, **{name: found.get((maker, name), "") for name in names}}
        for maker in dict.fromkeys(row["AdamW"] for row in table)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="*", help="substrings of tree names")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], bool(given.measure[1]))))
        return
    names = [name for name in TREES if not given.only or any(x in name for x in given.only)]
    table = [row for name in names for row in rows(name)]
    part = "-part" if given.only else ""
    report.write(f"step{part}", table)
    report.write(f"step_summary{part}", summary(table))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

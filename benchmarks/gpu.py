"""A step's time and memory on a GPU, compared with Optax, other packages, and a copy.

python -m benchmarks.gpu            # under ten minutes; writes results/gpu.json, gpu_training.json
python -m benchmarks.gpu --tiny     # small leaves, interpreted kernels; the default on CPU

pip install torch torchao bitsandbytes flashoptim-jax adds the other packages. The most telling rows
come first, and results are written after each row, so that an interrupted run keeps its rows.

"update" is update and apply_updates in one jit; "apply" is adam_jax.apply. Parameters and state are
donated. Steps are enqueued without waiting in between, as in training. A step has to move every
parameter and all state twice, and every gradient once; "of copy bandwidth" is the rate at which it
moves these bytes, over the rate of a copy.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory for torch

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import adam_jax
from benchmarks import gpt2, report, trees

ROUNDS = 9
SECONDS = 0.1  # per round, or one step if longer
MINUTES = 8.5  # no row starts later


class Unavailable(Exception):
    """A package or a device that isn't there."""


def imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"not installed: pip install {package}") from error


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# Optimizers


class Run:
    """An optimizer with its parameters, gradients, and state on the device."""

    params_bytes: int
    grads_bytes: int
    state_bytes: int
    peak: int
    """The bytes in use during a step."""

    def step(self) -> None:
        """Enqueue a step."""
        raise NotImplementedError

    def wait(self) -> None:
        """Wait until the device has finished."""
        raise NotImplementedError

    def timed(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        return (time.perf_counter() - start) / steps

    def seconds(self, rounds: int) -> float:
        steps = max(1, round(SECONDS / self.timed(1)))
        return float(np.median([self.timed(steps) for _ in range(rounds)]))

    @property
    def temporaries(self) -> int:
        return self.peak - self.params_bytes - self.grads_bytes - self.state_bytes

    @property
    def moved(self) -> int:
        return 2 * (self.params_bytes + self.state_bytes) + self.grads_bytes


class Jitted(Run):
    """A jitted step: (gradients, state, params) → (a replacement of the gradients, state, params).

    If the replacement isn't None, it takes the gradients' memory.
    """

    def __init__(self, step: Any, init: Any, tree: Any, dtype: Any, donates_grads: bool):
        self.params, self.grads = (trees.on_device(tree, dtype) for _ in range(2))
        self.state = init(self.params)
        donated = (0, 1, 2) if donates_grads else (1, 2)
        lowered = jax.jit(step, donate_argnums=donated).lower(self.grads, self.state, self.params)
        self.compiled: Any = lowered.compile()
        self.params_bytes, self.grads_bytes = bytes_of(self.params), bytes_of(self.grads)
        self.state_bytes = bytes_of(self.state)
        self.peak = report.peak(self.compiled)

    def step(self) -> None:
        new, self.state, self.params = self.compiled(self.grads, self.state, self.params)
        self.grads = self.grads if new is None else new

    def wait(self) -> None:
        jax.block_until_ready((self.grads, self.state, self.params))


def stepped(tx: Any, way: str, tree: Any, dtype: Any = jnp.float32, in_place: bool = False) -> Run:
    """Return a run of an Optax transformation; `in_place` updates take the gradients' memory."""

    def step(grads: Any, state: Any, params: Any) -> Any:
        if way == "apply":
            return (None, *adam_jax.apply(tx, grads, state, params)[::-1])
        updates, state = tx.update(grads, state, params)
        return updates if in_place else None, state, optax.apply_updates(params, updates)

    return Jitted(step, tx.init, tree, dtype, in_place)


def optax_adamw(tree: Any, implementation: str) -> Run:
    del implementation
    return stepped(optax.adamw(1e-3), "update", tree)


def ours(storage: str, way: str, tree: Any, implementation: str, rule: str = "adamw") -> Run:
    tx = getattr(adam_jax, rule)(1e-3, storage=storage, implementation=implementation)
    in_place = way == "update" and storage in ("int8", "compact")
    return stepped(tx, way, tree, in_place=in_place)


def masters(way: str, tree: Any, implementation: str) -> Run:
    tx = adam_jax.adamw(1e-3, storage="int8", implementation=implementation)
    return stepped(adam_jax.master_weights(tx, bits=24), way, tree, jnp.bfloat16)


def in_xla(tree: Any, implementation: str) -> Run:
    del implementation
    return ours("int8", "apply", tree, "xla")


def flashoptim(dtype: Any, bits: int | None, tree: Any, implementation: str) -> Run:
    """Return a run of flashoptim-jax, which has kernels for bfloat16 parameters alone."""
    del implementation
    package = imported("flashoptim_jax", "flashoptim-jax")
    fused = dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    made = package.flash_adamw(1e-3, master_weight_bits=bits, fused=fused)

    def step(grads: Any, state: Any, params: Any) -> Any:
        return (None, *made.step(params, state, grads)[::-1])

    return Jitted(step, made.init, tree, dtype, donates_grads=False)


class Torch(Run):
    """A PyTorch optimizer."""

    device = "cuda"

    def __init__(self, make: Callable[[Any, Any], Any], tree: Any, implementation: str):
        del implementation
        self.torch = torch = imported("torch", "torch")
        if not torch.cuda.is_available():
            raise Unavailable("needs CUDA")
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        params = [
            torch.nn.Parameter(torch.ones(shape, device=self.device))
            for shape in trees.shapes(tree)
        ]
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        self.optimizer = make(torch, params)
        self.step()
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        self.wait()
        self.peak = torch.cuda.max_memory_allocated() - before
        self.params_bytes = self.grads_bytes = sum(p.nbytes for p in params)
        held = [x for state in self.optimizer.state.values() for x in state.values()]
        self.state_bytes = sum(map(self._bytes, held))

    def _bytes(self, x: Any) -> int:
        """Return the bytes of a tensor, which may consist of others, as torchao's."""
        if hasattr(x, "__tensor_flatten__"):
            return sum(self._bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
        return x.nbytes if isinstance(x, self.torch.Tensor) else 0

    def step(self) -> None:
        self.optimizer.step()

    def wait(self) -> None:
        self.torch.cuda.synchronize()


def torch_fused(torch: Any, params: Any) -> Any:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def bitsandbytes(torch: Any, params: Any) -> Any:
    del torch
    return imported("bitsandbytes", "bitsandbytes").optim.AdamW8bit(params, lr=1e-3)


def torchao(torch: Any, params: Any) -> Any:
    del torch
    return imported("torchao.optim", "torchao").AdamW8bit(params, lr=1e-3)


MAKERS: dict[str, Callable[[Any, str], Run]] = {
    "optax.adamw": optax_adamw,
    "adam_jax float32, update": functools.partial(ours, "float32", "update"),
    "adam_jax int8, apply": functools.partial(ours, "int8", "apply"),
    "adam_jax compact, apply": functools.partial(ours, "compact", "apply"),
    "adam_jax int8, bf16 + master_weights(24), apply": functools.partial(masters, "apply"),
    "torch fused": functools.partial(Torch, torch_fused),
    "bitsandbytes 8-bit": functools.partial(Torch, bitsandbytes),
    "flashoptim-jax 8-bit, bf16 + 24-bit masters": functools.partial(flashoptim, jnp.bfloat16, 24),
    "flashoptim-jax 8-bit": functools.partial(flashoptim, jnp.float32, None),
    "torchao 8-bit": functools.partial(Torch, torchao),
    "adam_jax bfloat16, update": functools.partial(ours, "bfloat16", "update"),
    "adam_jax int8, update": functools.partial(ours, "int8", "update"),
    "adam_jax int8 in XLA, apply": in_xla,
    "adam_jax int8, bf16 + master_weights(24), update": functools.partial(masters, "update"),
    "adam_jax lion int8, apply": functools.partial(ours, "int8", "apply", rule="lion"),
    "adam_jax stable_adamw int8, apply": functools.partial(
        ours, "int8", "apply", rule="stable_adamw"
    ),
}
TREES = {
    "one leaf, 512M": (trees.one(2**29), tuple(MAKERS)),
    "GPT-2 small, 148 leaves, 124M": (trees.gpt2(), tuple(MAKERS)[:12]),
}
TINY = {
    "one leaf": ({"w": (48, 256)}, tuple(MAKERS)),
    "3 leaves": ({f"w{k}": (64, 128) for k in range(3)}, tuple(MAKERS)[:3]),
}


def copy_bandwidth(elements: int) -> float:
    """Return the bytes that a copy in place reads and writes per second."""
    copy = jax.jit(lambda x: -x, donate_argnums=0)
    x = copy(jnp.ones(elements))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / float(np.median(times))


class Baseline(NamedTuple):
    """The baselines for the times of steps."""

    bandwidth: float
    optax: dict[str, float]
    """The seconds of optax.adamw, by tree."""


def step_row(title: str, tree: Any, name: str, base: Baseline, tiny: bool) -> dict[str, Any]:
    start = time.perf_counter()
    run = MAKERS[name](tree, "pallas" if tiny else "auto")
    run.timed(1)
    prepared = time.perf_counter() - start
    seconds = run.seconds(2 if tiny else ROUNDS)
    if name == "optax.adamw":
        base.optax[title] = seconds
    ratio = f"{seconds / base.optax[title]:.2f}" if title in base.optax else "-"
    return {
        "tree": title,
        "AdamW": name,
        "ms": f"{1e3 * seconds:.3g}",
        "× optax": ratio,
        "of copy bandwidth": f"{run.moved / seconds / base.bandwidth:.0%}",
        "state, bytes per parameter": f"{run.state_bytes / trees.elements(tree):.2f}",
        "temporaries, MB": f"{run.temporaries / 1e6:.1f}",
        "peak, GB": f"{run.peak / 1e9:.3g}",
        "until the first step, s": f"{prepared:.1f}",
    }


# A training step


def clipped(storage: str) -> Any:
    return adam_jax.chain(
        adam_jax.clip_by_global_norm(1.0), adam_jax.adamw(1e-3, weight_decay=0.1, storage=storage)
    )


TRAINED: dict[str, tuple[Callable[[], Any], Any]] = {
    "optax.adamw": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1)),
        jnp.float32,
    ),
    "adam_jax int8": (lambda: clipped("int8"), jnp.float32),
    "adam_jax int8, bf16 + master_weights(24)": (
        lambda: adam_jax.master_weights(clipped("int8"), bits=24),
        jnp.bfloat16,
    ),
    "adam_jax compact": (lambda: clipped("compact"), jnp.float32),
}


def training_row(name: str, tiny: bool) -> dict[str, Any]:
    """Train GPT-2 for some steps, alone in its process, so that the device's peak is its own."""
    make, dtype = TRAINED[name]
    tree, batch = (trees.gpt2(1, 64, 257, 16), 2) if tiny else (trees.gpt2(), 8)
    tx, context = make(), tree["wpe"][0]
    params = jax.tree.map(lambda x: 0.02 * x, trees.on_device(tree, dtype))
    state = tx.init(params)
    tokens = jax.random.randint(jax.random.key(0), (batch, context + 1), 0, tree["wte"][0])

    def train(params: Any, state: Any, tokens: Any) -> Any:
        return adam_jax.apply(tx, jax.grad(gpt2.loss)(params, tokens), state, params)

    start = time.perf_counter()
    options: Any = {"xla_backend_optimization_level": 0} if tiny else {}  # compiles faster
    lowered = jax.jit(train, donate_argnums=(0, 1)).lower(params, state, tokens)
    compiled: Any = lowered.compile(options)
    prepared = time.perf_counter() - start
    held = bytes_of(state)
    times = []
    for _ in range(3 if tiny else 20):
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, tokens))
        times.append(time.perf_counter() - start)
    stats = jax.devices()[0].memory_stats()  # None on CPU
    return {
        f"GPT-2 of {trees.elements(tree) / 1e6:.3g}M, {batch} × {context} tokens": name,
        "training step, ms": f"{1e3 * np.median(times):.3g}",
        "state, GB": f"{held / 1e9:.3g}",
        "peak by XLA's analysis, GB": f"{report.peak(compiled) / 1e9:.3g}",
        "peak on the device, GB": f"{stats['peak_bytes_in_use'] / 1e9:.3g}" if stats else "-",
        "compiling, s": f"{prepared:.1f}",
    }


def trained_alone(name: str, tiny: bool) -> dict[str, Any]:
    """Measure a row in a new process."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--training", name, *["--tiny"] * tiny]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=150)
    return json.loads(done.stdout.splitlines()[-1])


# Both tables


def cases(bandwidth: float, tiny: bool) -> list[tuple[str, str, Callable[[bool], Any]]]:
    """Return the table, the title, and the measurement of each row, the most telling first."""
    base, suffix = Baseline(bandwidth, {}), "-tiny" if tiny else ""
    steps = [
        [
            (f"gpu{suffix}", f"{tree}, {name}", functools.partial(step_row, tree, x, name, base))
            for name in names
        ]
        for tree, (x, names) in (TINY if tiny else TREES).items()
    ]
    trained = list(TRAINED)[: 2 if tiny else None]
    training = [
        (f"gpu_training{suffix}", f"training, {name}", functools.partial(trained_alone, name))
        for name in trained
    ]
    return [*steps[0], *training, *steps[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small leaves, implementation=pallas")
    parser.add_argument("--training", choices=TRAINED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    tiny = given.tiny or jax.default_backend() == "cpu"
    if given.training:
        print(json.dumps(training_row(given.training, tiny)))
        return
    begin = time.monotonic()
    bandwidth = copy_bandwidth(2**14 if tiny else 2**29)
    print(f"{jax.devices()[0].device_kind}: a copy moves {bandwidth / 1e9:.0f} GB/s")

    tables: dict[str, list[dict[str, Any]]] = {}
    failed = []
    for table, title, measure in (bar := tqdm(cases(bandwidth, tiny), leave=False)):
        bar.set_postfix_str(title)
        if time.monotonic() - begin > 60 * MINUTES:
            tqdm.write(f"{title}: left out after {MINUTES} minutes")
            continue
        try:
            row = measure(tiny)
        except Unavailable as reason:
            tqdm.write(f"{title}: {reason}")
        except Exception:  # the other rows may still be measured
            failed.append(title)
            tqdm.write(f"{title}: {traceback.format_exc()}")
        else:
            tqdm.write(", ".join(f"{key}: {value}" for key, value in row.items()))
            tables.setdefault(table, []).append(row)
            report.save(table, tables[table])
        gc.collect()
    for table, found in tables.items():
        report.write(table, found)
    if failed:
        sys.exit(f"benchmarks.gpu: {len(failed)} rows failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

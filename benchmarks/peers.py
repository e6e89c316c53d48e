"""Low-precision state, compared with flashoptim-jax and torchao.

pip install flashoptim-jax torchao torch && python -m benchmarks.peers

Every optimizer gets the same gradients. The table has the bytes of state, the temporaries of a
compiled step on a leaf of 64M elements, the largest step if gradient scales vary inside a block,
and nu 2500 steps after half of each block's gradients fell tenfold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import adam_jax
from benchmarks import report

SHAPE = (64, 512)
RATE = 2.0**-10
EVEN = np.arange(SHAPE[1]) % 2 == 0


def spread_gradients(spread: float, steps: int = 200) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    scale = np.exp(spread * rng.normal(size=SHAPE))
    for _ in range(steps):
        yield (scale * rng.normal(size=SHAPE)).astype(np.float32)


def falling_gradients(before: int = 1000, after: int = 2500) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for t in range(before + after):
        g = rng.normal(size=SHAPE).astype(np.float32)
        yield g * np.where(EVEN & (t >= before), np.float32(0.1), np.float32(1))


class Ours:
    """adam_jax with one storage format."""

    def __init__(self, storage: str):
        self.tx = adam_jax.adamw(RATE, weight_decay=0.0, storage=storage)
        self.p = jnp.zeros(SHAPE)
        self.state = self.tx.init(self.p)
        self.step = jax.jit(self._step)

    def _step(self, p: Any, state: Any, g: Any) -> Any:
        updates, state = self.tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    def advance(self, g: np.ndarray) -> float:
        before = self.p
        self.p, self.state = self.step(self.p, self.state, g)
        return float(jnp.max(jnp.abs(self.p - before))) / RATE

    def nu(self) -> np.ndarray:
        return np.asarray(adam_jax.moments(self.state)["nu"])

    def state_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.state))

    def temporaries(self) -> str:
        """Return a step's temporaries for 64M float32 parameters, all donated."""
        p = jax.ShapeDtypeStruct((65536, 1024), jnp.float32)
        state = jax.eval_shape(self.init, p)
        compiled = jax.jit(self._step, donate_argnums=(0, 1, 2)).lower(p, state, p).compile()
        return f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB"

    def init(self, p: Any) -> Any:
        return self.tx.init(p)


class Flash(Ours):
    """flashoptim-jax's 8-bit AdamW on float32 parameters."""

    def __init__(self) -> None:
        import flashoptim_jax

        self.package = flashoptim_jax
        self.optimizer = flashoptim_jax.flash_adamw(
            RATE, weight_decay=0.0, master_weight_bits=None, fused=False
        )
        self.p = jnp.zeros(SHAPE)
        self.state = self.optimizer.init(self.p)
        self.step = jax.jit(self._step)

    def _step(self, p: Any, state: Any, g: Any) -> Any:
        return self.optimizer.step(p, state, g)

    def init(self, p: Any) -> Any:
        return self.optimizer.init(p)

    def nu(self) -> np.ndarray:
        return np.asarray(self.package.dequantize_variance(self.state.nu))


class Torch:
    """A torchao optimizer."""

    def __init__(self, name: str):
        import torch
        import torchao.optim

        self.torch = torch
        self.p = torch.nn.Parameter(torch.zeros(SHAPE))
        self.optimizer = getattr(torchao.optim, name)([self.p], lr=RATE, weight_decay=0.0)

    def advance(self, g: np.ndarray) -> float:
        before = self.p.detach().clone()
        self.p.grad = self.torch.from_numpy(g)
        self.optimizer.step()
        return float((self.p.detach() - before).abs().max()) / RATE

    def nu(self) -> np.ndarray:
        return self.optimizer.state[self.p]["exp_avg_sq"].dequantize().numpy()

    def state_bytes(self) -> int:
        total = 0
        for name in ("exp_avg", "exp_avg_sq"):
            moment = self.optimizer.state[self.p][name]
            inner = [getattr(moment, field) for field in moment.__tensor_flatten__()[0]]
            # without the 256 decoded values, which all leaves share
            total += sum(x.nbytes for x in inner if x.numel() != 256)
        return total

    def temporaries(self) -> str:
        return "-"


MAKERS: dict[str, Callable[[], Any]] = {
    "adam_jax float32": functools.partial(Ours, "float32"),
    "adam_jax bfloat16": functools.partial(Ours, "bfloat16"),
    "adam_jax int8": functools.partial(Ours, "int8"),
    "adam_jax compact": functools.partial(Ours, "compact"),
    "flashoptim-jax 8-bit": Flash,
    "torchao 8-bit": functools.partial(Torch, "AdamW8bit"),
    "torchao fp8": functools.partial(Torch, "AdamWFp8"),
    "torchao 4-bit": functools.partial(Torch, "AdamW4bit"),
}


def row(name: str, make: Callable[[], Any], exact: np.ndarray) -> dict[str, str]:
    largest = {}
    for spread in (0.3, 1.0, 2.0):
        optimizer = make()
        largest[spread] = max(optimizer.advance(g) for g in spread_gradients(spread))
    optimizer = make()
    for g in falling_gradients():
        optimizer.advance(g)
    return {
        "optimizer": name,
        "state, bytes per parameter": f"{optimizer.state_bytes() / np.prod(SHAPE):.3f}",
        "temporaries, 64M": optimizer.temporaries(),
        **{f"largest step, spread {k:g}": f"{v:,.1f}" for k, v in largest.items()},
        "nu after its gradients fell": f"{(optimizer.nu() / exact)[:, EVEN].mean():.2f}",
    }


def main() -> None:
    exact = Ours("float32")
    for g in falling_gradients():
        exact.advance(g)
    rows = []
    for name, make in (bar := tqdm(MAKERS.items())):
        bar.set_postfix_str(name)
        try:
            rows.append(row(name, make, exact.nu()))
        except ImportError as error:
            print(f"{name}: {error}; skipped")
    report.write("peers", rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

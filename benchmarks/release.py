"""Memory and time of a training step with gradient release, on CPU and compiled for a TPU v5e.

python -m benchmarks.release            # every row
python -m benchmarks.release cpu int8   # the rows whose names contain every word

Only the time is measured by running steps. The v5e rows need pip install -e ".[aot]".
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import aot, report  # isort: skip  # aot sets the environment that libtpu reads

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

import adam_jax

VOCABULARY = 256
HEAD = 64


class Model(NamedTuple):
    """A Transformer, with an embedding that is tied to the head."""

    layers: int
    width: int
    batch: int
    length: int
    dtype: Any

    def params(self) -> Any:
        def described(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, self.dtype)

        n, width = self.layers, self.width
        return {
            "outer": {"embedding": described(VOCABULARY, width), "norm": described(width)},
            "layers": {
                "qkv": described(n, width, 3 * width),
                "out": described(n, width, width),
                "up": described(n, width, 4 * width),
                "down": described(n, 4 * width, width),
                "norms": described(n, 2, width),
            },
        }

    def tokens(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.length + 1), jnp.int32)

    def inputs(self) -> int:
        """Return the bytes of the inputs of all layers."""
        tokens = self.layers * self.batch * self.length
        return tokens * self.width * jnp.dtype(self.dtype).itemsize


def normalized(h: jax.Array, scale: jax.Array) -> jax.Array:
    x = h.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x.astype(h.dtype) * scale


def first(outer: Any, tokens: jax.Array) -> jax.Array:
    return outer["embedding"][tokens[:, :-1]]


def layer(p: Any, h: jax.Array) -> jax.Array:
    qkv = (normalized(h, p["norms"][0]) @ p["qkv"]).reshape(*h.shape[:2], 3, -1, HEAD)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
    h = h + mixed @ p["out"]
    return h + jax.nn.gelu(normalized(h, p["norms"][1]) @ p["up"]) @ p["down"]


def last(outer: Any, h: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = (normalized(h, outer["norm"]) @ outer["embedding"].T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def loss(params: Any, tokens: jax.Array) -> jax.Array:
    """Return the loss of a scan over rematerialized layers."""
    h = first(params["outer"], tokens)
    remat = jax.checkpoint(layer)
    h, _ = jax.lax.scan(lambda h, p: (remat(p, h), None), h, params["layers"])
    return last(params["outer"], h, tokens)


class Step(NamedTuple):
    """A training step, and the initialization of its state."""

    init: Callable[[Any], Any]
    step: Callable[..., Any]


def released(tx: Any) -> Step:
    step = adam_jax.gradient_release(tx, first=first, layer=layer, last=last)
    return Step(step.init, step)


def plain(tx: Any) -> Step:
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        return *adam_jax.apply(tx, grads, state, params), value

    return Step(tx.init, step)


WAYS = {"plain": plain, "released": released}


def adamw(storage: str) -> Any:
    return adam_jax.adamw(1e-3, storage=storage)


def masters(storage: str) -> Any:
    return adam_jax.master_weights(adamw(storage), bits=24)


OPTIMIZERS: dict[str, tuple[Callable[[], Any], Any]] = {
    **{
        f"{storage} state": (functools.partial(adamw, storage), jnp.float32)
        for storage in ("float32", "bfloat16", "int8", "compact")
    },
    **{
        f"bfloat16 parameters, masters, {storage} state": (
            functools.partial(masters, storage),
            jnp.bfloat16,
        )
        for storage in ("int8", "compact")
    },
}
"""How to make each optimizer, and the parameters' dtype."""


def row(where: str, name: str, way: str) -> dict[str, str]:
    """Compile a step; return its memory per parameter and relative to one layer's gradient."""
    make, dtype = OPTIMIZERS[name]
    on_tpu = where == "v5e"
    model = Model(48, 2048, 1, 512, dtype) if on_tpu else Model(24, 512, 1, 64, dtype)
    step, params = WAYS[way](make()), model.params()

    def compiled(place: Callable[[Any], Any], *platforms: str) -> Any:
        operands = map(place, (params, jax.eval_shape(step.init, params), model.tokens()))
        traced = jax.jit(step.step, donate_argnums=(0, 1)).trace(*operands)
        return traced.lower(lowering_platforms=platforms or None).compile()

    if on_tpu:
        sharding = SingleDeviceSharding(aot.devices(aot.TPU)[0])
        with aot.there(aot.TPU):
            program = compiled(
                lambda tree: jax.tree.map(lambda x: x.update(sharding=sharding), tree), "tpu"
            )
    else:
        program = compiled(lambda tree: tree)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    one = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(params["layers"]))
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {
        "step": f"{where}, {name}, {way}",
        "all in, bytes per parameter": f"{report.peak(program) / count:.2f}",
        "temporaries, MB": f"{temporaries / 1e6:.1f}",
        "of them layer inputs": f"{model.inputs() / 1e6:.1f}",
        "temporaries / one layer's gradient": f"{temporaries / one:.1f}",
    }


def seconds(rounds: int = 25) -> dict[str, np.ndarray]:
    """Return the times of steps of 6 layers of width 512, in turns."""
    model = Model(6, 512, 4, 128, jnp.float32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / 50, x.dtype), model.params()
    )
    tokens = jnp.asarray(rng.integers(VOCABULARY, size=model.tokens().shape))

    def timed(way: str) -> Callable[[], float]:
        step = WAYS[way](adamw("float32"))
        jitted = jax.jit(step.step, donate_argnums=(0, 1))
        held = [jax.tree.map(jnp.copy, params), step.init(params)]

        def run() -> float:
            start = time.perf_counter()
            held[0], held[1], _ = jax.block_until_ready(jitted(*held, tokens))
            return time.perf_counter() - start

        run()
        return run

    return report.turns({way: timed(way) for way in WAYS}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows that contain these words")
    words = parser.parse_args().words
    cases = [("cpu", name, way) for name in OPTIMIZERS for way in WAYS] + [
        ("v5e", name, way)
        for name, (_, dtype) in OPTIMIZERS.items()
        for way in WAYS
        # other steps don't fit in 16 GB
        if dtype == jnp.bfloat16 and (way == "released" or "compact" in name)
    ]
    rows = [row(*case) for case in cases if all(word in ", ".join(case) for word in words)]
    if words:
        print(report.table(rows))
        return
    report.write("release", rows)
    times = seconds()
    ratio = np.median(times["released"] / times["plain"])
    medians = {f"{way}, s": f"{np.median(x):.3f}" for way, x in times.items()}
    report.write("release_time", [{**medians, "released / plain": f"{ratio:.3f}"}])


if __name__ == "__main__":
    main()

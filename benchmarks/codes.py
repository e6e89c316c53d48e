"""A comparison of 8-bit and 4-bit codes: error, largest step, and nu after gradients fall.

Each code is a pair of formats in the library's own blocks, so that Adam runs on it unchanged. The
goals: displacement error at most 1e-3, no step above 4 learning rates, nu that follows its
gradients (a ratio of 1). python -m benchmarks.codes
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from tqdm import tqdm

import adam_jax
from adam_jax.storage import FORMATS, Code, Format, _int8
from adam_jax.storage._formats import code_of
from benchmarks import report

Curve = tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]

CURVES: dict[str, Curve] = {
    "linear": (lambda y: y, lambda z: z),
    "square root": (jnp.sqrt, jnp.square),
    "fourth root": (lambda y: y**0.25, lambda z: z**4),
    "softsign": (lambda y: 2 * y / (1 + y), lambda z: z / (2 - z)),
    "logarithm": (
        lambda y: jnp.where(y > 0, jnp.maximum(1 + jnp.log2(jnp.maximum(y, 1e-30)) / 32, 0), 0),
        lambda z: jnp.where(z > 0, jnp.exp2(32 * (z - 1)), 0),
    ),
}


def coded(curve: Curve, n: int, dtype, *, stochastic: bool, floor: int, block: int = 128) -> Code:
    """Return a code of n levels spaced evenly in curve(y), with stochastic or nearest rounding."""
    transform, inverse = curve

    def encode(y: jax.Array, draw: jax.Array) -> jax.Array:
        size = jnp.abs(y)
        low = jnp.clip(jnp.floor(transform(size) * n), 0, n - 1)
        below, above = inverse(low / n), inverse((low + 1) / n)
        up = (size - below) > (above - below) * (draw if stochastic else 0.5)
        q = jnp.where(size > 0, jnp.maximum(low + up, floor), 0)
        return jnp.where(y < 0, -q, q).astype(jnp.int32).astype(dtype)

    def decode(codes: jax.Array) -> jax.Array:
        q = codes.astype(jnp.float32)
        return jnp.sign(q) * inverse(jnp.abs(q) / n)

    return Code(dtype, encode, decode, block)


def pair(mu: str, nu: str, *, stochastic=True, floor=1, bits=8, block=128) -> Format:
    n = 2 ** (bits - 1) - 1
    return Format(
        coded(CURVES[mu], n, jnp.int8, stochastic=stochastic, floor=0, block=block),
        coded(CURVES[nu], 2 * n + 1, jnp.uint8, stochastic=stochastic, floor=floor, block=block),
    )


def float8(dtype, largest: float) -> Code:
    return Code(
        dtype,
        lambda y, draw: (y * largest).astype(dtype),
        lambda codes: codes.astype(jnp.float32) / largest,
    )


CANDIDATES = {
    "int8 (shipped)": Format(_int8.SIGNED, _int8.POSITIVE),
    "square root, block 64": pair("square root", "square root", block=64),
    "square root, block 256": pair("square root", "square root", block=256),
    "square root, nearest": pair("square root", "square root", stochastic=False),
    "square root, nu may become 0": pair("square root", "square root", floor=0),
    "softsign and square root": pair("softsign", "square root"),
    "linear": pair("linear", "linear"),
    "square root and fourth root": pair("square root", "fourth root"),
    "square root and logarithm": pair("square root", "logarithm"),
    "float8 e4m3": Format(float8(jnp.float8_e4m3fn, 448.0), float8(jnp.float8_e4m3b11fnuz, 30.0)),
    "4 bits, square root, block 32": pair("square root", "square root", bits=4, block=32),
    "4 bits, square root, block 128": pair("square root", "square root", bits=4),
}


def moved(storage: str, spread: float, steps: int = 200) -> tuple[jax.Array, jax.Array]:
    """Return Adam's displacement and largest step for gradient scales of exp(spread·N(0, 1))."""
    sizes, seed = jax.random.key(0), jax.random.key(1)
    scale = jnp.exp(spread * jax.random.normal(sizes, (64, 512)))
    tx = adam_jax.scale_by_adam(storage=storage)

    def step(carry, t):
        state, total, largest = carry
        g = scale * jax.random.normal(jax.random.fold_in(seed, t), scale.shape)
        u, state = tx.update(g, state)
        return (state, total + u, jnp.maximum(largest, jnp.max(jnp.abs(u)))), None

    start = (tx.init(scale), jnp.zeros_like(scale), jnp.float32(0))
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps))[0][1:])()


def followed(storage: str, steps: int = 6000) -> jax.Array:
    """Return the mean nu of the half of each block whose gradients fall tenfold at step 1000."""
    even = jnp.arange(512) % 2 == 0
    tx = adam_jax.scale_by_adam(storage=storage)

    def step(state, t):
        g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (64, 512))
        return tx.update(g * jnp.where((t >= 1000) & even, 0.1, 1.0), state)[1], None

    start = tx.init(jnp.zeros((64, 512)))
    state = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps))[0])()
    return jnp.mean(adam_jax.moments(state)["nu"], where=even)


def row(name: str) -> dict[str, str]:
    format = FORMATS[name]
    displacement = []
    for spread in (0.3, 1.0):
        exact, got = moved("float32", spread)[0], moved(name, spread)[0]
        displacement.append(jnp.mean((got - exact) ** 2) / jnp.mean(exact**2))
    bits = 4 if name.startswith("4") else 8
    size = 2 * bits / 8 + sum(4 / code.block for code in format)
    return {
        "code": name,
        "bytes for mu and nu": f"{size:.3f}",
        "displacement error, spread .3": f"{displacement[0]:.1e}",
        "spread 1": f"{displacement[1]:.1e}",
        "largest step, spread .3": f"{moved(name, 0.3)[1]:.1f}",
        "spread 2": f"{moved(name, 2.0)[1]:.4g}",
        "nu after its gradients fell": f"{followed(name) / followed('float32'):.3g}",
    }


def main() -> None:
    rows = []
    for name, format in tqdm(CANDIDATES.items()):
        before = dict(FORMATS)
        FORMATS.clear()  # a dtype identifies only one code
        FORMATS[name] = format
        code_of.cache_clear()
        jax.clear_caches()
        rows.append(row(name))
        FORMATS.clear()
        FORMATS.update(before)
        code_of.cache_clear()
    report.write("codes", rows)


if __name__ == "__main__":
    main()

"""Small problems in plain JAX for `python -m adam_jax compare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._util.typing import PyTree
from adam_jax.optimizers.schedule_free_adamw import schedule_free_adamw

CONTEXT = 64
WIDTH = 64
HEADS = 4
LAYERS = 2
FIRST, LAST = 31, 126  # 32 to 126 are space to tilde; 31 stands for all other characters


class Task(NamedTuple):
    """The arguments of `compare` for a problem, with defaults."""

    about: str
    """A description in one line."""
    init: Callable[[jax.Array], optax.Params]
    loss: Callable[[PyTree, PyTree], jax.Array]
    batches: Callable[[int], PyTree]
    """Returns a batch for each step."""
    steps: int
    learning_rates: tuple[float, ...]
    seeds: int


def scheduled(
    make: Callable[..., optax.GradientTransformation], steps: int
) -> Callable[[float | jax.Array], optax.GradientTransformation]:
    """Return the constructor with a learning rate that rises for a tenth of the steps.

    Except for Schedule-Free, it then falls linearly to 0.
    """
    rise = max(1, steps // 10)
    if make is schedule_free_adamw:
        return lambda peak: schedule_free_adamw(peak, warmup_steps=rise)

    def factor(count: jax.Array) -> jax.Array:
        step = count.astype(jnp.float32) + 1
        return jnp.minimum(step / rise, (steps + 1 - step) / (steps + 1 - rise))

    return lambda peak: make(lambda count: peak * factor(count))


def digits_batches(steps: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return random images and labels from scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    drawn = np.random.default_rng(0).integers(len(images), size=(steps, size))
    return (images / 16).astype(np.float32)[drawn], labels.astype(np.int32)[drawn]


def digits_init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Return three layers, each with a kernel and a bias."""
    sizes = zip((64, 128, 128), (128, 128, 10), strict=True)
    return {
        f"layer{i}": {"kernel": _dense(key, *shape), "bias": jnp.zeros(shape[1])}
        for i, (key, shape) in enumerate(zip(jax.random.split(key, 3), sizes, strict=True))
    }


def digits_loss(
    params: dict[str, dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Return the cross-entropy of a small network, in nats per image."""
    x, labels = batch
    for name, layer in params.items():
        x = x if name == "layer0" else jax.nn.relu(x)
        x = x @ layer["kernel"] + layer["bias"][None]
    return _cross_entropy(x, labels)


def characters_batches(steps: int, size: int = 8) -> np.ndarray:
    """Return windows of the language reference that ships with Python, as codes from 0."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n".join(topics.values()).encode("latin-1", "replace"), np.uint8)
    codes = np.where((text > FIRST) & (text <= LAST), text - FIRST, 0).astype(np.uint8)
    starts = np.random.default_rng(0).integers(len(codes) - CONTEXT, size=(steps, size))
    return codes[starts[..., None] + np.arange(CONTEXT + 1)]


def characters_init(key: jax.Array) -> PyTree:
    """Return a two-layer Transformer without biases: 115 thousand parameters."""
    keys = iter(jax.random.split(key, 3 + 4 * LAYERS))
    characters = LAST - FIRST + 1
    return {
        "characters": 0.02 * jax.random.normal(next(keys), (characters, WIDTH)),
        "positions": 0.02 * jax.random.normal(next(keys), (CONTEXT, WIDTH)),
        "layers": [
            {
                "attend": _dense(next(keys), WIDTH, 3 * WIDTH),
                "merge": _dense(next(keys), WIDTH, WIDTH),
                "widen": _dense(next(keys), WIDTH, 4 * WIDTH),
                "narrow": _dense(next(keys), 4 * WIDTH, WIDTH),
            }
            for _ in range(LAYERS)
        ],
        "head": _dense(next(keys), WIDTH, characters),
    }


def characters_loss(params: PyTree, windows: jax.Array) -> jax.Array:
    """Return the cross-entropy of the next character, in nats."""
    codes = windows.astype(jnp.int32)
    return _cross_entropy(characters_logits(params, codes[:, :-1]), codes[:, 1:])


def characters_logits(params: PyTree, codes: jax.Array) -> jax.Array:
    """Return the Transformer's logits for each next character."""
    x = params["characters"][codes] + params["positions"][None]
    for layer in params["layers"]:
        queries, keys, values = (
            part.reshape(*part.shape[:2], HEADS, WIDTH // HEADS)
            for part in jnp.split(_norm(x) @ layer["attend"], 3, axis=-1)
        )
        attended = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x = x + attended.reshape(x.shape) @ layer["merge"]
        x = x + jax.nn.gelu(_norm(x) @ layer["widen"]) @ layer["narrow"]
    return _norm(x) @ params["head"]


def _dense(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """Return a random kernel that preserves the scale of its input."""
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5


def _norm(x: jax.Array) -> jax.Array:
    """Apply root-mean-square normalization without a gain."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


TASKS = {
    "digits": Task(
        about="a network of three layers on scikit-learn's digits",
        init=digits_init,
        loss=digits_loss,
        batches=digits_batches,
        steps=500,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        seeds=5,
    ),
    "characters": Task(
        about="a Transformer of two layers on the characters of Python's language reference",
        init=characters_init,
        loss=characters_loss,
        batches=characters_batches,
        steps=200,
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        seeds=2,
    ),
}

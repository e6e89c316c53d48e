"""The problems behind `python -m adam_jax compare`: small ones, in plain JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax.optimizers.schedule_free_adamw import schedule_free_adamw

CONTEXT = 64
WIDTH = 64
HEADS = 4
LAYERS = 2
FIRST, LAST = 31, 126  # characters from space to tilde, and one in front that stands for others


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem in the terms of `compare`, with what suits it by default.

    Attributes:
      about: what it is, in a line.
      init: makes the parameters.
      loss: of the parameters at a batch.
      batches: makes the batches of so many steps.
      steps: of a run.
      learning_rates: to try.
      seeds: how many.
    """

    about: str
    init: Callable[[chex.PRNGKey], Any]
    loss: Callable[[Any, Any], chex.Array]
    batches: Callable[[int], Any]
    steps: int
    learning_rates: tuple[float, ...]
    seeds: int


def scheduled(
    make: Callable[..., optax.GradientTransformation], steps: int
) -> Callable[[Any], optax.GradientTransformation]:
    """The constructor with a learning rate that rises for a tenth of the steps, then falls to 0.

    Schedule-Free has the rise alone.
    """
    rise = max(1, steps // 10)
    if make is schedule_free_adamw:
        return lambda peak: schedule_free_adamw(peak, warmup_steps=rise)

    def share(count: chex.Array) -> chex.Array:
        step = count.astype(jnp.float32) + 1
        return jnp.minimum(step / rise, (steps + 1 - step) / (steps + 1 - rise))

    return lambda peak: make(lambda count: peak * share(count))


def digits_batches(steps: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, drawn from scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    drawn = np.random.default_rng(0).integers(len(images), size=(steps, size))
    return (images / 16).astype(np.float32)[drawn], labels.astype(np.int32)[drawn]


def digits_init(key: chex.PRNGKey) -> dict[str, Any]:
    """Three layers, each with a kernel and a bias."""
    sizes = (64, 128, 128, 10)
    keys = jax.random.split(key, 3)
    return {
        f"layer{i}": {"kernel": _dense(keys[i], *sizes[i : i + 2]), "bias": jnp.zeros(sizes[i + 1])}
        for i in range(3)
    }


def digits_loss(params: dict[str, Any], batch: tuple[chex.Array, chex.Array]) -> chex.Array:
    """The cross-entropy of a small network, in nats per image."""
    x, labels = batch
    for name, layer in params.items():
        x = x if name == "layer0" else jax.nn.relu(x)
        x = x @ layer["kernel"] + layer["bias"][None]
    return _cross_entropy(x, labels)


def characters_batches(steps: int, size: int = 8) -> np.ndarray:
    """Windows of the language reference that ships with Python, as bytes from 0 on."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n".join(topics.values()).encode("latin-1", "replace"), np.uint8)
    codes = np.where((text > FIRST) & (text <= LAST), text - FIRST, 0).astype(np.uint8)
    starts = np.random.default_rng(0).integers(len(codes) - CONTEXT, size=(steps, size))
    return codes[starts[..., None] + np.arange(CONTEXT + 1)]


def characters_init(key: chex.PRNGKey) -> dict[str, Any]:
    """A Transformer of two layers without biases: 115 thousand parameters."""
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


def characters_loss(params: dict[str, Any], windows: chex.Array) -> chex.Array:
    """The cross-entropy of the next character, in nats."""
    codes = windows.astype(jnp.int32)
    return _cross_entropy(characters_logits(params, codes[:, :-1]), codes[:, 1:])


def characters_logits(params: dict[str, Any], codes: chex.Array) -> chex.Array:
    """What the Transformer expects after each character, from those up to it."""
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


def _dense(key: chex.PRNGKey, inputs: int, outputs: int) -> chex.Array:
    """A kernel that keeps the size of what it is applied to."""
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5


def _norm(x: chex.Array) -> chex.Array:
    """Root-mean-square normalisation without a gain."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
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

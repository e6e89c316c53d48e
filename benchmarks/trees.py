"""The parameter trees that benchmarks time: their shapes, and arrays for them."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def one(size: int) -> Any:
    """Return one leaf."""
    return {"kernel": (size // 1024, 1024)}


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Any:
    """Return GPT-2; by default GPT-2 small: 124 million parameters in 148 leaves."""
    norm = {"scale": (width,), "bias": (width,)}

    def linear(rows: int, columns: int) -> Any:
        return {"kernel": (rows, columns), "bias": (columns,)}

    layer = {
        "ln_1": norm,
        "ln_2": norm,
        "c_attn": linear(width, 3 * width),
        "attn_proj": linear(width, width),
        "c_fc": linear(width, 4 * width),
        "mlp_proj": linear(4 * width, width),
    }
    stack = {f"h{k}": layer for k in range(layers)}
    return {"wte": (vocabulary, width), "wpe": (context, width), "ln_f": norm, **stack}


def resnet50() -> Any:
    """Return ResNet-50: 26 million parameters in 161 leaves."""

    def convolution(size: int, inputs: int, outputs: int) -> Any:
        return {"conv": (size, size, inputs, outputs), "scale": (outputs,), "bias": (outputs,)}

    tree: Any = {"stem": convolution(7, 3, 64)}
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            parts = {
                "a": convolution(1, inputs, width),
                "b": convolution(3, width, width),
                "c": convolution(1, width, 4 * width),
            }
            if block == 0:
                parts["shortcut"] = convolution(1, inputs, 4 * width)
            tree[f"stage{stage}_{block}"] = parts
            inputs = 4 * width
    return {**tree, "head": {"kernel": (2048, 1000), "bias": (1000,)}}


def equal(count: int) -> Any:
    """Return small leaves of one shape."""
    return {f"layer{k}": (64, 32) for k in range(count)}


def distinct(count: int) -> Any:
    """Return small leaves of distinct shapes."""
    return {f"layer{k}": (16 + k % 50, 16 + k // 50) for k in range(count)}


def mlp() -> Any:
    """Return a three-layer network with 10 thousand parameters."""
    widths = (32, 80, 80, 10)
    return {
        f"layer{k}": {"kernel": (n, m), "bias": (m,)}
        for k, (n, m) in enumerate(itertools.pairwise(widths))
    }


def shapes(tree: Any) -> list[tuple[int, ...]]:
    return jax.tree.leaves(tree, is_leaf=_is_shape)


def elements(tree: Any) -> int:
    return sum(map(math.prod, shapes(tree)))


def arrays(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Return arrays of these shapes, with values between -1 and 1."""

    def array(shape: tuple[int, ...]) -> jax.Array:
        numbers = np.sin(np.arange(math.prod(shape), dtype=np.float32)).reshape(shape)
        return jnp.array(numbers, dtype)

    return jax.tree.map(array, tree, is_leaf=_is_shape)


def on_device(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Return the arrays of `arrays`, computed on the device instead of the host."""
    return jax.tree.map(lambda shape: _array(shape, dtype), tree, is_leaf=_is_shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _array(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype)


def structs(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Return these shapes as ShapeDtypeStructs."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=_is_shape)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)

"""The loss of GPT-2, for benchmarks of a whole training step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

HEAD = 64  # the width of an attention head


def loss(params: Any, tokens: jax.Array) -> jax.Array:
    """Return the cross-entropy of the next token, for parameters of `trees.gpt2`.

    It computes in bfloat16, and computes each layer's activations again for the gradient.
    """
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["wte"][inputs] + params["wpe"][None, : inputs.shape[1]]
    for k in range(sum(name.startswith("h") for name in params)):
        x = jax.checkpoint(_layer)(params[f"h{k}"], x)
    logits = _norm(params["ln_f"], x) @ params["wte"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return losses.mean()


def _layer(p: Any, x: jax.Array) -> jax.Array:
    queries, keys, values = (
        part.reshape(*part.shape[:2], -1, HEAD)
        for part in jnp.split(_linear(p["c_attn"], _norm(p["ln_1"], x)), 3, axis=-1)
    )
    attended = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
    x = x + _linear(p["attn_proj"], attended.reshape(x.shape))
    return x + _linear(p["mlp_proj"], jax.nn.gelu(_linear(p["c_fc"], _norm(p["ln_2"], x))))


def _linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _norm(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x) * p["scale"] + p["bias"]

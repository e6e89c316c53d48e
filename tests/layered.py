"""A small Transformer with stacked layers, and the usual training step, for gradient release."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH, HEADS, VOCABULARY, LENGTH = 16, 2, 11, 8


def normal(rng, shape, dtype, scale=1.0):
    return jnp.asarray(np.asarray(scale * rng.normal(size=shape) / np.sqrt(shape[-2]), dtype))


def transformer(layers=6, width=WIDTH, dtype=jnp.float32, seed=0):
    """Return parameters; the embedding is tied to the head."""
    rng = np.random.default_rng(seed)

    def stacked(*shape):
        return normal(rng, (layers, *shape), dtype)

    return {
        "outer": {
            "embedding": normal(rng, (VOCABULARY, width), dtype),
            "norm": jnp.ones(width, dtype),
        },
        "layers": {
            "attention": {"qkv": stacked(width, 3 * width), "out": stacked(width, width)},
            "mlp": {"up": stacked(width, 2 * width), "down": stacked(2 * width, width)},
            "norm": jnp.ones((layers, width), dtype),
            "bias": jnp.zeros((layers, width), dtype),
        },
    }


def normalized(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale[None, None]


def first(outer, tokens):
    return outer["embedding"][tokens[:, :-1]]


def layer(p, h):
    n, length, width = h.shape
    qkv = (normalized(h, p["norm"]) @ p["attention"]["qkv"]).reshape(n, length, 3, HEADS, -1)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) * float((width // HEADS) ** -0.5)
    scores = jnp.where(jnp.tri(length, dtype=bool)[None, None], scores, -1e9)
    mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v).reshape(h.shape)
    h = h + mixed @ p["attention"]["out"]
    inner = jax.nn.gelu(normalized(h, p["norm"]) @ p["mlp"]["up"])
    return h + inner @ p["mlp"]["down"] + p["bias"][None, None]


def last(outer, h, tokens):
    logits = normalized(h, outer["norm"]) @ outer["embedding"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


MODEL = {"first": first, "layer": layer, "last": last}


def batches(count, size=4, length=LENGTH, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(VOCABULARY, size=(count, size, length + 1)))


def loss(params, tokens, checkpoint=False):
    """Return the loss of a forward pass that scans over layers."""
    block = jax.checkpoint(layer) if checkpoint else layer
    h = first(params["outer"], tokens)
    h, _ = jax.lax.scan(lambda h, p: (block(p, h), None), h, params["layers"])
    return last(params["outer"], h, tokens)


class Plain:
    """The usual step, in which `tx` steps each layer by itself; `clip` sees the whole gradient."""

    def __init__(self, tx, clip=None, checkpoint=False):
        self.tx, self.clip, self.checkpoint = tx, clip or optax.identity(), checkpoint

    def init(self, params):
        outer, layers = ({k: params[k]} for k in ("outer", "layers"))
        return self.clip.init(params), self.tx.init(outer), jax.vmap(self.tx.init)(layers)

    def __call__(self, params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens, self.checkpoint)
        clip, *states = state
        grads, clip = self.clip.update(grads, clip)
        new, states_new = {}, []
        for part, update, s in zip(
            ("outer", "layers"), (self.tx.update, jax.vmap(self.tx.update)), states, strict=True
        ):
            own = {part: params[part]}
            updates, s = update({part: grads[part]}, s, own)
            new |= optax.apply_updates(own, updates)
            states_new.append(s)
        return new, (clip, *states_new), value


def trained(step, params, tokens):
    """Return the parameters, state, and losses after a step for each batch."""

    def body(carry, batch):
        params, state, value = step(*carry, batch)
        return (params, state), value

    @jax.jit
    def run(params, tokens):
        (params, state), values = jax.lax.scan(body, (params, step.init(params)), tokens)
        return params, state, values

    return run(params, tokens)


def difference(a, b):
    """Return the largest difference of two trees, relative to the largest element of each leaf."""

    def relative(x, y):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        return np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(relative, a, b)))

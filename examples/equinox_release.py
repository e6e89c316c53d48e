"""A language model of stacked Equinox blocks, trained with one layer's gradient at a time.

Run it with `python examples/equinox_release.py`.
"""

from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

import adam_jax

STEPS, BATCH, TIME, WIDTH, LAYERS = 150, 16, 64, 64, 4


class Block(eqx.Module):
    norms: list[eqx.nn.RMSNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.norms = [eqx.nn.RMSNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)]
        self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=keys[0])
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, key=keys[1])

    def __call__(self, h):
        x = jax.vmap(self.norms[0])(h)
        h = h + self.attention(x, x, x, mask=jnp.tril(jnp.ones((len(h), len(h)), bool)))
        return h + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(h))


class Ends(eqx.Module):
    characters: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.characters = eqx.nn.Embedding(128, WIDTH, key=keys[0])
        self.positions = eqx.nn.Embedding(TIME, WIDTH, key=keys[1])
        self.head = eqx.nn.Linear(WIDTH, 128, key=keys[2])

    def embed(self, text):
        return jax.vmap(self.characters)(text[:-1]) + self.positions.weight

    def loss(self, h, text):
        logits, labels = jax.vmap(self.head)(h), text[1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


keys = jax.random.split(jax.random.key(0), LAYERS + 1)
outer, ends = eqx.partition(Ends(keys[0]), eqx.is_inexact_array)
layers, block = eqx.partition(eqx.filter_vmap(Block)(keys[1:]), eqx.is_inexact_array)

step = adam_jax.gradient_release(
    adam_jax.adamw(3e-3, weight_decay_mask=adam_jax.not_matching("bias", "norm")),
    first=lambda outer, text: jax.vmap(eqx.combine(outer, ends).embed)(text),
    layer=lambda layer, h: jax.vmap(eqx.combine(layer, block))(h),
    last=lambda outer, h, text: jax.vmap(eqx.combine(outer, ends).loss)(h, text).mean(),
)
params = {"outer": outer, "layers": layers}  # each leaf of `layers` is stacked along axis 0
state = step.init(params)
train = jax.jit(step, donate_argnums=(0, 1))

text = "".join(topics.values()).encode("ascii", "ignore")
windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), TIME + 1)
rng, losses = np.random.default_rng(0), []
for _ in (progress := trange(STEPS)):
    batch = windows[rng.integers(len(windows), size=BATCH)]
    params, state, loss = train(params, state, batch)
    losses.append(float(loss))
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

print(f"loss of the last 10 steps {np.mean(losses[-10:]):.3f} nats per character")
assert np.mean(losses[-10:]) < 2.6  # 3.2 without context

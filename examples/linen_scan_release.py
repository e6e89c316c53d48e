"""A language model in Linen's `nn.scan`, trained with one layer's gradient at a time.

Run it with `python examples/linen_scan_release.py`.
"""

from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

import adam_jax

STEPS, BATCH, TIME, WIDTH, LAYERS = 150, 16, 64, 64, 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _=None):
        mask = nn.make_causal_mask(h[..., 0])
        h = h + nn.MultiHeadDotProductAttention(4)(nn.RMSNorm()(h), mask=mask)
        x = nn.gelu(nn.Dense(4 * WIDTH)(nn.RMSNorm()(h)))
        return h + nn.Dense(WIDTH)(x), None


class LanguageModel(nn.Module):
    def setup(self):
        self.characters = nn.Embed(128, WIDTH)
        self.positions = self.param("positions", nn.initializers.normal(0.1), (TIME, WIDTH))
        self.blocks = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=LAYERS)()
        self.norm = nn.RMSNorm()

    def embed(self, text):
        return self.characters(text[:, :-1]) + self.positions

    def loss(self, h, text):
        logits = self.characters.attend(self.norm(h))  # tied to the embedding
        labels = text[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def __call__(self, text):
        h, _ = self.blocks(self.embed(text), None)
        return self.loss(h, text)


text = "".join(topics.values()).encode("ascii", "ignore")
windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), TIME + 1)
rng = np.random.default_rng(0)


def sample(size=BATCH):
    return windows[rng.integers(len(windows), size=size)]


model = LanguageModel()
outer = model.init(jax.random.key(0), sample())["params"]
params = {"layers": outer.pop("blocks"), "outer": outer}

mask = adam_jax.not_matching("bias", "scale", "outer")
step = adam_jax.gradient_release(
    adam_jax.adamw(3e-3, weight_decay=0.1, weight_decay_mask=mask),
    first=lambda outer, text: model.apply({"params": outer}, text, method="embed"),
    layer=lambda layer, h: Block().apply({"params": layer}, h)[0],
    last=lambda outer, h, text: model.apply({"params": outer}, h, text, method="loss"),
)
state = step.init(params)
train = jax.jit(step, donate_argnums=(0, 1))
for _ in (progress := trange(STEPS)):
    params, state, loss = train(params, state, sample())
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

trained = params["outer"] | {"blocks": params["layers"]}  # as `model.init` returns it
loss = jax.jit(model.apply)({"params": trained}, sample(256))
print(f"loss {loss:.3f} nats per character")
assert loss < 2.6  # 3.2 without context

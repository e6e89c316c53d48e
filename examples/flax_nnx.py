"""Train a Flax NNX model on digits, with AdamW's state in int8: 2 bytes per parameter, not 8.

Run it with `python examples/flax_nnx.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import adam_jax

STEPS, BATCH = 400, 128


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(64, 256, rngs=rngs)
        self.hidden2 = nnx.Linear(256, 256, rngs=rngs)
        self.norm = nnx.LayerNorm(256, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden2(nnx.relu(self.hidden1(x))))
        return self.head(self.dropout(self.norm(x)))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, random_state=0)
rng = np.random.default_rng(0)
model = Classifier(nnx.Rngs(0))

schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=40, decay_steps=STEPS)
tx = adam_jax.adamw(
    schedule,
    weight_decay=0.1,
    weight_decay_mask=adam_jax.not_matching("bias", "norm"),
    storage="int8",
)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

for _ in (progress := trange(STEPS)):
    batch = rng.choice(len(x), BATCH, replace=False)
    loss = train_step(model, optimizer, x[batch], y[batch])
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

model.eval()  # without dropout
accuracy = jnp.mean(jnp.argmax(model(x_test), axis=-1) == y_test)
state_bytes = sum(a.nbytes for a in jax.tree.leaves(optimizer.opt_state))
ratio = state_bytes / sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
print(f"test accuracy {accuracy:.3f}, {ratio:.2f} bytes of state per parameter")
assert accuracy > 0.95 and ratio < 2.5

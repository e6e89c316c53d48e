"""Train a Haiku model on digits: an adam_jax optimizer updates Haiku's dicts of parameters.

Run it with `python examples/haiku_mlp.py`.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import adam_jax

STEPS, BATCH = 300, 128


@hk.without_apply_rng
@hk.transform
def model(x):
    x = jax.nn.relu(hk.nets.MLP([256, 256])(x))
    x = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)
    return hk.Linear(10)(x)


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, random_state=0)
rng = np.random.default_rng(0)
params = model.init(jax.random.key(0), x[:1])

tx = adam_jax.adamw(
    optax.cosine_decay_schedule(3e-3, STEPS),
    weight_decay=0.1,
    weight_decay_mask=adam_jax.matching("/w$"),  # not b, nor the scale and offset of the norm
)
state = tx.init(params)


@jax.jit
def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


for _ in (progress := trange(STEPS)):
    batch = rng.choice(len(x), BATCH, replace=False)
    params, state, loss = train_step(params, state, x[batch], y[batch])
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

accuracy = jnp.mean(jnp.argmax(model.apply(params, x_test), axis=-1) == y_test)
print(f"test accuracy {accuracy:.3f}")
assert accuracy > 0.95

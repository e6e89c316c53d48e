"""Train a Linen network with batch norm on digits: a `TrainState` with an adam_jax optimizer.

Run it with `python examples/linen_batchnorm.py`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import adam_jax

STEPS, BATCH = 200, 128


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    batch_stats: Any  # not trained, so `tx` doesn't see them


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, new["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


images, labels = load_digits(return_X_y=True)
images = np.float32(images / 16).reshape(-1, 8, 8, 1)
x, x_test, y, y_test = train_test_split(images, labels, random_state=0)
rng = np.random.default_rng(0)

model = CNN()
variables = model.init(jax.random.key(0), x[:1], train=False)
tx = adam_jax.chain(
    adam_jax.clip_by_global_norm(1.0),
    adam_jax.adamw(
        optax.cosine_decay_schedule(3e-3, STEPS),
        weight_decay=0.1,
        weight_decay_mask=adam_jax.not_matching("bias", "BatchNorm"),
    ),
)
state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)

for _ in (progress := trange(STEPS)):
    batch = rng.choice(len(x), BATCH, replace=False)
    state, loss = train_step(state, x[batch], y[batch])
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

variables = {"params": state.params, "batch_stats": state.batch_stats}
accuracy = jnp.mean(jnp.argmax(model.apply(variables, x_test, train=False), axis=-1) == y_test)
print(f"test accuracy {accuracy:.3f}")
assert accuracy > 0.95

"""Train an Equinox model on digits: filtered updates, a mask for weight decay, a frozen layer.

Run it with `python examples/equinox_mlp.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import adam_jax

STEPS, BATCH = 300, 128


def loss_fn(trained, frozen, x, y):
    model = eqx.combine(trained, frozen)
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


@eqx.filter_jit
def train_step(tx, trained, frozen, state, x, y):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(trained, frozen, x, y)
    updates, state = tx.update(grads, state, trained)
    trained = optax.apply_updates(trained, updates)  # keeps bfloat16; eqx.apply_updates doesn't
    return trained, state, loss


images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, random_state=0)
rng = np.random.default_rng(0)
model = eqx.nn.MLP(64, 10, width_size=256, depth=2, key=jax.random.key(0))
first_weight = model.layers[0].weight

# In `trained`, functions and the first layer's leaves are None, so the layer keeps its weights.
trainable = jax.tree.map(eqx.is_inexact_array, model)
trainable = eqx.tree_at(lambda m: m.layers[0], trainable, replace=False)
trained, frozen = eqx.partition(model, trainable)

tx = adam_jax.adamw(
    optax.cosine_decay_schedule(3e-3, STEPS),
    weight_decay=0.1,
    weight_decay_mask=adam_jax.not_matching("bias"),
)
state = tx.init(trained)

for _ in (progress := trange(STEPS)):
    batch = rng.choice(len(x), BATCH, replace=False)
    trained, state, loss = train_step(tx, trained, frozen, state, x[batch], y[batch])
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

model = eqx.combine(trained, frozen)
accuracy = jnp.mean(jnp.argmax(jax.vmap(model)(x_test), axis=-1) == y_test)
print(f"test accuracy {accuracy:.3f}")
assert accuracy > 0.95 and jnp.array_equal(model.layers[0].weight, first_weight)

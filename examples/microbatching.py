"""Accumulate gradients in Optax's two ways: within a step, and over several calls of `update`.

`optax.microbatch` loops inside the step. `optax.MultiSteps` wraps the optimizer.

Run it with `python examples/microbatching.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import adam_jax

STEPS, BATCH, SLICES = 200, 128, 4

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


def make_step(tx, value_and_grad):
    @jax.jit
    def step(params, state, x, y):
        loss, grads = value_and_grad(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, random_state=0)
rng = np.random.default_rng(0)
params = model.init(jax.random.key(0), x[:1])

tx = adam_jax.adamw(optax.cosine_decay_schedule(1e-3, STEPS), weight_decay=0.1)
sliced = optax.microbatch(
    jax.value_and_grad(loss_fn),
    argnums=(1, 2),
    microbatch_size=BATCH // SLICES,
    accumulator=optax.microbatching.AccumulationType.MEAN,
)
within = make_step(tx, sliced)
params1, state1 = params, tx.init(params)

multi = optax.MultiSteps(tx, every_k_schedule=SLICES)
over = make_step(multi, jax.value_and_grad(loss_fn))
params2, state2 = params, multi.init(params)

for _ in (progress := trange(STEPS)):
    batch = rng.choice(len(x), BATCH, replace=False)
    params1, state1, loss = within(params1, state1, x[batch], y[batch])
    for rows in np.split(batch, SLICES):
        params2, state2, _ = over(params2, state2, x[rows], y[rows])
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

accuracy = jnp.mean(jnp.argmax(model.apply(params1, x_test), axis=-1) == y_test)
gap = optax.tree.norm(optax.tree.sub(params1, params2), ord=jnp.inf)
print(f"test accuracy {accuracy:.3f}; parameters of both ways differ by {gap:.1e}")
assert accuracy > 0.95 and gap < 1e-3

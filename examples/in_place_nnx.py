"""Step in place inside Flax: `adam_jax.apply` in `nnx.Optimizer` and in `TrainState`.

Flax's own classes materialize the update, in float32 if `tx` has `master_weights`.

Run it with `python examples/in_place_nnx.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import adam_jax

STEPS, BATCH = 200, 128


class Optimizer(nnx.Optimizer):
    def update(self, model, grads, **kwargs):
        trees = nnx.as_pure((grads, self.opt_state, nnx.state(model, self.wrt)))
        params, opt_state = adam_jax.apply(self.tx, *trees, **kwargs)
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(opt_state))
        self.step[...] += 1


class TrainState(train_state.TrainState):
    def apply_gradients(self, *, grads, **kwargs):
        params, opt_state = adam_jax.apply(self.tx, grads, self.opt_state, self.params)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


def create(rngs):
    linear = functools.partial(nnx.Linear, param_dtype=jnp.bfloat16, dtype=jnp.float32, rngs=rngs)
    return nnx.Sequential(linear(64, 512), nnx.relu, linear(512, 10))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit(donate_argnums=(0, 1))
def nnx_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


@functools.partial(jax.jit, donate_argnums=0)
def functional_step(state, x, y):
    grads = jax.grad(lambda params: loss_fn(nnx.merge(graph, params), x, y))(state.params)
    return state.apply_gradients(grads=grads)


images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, random_state=0)
rng = np.random.default_rng(0)

tx = adam_jax.master_weights(adam_jax.adamw(1e-3, storage="int8"), bits=24)
model = create(nnx.Rngs(0))
optimizer = Optimizer(model, tx, wrt=nnx.Param)
graph, params = nnx.split(create(nnx.Rngs(0)))  # the same parameters
state = TrainState.create(apply_fn=None, params=params, tx=tx)
for _ in (progress := trange(STEPS)):
    batch = rng.choice(len(x), BATCH, replace=False)
    loss = nnx_step(model, optimizer, x[batch], y[batch])
    state = functional_step(state, x[batch], y[batch])
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

trained = (model, nnx.merge(graph, state.params))
accuracies = [jnp.mean(jnp.argmax(m(x_test), axis=-1) == y_test) for m in trained]
print("test accuracy {:.3f} by nnx.Optimizer, {:.3f} by TrainState".format(*accuracies))
assert min(accuracies) > 0.95

"""FSDP in Linen with partition metadata: 8 devices share a model and its int8 state.

The devices are virtual, on the CPU.

Run it with `python examples/linen_fsdp.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import adam_jax

jax.config.update("jax_platforms", "cpu")  # leave out these two lines on 8 accelerators
jax.config.update("jax_num_cpu_devices", 8)

STEPS, BATCH = 100, 128


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None))
        for width in (512, 512):
            x = nn.LayerNorm()(nn.relu(nn.Dense(width, kernel_init=init)(x)))
        return nn.Dense(10, kernel_init=init)(x)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, x, y):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(images / 16), labels, random_state=0)
rng = np.random.default_rng(0)

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
mask = adam_jax.not_matching("bias", "LayerNorm")
tx = adam_jax.adamw(1e-3, weight_decay=0.1, weight_decay_mask=mask, storage="int8")
model = MLP()


def create(key):
    params = model.init(key, x[:1])["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


# Moments keep the metadata of their parameters, so Linen's functions shard the state, too.
shardings = nn.get_sharding(jax.eval_shape(create, jax.random.key(0)), mesh)
state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))

rows = NamedSharding(mesh, P("data"))
for _ in (progress := trange(STEPS)):
    batch = rng.choice(len(x), BATCH, replace=False)
    state, loss = train_step(state, *jax.device_put((x[batch], y[batch]), rows))
    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)

codes = state.opt_state[0].nu.codes["Dense_1"]["kernel"].value
part = codes.addressable_shards[0].data.shape
accuracy = jnp.mean(jnp.argmax(model.apply({"params": state.params}, x_test), -1) == y_test)
print(f"test accuracy {accuracy:.3f}, each device holds {part} of nu's {codes.shape} codes")
assert part == (64, 512) and accuracy > 0.95

"""PPO on CartPole, vmapped over seeds: Adam's step count restarts with each batch of rollouts.

Run it with `python examples/ppo.py`.
"""

import jax
import jax.numpy as jnp
import optax
from tqdm import trange

import adam_jax

SEEDS, ENVS, STEPS, ITERATIONS, EPOCHS = 4, 16, 128, 40, 16
schedule = optax.linear_schedule(2e-3, 0.0, ITERATIONS * EPOCHS)
tx = adam_jax.chain(adam_jax.clip_by_global_norm(0.5), adam_jax.adam(schedule, eps=1e-5))


def step(envs, action, key):
    """Step Gym's CartPoles; restart those that fall."""
    _, speed, angle, spin = envs.T
    push = (20.0 * action - 10.0 + 0.05 * spin**2 * jnp.sin(angle)) / 1.1
    turn = 9.8 * jnp.sin(angle) - jnp.cos(angle) * push
    turn /= 0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1)
    slide = push - 0.05 * turn * jnp.cos(angle) / 1.1
    envs += 0.02 * jnp.stack([speed, slide, spin, turn], axis=-1)
    fell = (jnp.abs(envs[:, 0]) > 2.4) | (jnp.abs(envs[:, 2]) > 0.209)
    start = jax.random.uniform(key, envs.shape, minval=-0.05, maxval=0.05)
    return jnp.where(fell[:, None], start, envs), fell.astype(jnp.float32)


def network(params, envs):
    out = jnp.tanh(jnp.tanh(envs @ params[0]) @ params[1]) @ params[2]
    return jax.nn.log_softmax(out[..., :2]), out[..., 2]  # two log-probabilities, and a value


def loss_fn(params, envs, action, old, advantage, target):
    log_p, value = network(params, envs)
    ratio = jnp.exp(jnp.sum(log_p * action, axis=-1) - old)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.mean(0.5 * (value - target) ** 2 - gain - 0.01 * entropy)


def iterate(params, state, envs, key):
    def act(envs, key):
        log_p, value = network(params, envs)
        action = jax.nn.one_hot(jax.random.categorical(key, log_p), 2)
        new, fell = step(envs, action[:, 1], key)
        return new, (envs, action, jnp.sum(log_p * action, axis=-1), value, fell)

    def estimate(after, moment):  # generalized advantage estimation; a fall costs 1
        (advantage, next_value), (value, fell) = after, moment
        advantage = (1 - fell) * 0.99 * (next_value + 0.95 * advantage) - fell - value
        return (advantage, value), advantage

    def train(carry, _):
        grads = jax.grad(loss_fn)(carry[0], *batch)
        return adam_jax.apply(tx, grads, carry[1], carry[0]), None

    envs, (*seen, value, fell) = jax.lax.scan(act, envs, jax.random.split(key, STEPS))
    last = (jnp.zeros(ENVS), network(params, envs)[1])
    _, advantage = jax.lax.scan(estimate, last, (value, fell), reverse=True)
    batch = (*seen, advantage, advantage + value)
    state = adam_jax.reset_step_count(state)  # for new targets; the schedule continues
    (params, state), _ = jax.lax.scan(train, (params, state), length=EPOCHS)
    return params, state, envs, fell.mean()


init, keys = jax.nn.initializers.orthogonal(), jax.random.split(jax.random.key(0), SEEDS)
params = [jax.vmap(lambda k, n=n: init(k, n))(keys) for n in [(4, 64), (64, 64), (64, 3)]]
state, envs = jax.vmap(tx.init)(params), jnp.zeros((SEEDS, ENVS, 4))
iterate_all, falls = jax.jit(jax.vmap(iterate)), []
for i in (progress := trange(ITERATIONS)):
    keys = jax.random.split(jax.random.key(i), SEEDS)
    params, state, envs, fell = iterate_all(params, state, envs, keys)
    falls.append(fell)
    progress.set_postfix_str(f"{1000 * fell.mean():.1f} falls per 1000 steps", refresh=False)
last = 1000 * jnp.stack(falls[-10:]).mean(axis=0)
print("falls per 1000 steps, by seed:", *(f"{x:.1f}" for x in last))
assert last.max() < 8  # at random, 45

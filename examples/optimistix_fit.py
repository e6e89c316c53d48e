"""Fit a decaying oscillation with Optimistix and an adam_jax optimizer, from several starts.

Run it with `python examples/optimistix_fit.py`.
"""

import jax
import jax.numpy as jnp
import optimistix as optx
from tqdm import tqdm

import adam_jax

NOISE, STARTS = 0.05, 8


def curve(params, t):
    envelope = params["height"] * jnp.exp(-params["decay"] * t)
    return envelope * jnp.cos(params["frequency"] * t + params["phase"])


def loss_fn(params, data):
    t, y = data
    return jnp.mean((curve(params, t) - y) ** 2)


truth = {"height": 2.0, "decay": 0.3, "frequency": 3.0, "phase": 0.5}
t = jnp.linspace(0.0, 6.0, 200)
y = curve(truth, t) + NOISE * jax.random.normal(jax.random.key(0), t.shape)

solver = optx.OptaxMinimiser(adam_jax.nadam(0.03), rtol=1e-5, atol=1e-5)
starts = jax.random.uniform(jax.random.key(1), (STARTS, len(truth)), maxval=4.0)
best, best_loss = None, jnp.inf
for start in (progress := tqdm(starts)):
    params = dict(zip(truth, start, strict=True))
    solution = optx.minimise(loss_fn, solver, params, (t, y), max_steps=5000, throw=False)
    loss = loss_fn(solution.value, (t, y))
    if loss < best_loss:
        best, best_loss = solution.value, loss
    progress.set_postfix_str(f"{solution.stats['num_steps']} steps, loss {loss:.4f}")

print({name: f"{x:.3f}" for name, x in best.items()}, f"loss {best_loss:.5f}")
assert best_loss < 1.1 * NOISE**2

"""Fit a Bayesian regression with NumPyro's SVI and an adam_jax optimizer.

Run it with `python examples/numpyro_svi.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.optim import optax_to_numpyro
from sklearn.datasets import load_diabetes

import adam_jax

STEPS = 2000


def model(x, y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ weights + bias, scale), obs=y)


data = load_diabetes(return_X_y=True)
x, y = (np.float32((a - a.mean(axis=0)) / a.std(axis=0)) for a in data)

guide = AutoMultivariateNormal(model)
tx = adam_jax.chain(
    adam_jax.clip_by_global_norm(100.0),
    adam_jax.adam(optax.cosine_decay_schedule(0.02, STEPS)),
)
svi = SVI(model, guide, optax_to_numpyro(tx), Trace_ELBO())
result = svi.run(jax.random.key(0), STEPS, x, y)  # shows its progress by tqdm

draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(1000,))
predicted = x @ draws["weights"].mean(axis=0) + draws["bias"].mean()
r2 = 1 - jnp.mean((y - predicted) ** 2)  # y has unit variance
losses = result.losses
print(f"negative ELBO {losses[0]:.0f} at first, {losses[-100:].mean():.0f} at last; R² {r2:.3f}")
assert losses[-100:].mean() < 520 and r2 > 0.5  # least squares: R² .518

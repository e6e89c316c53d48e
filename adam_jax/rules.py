"""Every variant's formula, as its paper writes it: one array in, one array out.

A rule takes the gradient and its moments and returns the direction, which the learning rate
multiplies and the parameter loses, and the new moments. t counts steps from 1. Rules without
moments transform a direction: they make the rest of an optimizer.
"""

from __future__ import annotations

import jax.numpy as jnp

from adam_jax.arithmetic import (
    abs_sq,
    averaging_length,
    debias,
    ema,
    momentum_product,
    sqrt,
)
from adam_jax.declare import Rule, positive, rule, signed


@rule(mu=signed, nu=positive)
def adam(g, mu, nu, *, t, b1, b2, eps, eps_root):
    """Kingma & Ba (2015), Algorithm 1; eps_root = 0 there.

    With b1 = 0 it is bias-corrected RMSprop; with b1 = b2 = 0 and eps = 0, sign descent.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    return debias(mu, b1, t) / (sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


@rule(mu=signed, nu=positive)
def adam_eps_hat(g, mu, nu, *, t, b1, b2, eps):
    """Kingma & Ba (2015), end of section 2: ε̂ joins the uncorrected √nu, as in Keras."""
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    correction = sqrt(-jnp.expm1(t * b2.log))
    return correction * debias(mu, b1, t) / (sqrt(nu) + eps), mu, nu


def look_ahead(mu, g, b1, t):
    """Look one step ahead: the corrected moment of step t + 1, with g standing for the gradient."""
    return ema(b1, debias(mu, b1, t + 1), debias(g, b1, t))


@rule(mu=signed, nu=positive)
def nadam(g, mu, nu, *, t, b1, b2, eps, eps_root):
    """Dozat (2016) with a constant momentum, as in Optax.

    Dozat's Algorithm 2 multiplies the second moment by b2 once more; no implementation does.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    return look_ahead(mu, g, b1, t) / (sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


@rule(mu=signed, nu=positive)
def nadam_scheduled(g, mu, nu, *, t, b1, b2, eps, eps_root, momentum_decay):
    """Dozat (2016), Algorithm 2, whose momentum warms up: b1·(1 - ½·0.96^(t·momentum_decay)).

    PyTorch takes 0.004 for momentum_decay, Keras 1.0. Optax has no schedule: see `nadam`.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    product, product_next = (momentum_product(b1, momentum_decay, s) for s in (t, t + 1))
    now, after = (b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
    ahead = after * mu / (1 - product_next) + (1 - now) * g / (1 - product)
    return ahead / (sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


@rule(mu=signed, nu=positive, nu_max=positive)
def amsgrad(
    g, mu, nu, nu_max, *, t, b1, b2, eps, eps_root, bias_correction_mu=True, bias_correction_nu=True
):
    """Reddi, Kale & Kumar (2018), Algorithm 2, with the maximum of the *corrected* nu, as in Optax.

    The paper corrects neither moment. PyTorch and Keras: see `amsgrad_raw`.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    nu_max = jnp.maximum(nu_max, debias(nu, b2, t) if bias_correction_nu else nu)
    m = debias(mu, b1, t) if bias_correction_mu else mu
    return m / (sqrt(nu_max + eps_root) + eps), mu, nu, nu_max


@rule(mu=signed, nu=positive, nu_max=positive)
def amsgrad_raw(
    g, mu, nu, nu_max, *, t, b1, b2, eps, eps_root, bias_correction_mu=True, bias_correction_nu=True
):
    """Reddi, Kale & Kumar (2018), with the maximum of nu itself, corrected afterwards.

    As in PyTorch and Keras. With both corrections off it is the paper's Algorithm 2.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    nu_max = jnp.maximum(nu_max, nu)
    v = debias(nu_max, b2, t) if bias_correction_nu else nu_max
    m = debias(mu, b1, t) if bias_correction_mu else mu
    return m / (sqrt(v + eps_root) + eps), mu, nu, nu_max


@rule(mu=signed, nu=positive)
def adamax(g, mu, nu, *, t, b1, b2, eps):
    """Kingma & Ba (2015), Algorithm 2; ε joins |g| as in PyTorch and Optax (none in the paper)."""
    mu = ema(b1, mu, g)
    nu = jnp.maximum(b2 * nu, jnp.abs(g) + eps)
    return debias(mu, b1, t) / nu, mu, nu


@rule(mu=signed, nu=positive)
def radam(g, mu, nu, *, t, b1, b2, eps, eps_root, threshold, nesterov=False):
    """Liu et al. (2020), Algorithm 2: Adam, rectified once its variance is tractable.

    That is for ρ_t > 4 in the paper, and from `threshold` = 5 in PyTorch and Optax. PyTorch adds ε
    to the uncorrected √nu. Optax's ρ_t loses its digits for b2 ≥ 0.9999 in float32.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    m = look_ahead(mu, g, b1, t) if nesterov else debias(mu, b1, t)
    rho, rho_inf = averaging_length(b2, t)
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    rectified = sqrt(jnp.maximum(r, 0)) * m / (sqrt(debias(nu, b2, t) + eps_root) + eps)
    return jnp.where(rho >= threshold, rectified, m), mu, nu


@rule(nu=positive.starting_at("initial_scale"))
def rms(g, nu, *, t, decay, eps, eps_in_sqrt=True, bias_correction=False):
    """Tieleman & Hinton (2012), RMSprop, lecture 6.5."""
    nu = ema(decay, nu, abs_sq(g))
    v = debias(nu, decay, t) if bias_correction else nu
    return g / (sqrt(v + eps) if eps_in_sqrt else sqrt(v) + eps), nu


@rule(mu=signed, nu=positive.starting_at("initial_scale"))
def rms_centered(g, mu, nu, *, t, decay, eps, eps_in_sqrt=True, bias_correction=False):
    """Graves (2013), equations 38-45: RMSprop by the standard deviation of the gradient."""
    mu = ema(decay, mu, g)
    nu = ema(decay, nu, abs_sq(g))
    m, v = (debias(x, decay, t) if bias_correction else x for x in (mu, nu))
    variance = jnp.maximum(v - abs_sq(m), 0)  # rounding may leave it below zero
    return g / (sqrt(variance + eps) if eps_in_sqrt else sqrt(variance) + eps), mu, nu


@rule(trace=signed)
def trace(g, trace, *, decay, nesterov=False):
    """Polyak (1964), heavy-ball momentum; Nesterov's as in Sutskever et al. (2013)."""
    trace = g + decay * trace
    return (g + decay * trace if nesterov else trace), trace


# What follows a direction.


@rule()
def identity(u):
    """Nothing: the link that is switched off."""
    return u


@rule()
def descend(u, *, learning_rate):
    """u ← -η·u."""
    return -learning_rate * u


@rule()
def decay_decoupled(u, *, p, weight_decay):
    """Loshchilov & Hutter (2019), as in PyTorch and Optax: λ·p joins the direction; ηλ acts.

    In front of a direction the same line is L2 regularisation, as in torch.optim.Adam.
    """
    return u + weight_decay * p


@rule()
def decay_independent(u, *, p, weight_decay):
    """Loshchilov & Hutter (2019), Algorithm 2: λ_t·p, whatever the learning rate."""
    return u - weight_decay * p


@rule()
def decay_cautious(u, *, p, weight_decay):
    """Chen et al. (2025): decay only where the step, too, shrinks the weight."""
    return u + jnp.where(u * p >= 0, weight_decay * p, 0)


@rule(factor=lambda share: 1 / jnp.maximum(share, 1e-3))
def cautious(u, *, g):
    """Liang et al. (2024), Algorithm 1: drop what points against the gradient, rescale the rest."""
    agrees = (u * g > 0).astype(u.dtype)
    return u * agrees, agrees


RULES: dict[str, Rule] = {name: r for name, r in globals().items() if isinstance(r, Rule)}
"""Every rule above, by name."""

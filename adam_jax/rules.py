"""The formula of every variant, written for one array as in its paper.

A rule takes the gradient and its moments, and returns the direction and the new moments. An
optimizer subtracts the learning rate times the direction from the parameter. t counts steps from 1.
Rules without moments transform a direction, e.g. by weight decay.
"""

# pyright: standard, reportMissingParameterType=false
# untyped, like the formulas in a paper: numbers and arrays in, arrays out

from __future__ import annotations

import jax.numpy as jnp

from adam_jax._util.declare import (
    Moment,
    Rule,
    initial_param,
    non_average,
    positive,
    rule,
    running_max,
    scalar,
    signed,
)
from adam_jax._util.numerics import (
    abs_sq,
    averaging_length,
    debias,
    ema,
    inner,
    least_norm,
    least_square,
    momentum_product,
    norm,
    sqrt,
)

average_square: Moment = positive.at_least(least_square, bounds_step=True)
"""An average of squared gradients; mu, the average gradient, bounds it from below."""


@rule(mu=signed, nu=average_square)
def adam(g, mu, nu, *, t, b1, b2, eps, eps_root):
    """Kingma & Ba (2015), Algorithm 1, if eps_root = 0.

    It is bias-corrected RMSprop if b1 = 0, and sign descent if b1 = b2 = eps = 0.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    return debias(mu, b1, t) / (sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


@rule(mu=signed, nu=average_square)
def adam_eps_hat(g, mu, nu, *, t, b1, b2, eps):
    """Kingma & Ba (2015), end of section 2: add ε̂ to the uncorrected √nu, as in Keras."""
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    root_correction = sqrt(debias(1.0, b2, t))
    return debias(mu, b1, t) / root_correction / (sqrt(nu) + eps), mu, nu


def look_ahead(mu, g, b1, t):
    """Return NAdam's look-ahead b1·mu/(1 - b1^(t+1)) + (1 - b1)·g/(1 - b1^t)."""
    return ema(b1, debias(mu, b1, t + 1), debias(g, b1, t))


@rule(mu=signed, nu=average_square)
def nadam(g, mu, nu, *, t, b1, b2, eps, eps_root, correction="optax"):
    """Dozat (2016) with a constant momentum, as in Optax.

    Dozat's Algorithm 2 also multiplies the second moment by b2; no implementation does. AlgoPerf's
    form is from Choi et al. (2019), Table 1: both terms of the look-ahead are divided by 1 - b1^t.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    algoperf = correction == "algoperf"
    ahead = debias(ema(b1, mu, g), b1, t) if algoperf else look_ahead(mu, g, b1, t)
    return ahead / (sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


@rule(mu=signed, nu=average_square)
def nadam_scheduled(g, mu, nu, *, t, b1, b2, eps, eps_root, momentum_decay):
    """Dozat (2016), Algorithm 2, with the momentum b1·(1 - ½·0.96^(t·momentum_decay)).

    PyTorch sets momentum_decay to 0.004, Keras to 1.0. Optax keeps b1 constant (`nadam`).
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    product, product_next = (momentum_product(b1, momentum_decay, s) for s in (t, t + 1))
    now, after = (b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
    ahead = after * mu / (1 - product_next) + (1 - now) * g / (1 - product)
    return ahead / (sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


@rule(mu=signed, nu=average_square, nu_max=running_max)
def amsgrad(
    g, mu, nu, nu_max, *, t, b1, b2, eps, eps_root, bias_correction_mu=True, bias_correction_nu=True
):
    """Reddi, Kale & Kumar (2018), Algorithm 2: the maximum of the *corrected* nu, as in Optax.

    The paper corrects neither moment. For PyTorch and Keras, see `amsgrad_raw`.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    nu_max = jnp.maximum(nu_max, debias(nu, b2, t) if bias_correction_nu else nu)
    m = debias(mu, b1, t) if bias_correction_mu else mu
    return m / (sqrt(nu_max + eps_root) + eps), mu, nu, nu_max


@rule(mu=signed, nu=average_square, nu_max=running_max)
def amsgrad_raw(
    g, mu, nu, nu_max, *, t, b1, b2, eps, eps_root, bias_correction_mu=True, bias_correction_nu=True
):
    """Reddi, Kale & Kumar (2018): the maximum of the raw nu, bias-corrected afterwards.

    PyTorch and Keras do this. With both corrections off, it is the paper's Algorithm 2.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    nu_max = jnp.maximum(nu_max, nu)
    v = debias(nu_max, b2, t) if bias_correction_nu else nu_max
    m = debias(mu, b1, t) if bias_correction_mu else mu
    return m / (sqrt(v + eps_root) + eps), mu, nu, nu_max


@rule(mu=signed, nu=non_average.at_least(least_norm))
def adamax(g, mu, nu, *, t, b1, b2, eps):
    """Kingma & Ba (2015), Algorithm 2, plus an ε that PyTorch and Optax add to |g|."""
    mu = ema(b1, mu, g)
    nu = jnp.maximum(b2 * nu, jnp.abs(g) + eps)
    return debias(mu, b1, t) / nu, mu, nu


@rule(mu=signed, nu=average_square)
def radam(g, mu, nu, *, t, b1, b2, eps, eps_root, threshold, nesterov=False):
    """Liu et al. (2020), Algorithm 2: Adam, rectified once its variance is tractable.

    The paper rectifies if ρ_t > 4; PyTorch and Optax use `threshold` = 5. PyTorch adds ε to the
    uncorrected √nu. Optax's ρ_t is inaccurate in float32 if b2 ≥ 0.9999.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    m = look_ahead(mu, g, b1, t) if nesterov else debias(mu, b1, t)
    rho, rho_inf = averaging_length(b2, t)
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    rectified = sqrt(jnp.maximum(r, 0)) * m / (sqrt(debias(nu, b2, t) + eps_root) + eps)
    return jnp.where(rho >= threshold, rectified, m), mu, nu


@rule(mu=signed, nu=positive)
def adabelief(g, mu, nu, *, t, b1, b2, eps, eps_root, nesterov=False):
    """Zhuang et al. (2020), Algorithm 2: nu averages (g - mu)² instead of g²."""
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g - mu)) + eps_root
    m = look_ahead(mu, g, b1, t) if nesterov else debias(mu, b1, t)
    return m / (sqrt(debias(nu, b2, t)) + eps), mu, nu


@rule(
    mu=signed.starting_at("initial_accumulator_value"),
    nu=non_average.starting_at("initial_accumulator_value"),
)
def yogi(g, mu, nu, *, t, b1, b2, eps, eps_root):
    """Zaheer et al. (2018), Algorithm 2: nu moves toward g² by (1 - b2)·g² at any distance.

    Both moments start at initial_accumulator_value, as in Optax; in the paper, only nu does.
    """
    mu = ema(b1, mu, g)
    nu = nu - (1 - b2) * jnp.sign(nu - abs_sq(g)) * abs_sq(g)
    return debias(mu, b1, t) / (sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


def least_adan(m, b1, b3):
    """Return a lower bound on Adan's n, the average of x² for x = g + c·Δg.

    g is an average of x with decay rate c/(1 + c), which is at most ½.
    """
    return jnp.maximum(1 - 0.5 / b3, 0) * least_square(m, b1, b3)  # for c ≤ 1


@rule(m=signed, v=signed, n=positive.at_least(least_adan), g=signed)
def adan(gradient, m, v, n, g, *, t, b1, b2, b3, eps, eps_root, difference_weight="b2"):
    """Xie et al. (2022), Algorithm 1: Nesterov momentum from differences of gradients.

    The authors' code weights the difference by b2 = 0.92 (the paper's 1 - β2), Optax by 1 - b2. `g`
    is the previous gradient; the first difference is 0.
    """
    c = b2 if difference_weight == "b2" else 1 - b2
    change = jnp.where(t == 1, 0, gradient - g)
    m, v = ema(b1, m, gradient), ema(b2, v, change)
    n = ema(b3, n, abs_sq(gradient + c * change))
    ahead = debias(m, b1, t) + c * debias(v, b2, t)
    return ahead / (sqrt(debias(n, b3, t) + eps_root) + eps), m, v, n, gradient


@rule(mu=signed, nu=positive)
def laprop(g, mu, nu, *, t, b1, b2, eps):
    """Ziyin et al. (2020), Algorithm 1: normalize, then average; choose b1 and b2 freely."""
    nu = ema(b2, nu, abs_sq(g))
    mu = ema(b1, mu, g / (sqrt(debias(nu, b2, t)) + eps))
    return debias(mu, b1, t), mu, nu


def quartic_root(step):
    """Return step^¼, ADOPT's bound on a normalized gradient."""
    return step**0.25


@rule(mu=signed, nu=positive)
def adopt(
    g, mu, nu, *, t, b1, b2, eps, nesterov=False, use_clipping=True, clip_value_fn=quartic_root
):
    """Taniguchi et al. (2024), Algorithm 2: normalize by the previous step's nu, then average.

    It converges with any b2. The first step only sets nu = g².
    """
    first = t == 1
    x = g / jnp.maximum(sqrt(nu), eps)
    x = jnp.clip(x, -clip_value_fn(t - 1), clip_value_fn(t - 1)) if use_clipping else x
    mu = jnp.where(first, mu, ema(b1, mu, x))
    nu = jnp.where(first, abs_sq(g), ema(b2, nu, abs_sq(g)))
    return jnp.where(first, mu, ema(b1, mu, x)) if nesterov else mu, mu, nu


@rule(
    m1=signed,
    m2=signed,
    nu=positive.at_least(lambda m1, b1, b2: least_square(m1, b1, b2)),
)
def ademamix(g, m1, m2, nu, *, t, b1, b2, b3, alpha, eps, eps_root):
    """Pagliardini et al. (2024), Algorithm 1: Adam plus a second, slow average of the gradients.

    m2 has no bias correction: `alpha` and `b3` warm up instead; see `adam_jax.ademamix`.
    """
    m1, m2 = ema(b1, m1, g), ema(b3, m2, g)
    nu = ema(b2, nu, abs_sq(g))
    mixed = debias(m1, b1, t) + alpha * m2
    return mixed / (sqrt(debias(nu, b2, t) + eps_root) + eps), m1, m2, nu


@rule(m=signed, n=positive.at_least(lambda m, b1, b2: least_square((1 - b1) * m, b1, b2)))
def simplified_ademamix(g, m, n, *, t, b1, b2, alpha, eps, eps_root):
    """Morwani et al. (2025), Algorithm 1: AdEMAMix with one decaying sum instead of two averages.

    The direction is up to 1/(1 - b1) times as long as Adam's.
    """
    m = b1 * m + g
    n = ema(b2, n, abs_sq(g))
    return (m + alpha * g) / (sqrt(debias(n, b2, t) + eps_root) + eps), m, n


@rule(mu=signed, nu=average_square)
def adam_atan2(g, mu, nu, *, t, b1, b2, a, b):
    """Everett et al. (2024), section 4: a·atan2(m̂, b·√v̂) needs no ε and is scale-invariant."""
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    m, root = debias(mu, b1, t), sqrt(debias(nu, b2, t))
    at_origin = (m == 0) & (root == 0)  # atan2 has no derivative there
    return a * jnp.arctan2(m, jnp.where(at_origin, 1, b * root)), mu, nu


@rule(mu=signed)
def adam_s(g, mu, *, b1, b2, eps):
    """Zhang et al. (2025), AdamS: in nu = ema(b2, nu, g²), the old mu² replaces the old nu.

    There is no bias correction. Zhou & Xie's AdamS (stable weight decay) is another method.
    """
    mu_next = ema(b1, mu, g)
    return mu_next / (sqrt(ema(b2, abs_sq(mu), abs_sq(g))) + eps), mu_next


@rule(mu=signed, nu=positive.per_leaf())
def novograd(g, mu, nu, *, p, t, mean, size, b1, b2, eps, eps_root, decay_in_mu):
    """Ginsburg et al. (2019), Algorithm 1: nu averages a leaf's ‖g‖², starting at the first ‖g‖².

    mu is a sum. Each term is a normalized gradient plus weight decay.
    """
    norm_sq = mean(abs_sq(g)) * size
    nu = jnp.where(t == 1, norm_sq, ema(b2, nu, norm_sq))
    mu = b1 * mu + g / (sqrt(nu + eps_root) + eps) + decay_in_mu * p
    return mu, mu, nu


@rule(mu=signed, nu=average_square)
def stable_adamw(g, mu, nu, *, mean, t, b1, b2, eps):
    """Wortsman et al. (2023), Algorithm 2: Adam with smaller steps if g² outgrows nu.

    The direction is divided by max(1, RMS), where RMS² is the mean of g²/max(v̂, ε²) over the leaf.
    """
    mu = ema(b1, mu, g)
    nu = ema(b2, nu, abs_sq(g))
    root = sqrt(debias(nu, b2, t))
    rms = sqrt(mean(abs_sq(g / jnp.maximum(root, eps))))
    return debias(mu, b1, t) / (root + eps) / jnp.maximum(1, rms), mu, nu


@rule(mu=signed)
def lion(g, mu, *, b1, b2, smooth_beta, mode="hard"):
    """Chen et al. (2023), Algorithm 2: a momentum's sign; Optax adds "smooth" and "refined"."""
    x = ema(b1, mu, g)
    mu = ema(b2, mu, g)
    if mode == "smooth":
        return jnp.tanh(smooth_beta * x), mu
    return (jnp.clip(x, -1, 1) if mode == "refined" else jnp.sign(x)), mu


@rule(nu=positive.starting_at("initial_scale"))
def rms(g, nu, *, t, decay, eps, eps_in_sqrt=True, bias_correction=False):
    """Tieleman & Hinton (2012), lecture 6.5: RMSprop."""
    nu = ema(decay, nu, abs_sq(g))
    v = debias(nu, decay, t) if bias_correction else nu
    return g / (sqrt(v + eps) if eps_in_sqrt else sqrt(v) + eps), nu


@rule(mu=signed, nu=positive.starting_at("initial_scale"))
def rms_centered(g, mu, nu, *, t, decay, eps, eps_in_sqrt=True, bias_correction=False):
    """Graves (2013), equations 38-45: g divided by the gradient's standard deviation."""
    mu = ema(decay, mu, g)
    nu = ema(decay, nu, abs_sq(g))
    m, v = (debias(x, decay, t) if bias_correction else x for x in (mu, nu))
    variance = jnp.maximum(v - abs_sq(m), 0)  # rounding can make it negative
    return g / (sqrt(variance + eps) if eps_in_sqrt else sqrt(variance) + eps), mu, nu


@rule(mu=signed, variance=positive.starting_at("initial_scale"))
def rms_variance(g, mu, variance, *, t, decay, eps, eps_in_sqrt=True, bias_correction=False):
    """Compute the direction of `rms_centered` from mu and the variance nu - mu².

    Subtracting quantized moments leaves mostly error. Welford's recursion (1962) avoids it: if
    the new gradient has weight w, mean ← mean + w·(g - mean) and
    variance ← (1 - w)·(variance + w·(g - mean)²).
    """
    w, mean = 1 - decay, mu
    if bias_correction:
        w, mean = debias(w, decay, t), debias(mu, decay, jnp.maximum(t - 1, 1))
    variance = (1 - w) * (variance + w * abs_sq(g - mean))
    mu = ema(decay, mu, g)
    return g / (sqrt(variance + eps) if eps_in_sqrt else sqrt(variance) + eps), mu, variance


def prodigy_step_size(gamma, estim_lr, b1, b2, t):
    """Return γ·d·√(1 - b2^t)/(1 - b1^t), which multiplies Prodigy's step and weight decay."""
    return gamma * estim_lr * debias(1.0, b1, t) / sqrt(debias(1.0, b2, t))


def prodigy_estimate(
    estim_lr,
    numerator_weighted,
    alignment,
    grad_sum_norm,
    *,
    t,
    gamma,
    b1,
    b2,
    b3,
    estim_lr0,
    estim_lr_coef,
):
    """Mishchenko & Defazio (2023), Algorithm 4: raise d to its new estimate, if that is larger."""
    weight = estim_lr / estim_lr0 * prodigy_step_size(gamma, estim_lr, b1, b2, t)
    numerator = b3 * numerator_weighted + weight * alignment
    estimate = estim_lr_coef * numerator / jnp.where(grad_sum_norm > 0, grad_sum_norm, 1)
    return {"estim_lr": jnp.maximum(estim_lr, estimate), "numerator_weighted": numerator}


@rule(
    exp_avg=signed,
    exp_avg_sq=positive.at_least(
        lambda exp_avg, b1, b2: least_square(exp_avg, b1, b2), bounds_step=True
    ),
    grad_sum=signed,
    params0=initial_param,
    estim_lr=scalar.starting_at("estim_lr0"),
    numerator_weighted=scalar,
    update_scalars=prodigy_estimate,
)
def prodigy(
    g,
    exp_avg,
    exp_avg_sq,
    grad_sum,
    params0,
    *,
    p,
    t,
    estim_lr,
    gamma,
    b1,
    b2,
    b3,
    eps,
    estim_lr0,
    safeguard_warmup=False,
):
    """Mishchenko & Defazio (2023), Algorithm 4: Adam, with an estimate d of the learning rate.

    `estim_lr` is d; multiply the direction by `prodigy_step_size`. Sums are divided by d_0. In
    Optax, ε is multiplied by the next step's d.
    """
    d = estim_lr
    exp_avg = ema(b1, exp_avg, d * g)
    exp_avg_sq = ema(b2, exp_avg_sq, abs_sq(d * g))
    weight = d if safeguard_warmup else prodigy_step_size(gamma, d, b1, b2, t)
    grad_sum = b3 * grad_sum + d / estim_lr0 * weight * g
    totals = {"alignment": inner(g, params0 - p), "grad_sum_norm": jnp.abs(grad_sum)}
    u = exp_avg / (sqrt(exp_avg_sq) + d * eps)
    return u, exp_avg, exp_avg_sq, grad_sum, params0, totals


@rule(trace=signed)
def trace(g, trace, *, decay, nesterov=False):
    """Polyak (1964): heavy-ball momentum; Sutskever et al. (2013): Nesterov momentum."""
    trace = g + decay * trace
    return (g + decay * trace if nesterov else trace), trace


# Rules for other links of a chain.


@rule()
def identity(u):
    """Return u, for a link that is switched off."""
    return u


@rule()
def clip(u, *, norm, max_norm):
    """Pascanu et al. (2013), Algorithm 1: clip u to max_norm; `norm` is the global norm."""
    return jnp.where(norm < max_norm, u, u / norm * max_norm)


@rule()
def descend(u, *, learning_rate):
    """Return -η·u."""
    return -learning_rate * u


@rule()
def decay_decoupled(u, *, p, weight_decay):
    """Loshchilov & Hutter (2019), as in PyTorch and Optax: p decays by η·λ·p.

    Applied to the gradient, it is L2 regularization, as in torch.optim.Adam.
    """
    return u + weight_decay * p


@rule()
def decay_independent(u, *, p, weight_decay):
    """Loshchilov & Hutter (2019), Algorithm 2: p decays by λ_t·p, independent of η."""
    return u - weight_decay * p


@rule()
def decay_cautious(u, *, p, weight_decay):
    """Chen et al. (2025): decay only where the step also shrinks the weight."""
    return u + jnp.where(u * p >= 0, weight_decay * p, 0)


@rule()
def decay_proximal(u, *, p, weight_decay, learning_rate):
    """Xie et al. (2022), Algorithm 1: p ← (p - η·u)/(1 + ηλ); decay never changes a sign."""
    return (u + weight_decay * p) / (1 + learning_rate * weight_decay)


@rule()
def cautious(u, *, g, mean):
    """Liang et al. (2024), Algorithm 1: zero u where its sign differs from g's, then rescale."""
    agrees = (u * g > 0).astype(u.dtype)
    return u * agrees / jnp.maximum(mean(agrees), 1e-3)


@rule()
def grams(u, *, g):
    """Cao et al. (2024), Algorithm 1: the direction's magnitude with the gradient's sign."""
    return jnp.sign(g) * jnp.abs(u)


@rule()
def trust_ratio(u, *, p, mean):
    """You et al. (2020), LAMB, Algorithm 2, φ(x) = x: u·‖p‖/‖u‖, or u if a norm is 0."""
    p_sq, u_sq = mean(abs_sq(p), abs_sq(u))
    ratio = sqrt(p_sq / jnp.maximum(u_sq, 1e-37))
    return u * jnp.where((p_sq > 0) & (u_sq > 0), ratio, 1)


@rule(radius=positive.per_leaf().starting_at(norm))
def hyperball(u, radius, *, p, mean, size, learning_rate):
    """Wen et al. (2026), Hyperball: W ← R·n(W - η·R·n(u)), n(x) = x/‖x‖, R = ‖W‖ at the start.

    With W' = W - a·u, computing ‖W'‖² = ‖W‖² - 2a⟨W,u⟩ + a²‖u‖² needs no second pass. A leaf with
    R = 0 takes the step -η·u.
    """
    p_sq, u_sq, product = (size * x for x in mean(abs_sq(p), abs_sq(u), inner(p, u)))
    a = jnp.where(u_sq > 0, learning_rate * radius / sqrt(jnp.where(u_sq > 0, u_sq, 1)), 0)
    new_sq = p_sq - 2 * a * product + a * a * u_sq
    scale = jnp.where(new_sq > 0, radius / sqrt(jnp.where(new_sq > 0, new_sq, 1)), 1)
    step = (scale - 1) * p - scale * a * u
    return jnp.where(radius > 0, step, -learning_rate * u), radius


@rule(g_prev=signed)
def mars(g, g_prev, *, mean, gamma, b1, size):
    """Yuan et al. (2024), MARS, Algorithm 2 (approximate): a variance-reduced gradient.

    Each leaf is clipped to norm 1. g_prev starts at 0, as in the authors' code.
    """
    c = g + gamma * b1 / (1 - b1) * (g - g_prev)
    norm = sqrt(mean(abs_sq(c)) * size)
    return c / jnp.maximum(1, norm), g


@rule(slow=signed)
def grokfast(g, slow, *, t, alpha, lamb):
    """Lee et al. (2024), Grokfast, Algorithm 2: amplify the slow part of the gradients.

    `slow` starts at the first gradient, as in the authors' code.
    """
    slow = jnp.where(t == 1, g, ema(alpha, slow, g))
    return g + lamb * slow, slow


@rule(z=signed)
def schedule_free(u, z, *, p, b1, share):
    """Defazio et al. (2024), equations 3-5: z is stepped, x averages z, and y is trained.

    z ← z + u, x ← (1 - share)·x + share·z, y = (1 - b1)·z + b1·x. The parameter p is y; x is not
    stored. Substituting x = (y - (1 - b1)·z)/b1 gives the change of y below, without cancellation.
    """
    return (1 - b1) * u + share * (z - p + b1 * u), z + u


RULES: dict[str, Rule] = {name: r for name, r in globals().items() if isinstance(r, Rule)}
"""Every rule above, by name."""

"""Every rule in plain float64: one step, one array, direction only, as the papers write it.

    u, s = adam(g, s, t=t)      # s is {} before the first step; t counts from 1
    p = p - learning_rate * u

Nothing here imports the package, and nothing is clever: read it beside the paper. A moment that is
missing from s starts at zero (Yogi and RMSprop say otherwise); s is never written to. g is float64
or complex128; second moments use |g|^2, so they are real.

"Checked" gives the largest difference of u from another implementation over 60 steps of the
gradients in optimizers/test_reference.py, relative to 1 + |u|, in float64. "Once, by hand" means
a released package that the tests don't install: pytorch_optimizer 4.1.0, schedulefree 1.4.1,
adam-atan2-pytorch 0.4.1, torch-optimi 0.3.3.
"""

import numpy as np

Array = np.ndarray


def ema(b: float, old: Array, new: Array) -> Array:
    return b * old + (1 - b) * new


def abs_sq(x: Array) -> Array:
    return np.abs(x) ** 2


# --- Adam and its nearest relatives -------------------------------------------------------------


def adam(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Kingma & Ba (2015), Algorithm 1; eps_root is Optax's, not the paper's.

    Differing copies: Keras and TensorFlow, see adam_eps_hat.
    Checked: torch.optim.Adam 3e-16, optax.scale_by_adam 2e-16.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    mu_hat = mu / (1 - b1**t)
    nu_hat = nu / (1 - b2**t)
    u = mu_hat / (np.sqrt(nu_hat + eps_root) + eps)
    return u, {"mu": mu, "nu": nu}


def adam_eps_hat(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba (2015), end of section 2: "epsilon hat", as in Keras and TensorFlow.

    Equal to Adam with eps / sqrt(1 - b2^t): at t = 1 the defaults damp 32 times as much.
    Checked: adam with that eps (an identity) 2e-16. Not run against Keras itself.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    alpha = np.sqrt(1 - b2**t) / (1 - b1**t)
    u = alpha * mu / (np.sqrt(nu) + eps)
    return u, {"mu": mu, "nu": nu}


def nadam(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, correction="optax"):
    """Dozat (2016), Algorithm 2 with a constant mu_t = b1, as in Optax.

    correction="algoperf" is Choi et al. (2019), Table 1: one bias correction, 1 - b1^t.
    Differing copies: Dozat's listing has an extra b2 on nu_hat that nobody keeps; PyTorch and
    Keras schedule mu_t, see nadam_scheduled.
    Checked: optax.scale_by_adam(nesterov=True) 2e-16; "algoperf": scale_by_nadam of
    mlcommons/algorithmic-efficiency (paper_baselines/nadamw), transcribed, 3e-16.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    if correction == "algoperf":
        mu_bar = (b1 * mu + (1 - b1) * g) / (1 - b1**t)
    else:
        mu_bar = b1 * mu / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    nu_hat = nu / (1 - b2**t)
    u = mu_bar / (np.sqrt(nu_hat + eps_root) + eps)
    return u, {"mu": mu, "nu": nu}


def nadam_scheduled(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, momentum_decay=0.004):
    """Dozat (2016), Algorithm 2, with mu_t = b1 (1 - 0.96^(t momentum_decay) / 2).

    momentum_decay is 0.004 in PyTorch, 1.0 in Keras. s also keeps the number "mu_product", the
    product of mu_1 ... mu_t.
    Differing copies: Optax has no schedule, see nadam. PyTorch's product has the default dtype.
    Checked: torch.optim.NAdam 6e-9 for both values (3e-16 where its product is float64). Not run
    against Keras itself.
    """
    mu_t = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = s.get("mu_product", 1.0) * mu_t
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    mu_bar = mu_next * mu / (1 - product * mu_next) + (1 - mu_t) * g / (1 - product)
    nu_hat = nu / (1 - b2**t)
    u = mu_bar / (np.sqrt(nu_hat + eps_root) + eps)
    return u, {"mu": mu, "nu": nu, "mu_product": product}


def amsgrad(
    g,
    s,
    *,
    t,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    bias_correction_mu=True,
    bias_correction_nu=True,
):
    """Reddi, Kale & Kumar (2018), Algorithm 2, as in Optax: the maximum of the corrected nu.

    Differing copies: PyTorch and Keras, see amsgrad_raw.
    Checked: optax.scale_by_amsgrad 3e-16, with and without the corrections.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    mu_hat = mu / (1 - b1**t) if bias_correction_mu else mu
    nu_hat = nu / (1 - b2**t) if bias_correction_nu else nu
    nu_max = np.maximum(s.get("nu_max", 0.0), nu_hat)
    u = mu_hat / (np.sqrt(nu_max + eps_root) + eps)
    return u, {"mu": mu, "nu": nu, "nu_max": nu_max}


def amsgrad_raw(
    g,
    s,
    *,
    t,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    bias_correction_mu=True,
    bias_correction_nu=True,
):
    """Reddi, Kale & Kumar (2018), Algorithm 2, as in PyTorch: the maximum of nu, then corrected.

    With both corrections off this is the paper's algorithm, without its projection.
    Differing copies: Optax, see amsgrad. Keras takes the same maximum but has eps where
    adam_eps_hat does.
    Checked: torch.optim.Adam(amsgrad=True) 3e-16; corrections off: optax with them off 3e-16.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    nu_max = np.maximum(s.get("nu_max", 0.0), nu)
    mu_hat = mu / (1 - b1**t) if bias_correction_mu else mu
    nu_hat = nu_max / (1 - b2**t) if bias_correction_nu else nu_max
    u = mu_hat / (np.sqrt(nu_hat + eps_root) + eps)
    return u, {"mu": mu, "nu": nu, "nu_max": nu_max}


def adamax(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba (2015), Algorithm 2; the paper has no eps, PyTorch and Optax add it to |g|.

    Checked: torch.optim.Adamax 2e-16, optax 1e-16.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = np.maximum(b2 * s.get("nu", 0.0), np.abs(g) + eps)
    u = mu / (1 - b1**t) / nu
    return u, {"mu": mu, "nu": nu}


def radam(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, threshold=5.0, nesterov=False):
    """Liu et al. (2020), Algorithm 2, rectified where rho_t >= 5 as in Optax; paper: rho_t > 4.

    Differing copies: PyTorch (rho_t > 5) puts eps where adam_eps_hat does; Optax in float32 is
    wrong in its first steps for b2 >= 0.9999.
    Checked: optax.scale_by_radam 3e-16; torch.optim.RAdam 2e-14 with eps = 1e-16,
    2e-6 with 1e-8.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    mu_hat = mu / (1 - b1**t)
    if nesterov:
        mu_hat = b1 * mu / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    nu_hat = nu / (1 - b2**t)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    if rho >= threshold:
        r = np.sqrt(((rho - 4) * (rho - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho))
        u = r * mu_hat / (np.sqrt(nu_hat + eps_root) + eps)
    else:
        u = mu_hat
    return u, {"mu": mu, "nu": nu}


def adabelief(g, s, *, t, b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16, nesterov=False):
    """Zhuang et al. (2020), Algorithm 2: nu follows (g - mu)^2.

    eps_root is added to nu itself, so it accumulates. The paper and the authors' code have one eps,
    in both places.
    Checked: optax.scale_by_belief 3e-16; once, by hand, pytorch_optimizer 3e-16.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g - mu)) + eps_root
    mu_hat = mu / (1 - b1**t)
    if nesterov:
        mu_hat = b1 * mu / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    nu_hat = nu / (1 - b2**t)
    u = mu_hat / (np.sqrt(nu_hat) + eps)
    return u, {"mu": mu, "nu": nu}


def yogi(g, s, *, t, b1=0.9, b2=0.999, eps=1e-3, eps_root=0.0, initial_accumulator_value=1e-6):
    """Zaheer et al. (2018), Algorithm 2, with Adam's bias corrections, which the paper leaves out.

    Differing copies: Optax also starts mu at the initial value, and so does this; the paper starts
    only nu.
    Checked: optax.scale_by_yogi 2e-16; once, by hand, pytorch_optimizer 3e-16.
    """
    mu = ema(b1, s.get("mu", initial_accumulator_value), g)
    nu = s.get("nu", initial_accumulator_value)
    nu = nu - (1 - b2) * np.sign(nu - abs_sq(g)) * abs_sq(g)
    mu_hat = mu / (1 - b1**t)
    nu_hat = nu / (1 - b2**t)
    u = mu_hat / (np.sqrt(nu_hat + eps_root) + eps)
    return u, {"mu": mu, "nu": nu}


def laprop(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8):
    """Ziyin, Wang & Ueda (2020), LaProp: normalize first, average afterwards.

    The authors' code (eps = 1e-15) averages lr * g / denominator: the same while lr is constant.
    Checked: that code, transcribed, 4e-15; once, by hand, pytorch_optimizer 2e-16 with its 1e-15
    under the root.
    """
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    nu_hat = nu / (1 - b2**t)
    mu = ema(b1, s.get("mu", 0.0), g / (np.sqrt(nu_hat) + eps))
    u = mu / (1 - b1**t)
    return u, {"mu": mu, "nu": nu}


def adopt(g, s, *, t, b1=0.9, b2=0.9999, eps=1e-6, nesterov=False, use_clipping=True):
    """Taniguchi et al. (2024), ADOPT with its clip; the first version of the paper has none.

    Divides by nu of the step before. Step 1 only sets nu and does not move; the clip is 1 at step
    2. No bias corrections. nesterov is Optax's. Clipping is for real gradients.
    Differing copies: an early version of the authors' code took mu = g / max(sqrt(nu), eps) at
    step 2; pytorch_optimizer clips one step late, at t^(1/4), 2^(1/4) at step 2 (3e-2 apart).
    Checked: optax.contrib.scale_by_adopt 3e-16; once, by hand, pytorch_optimizer unclipped 1e-15.
    """
    if t == 1:
        return np.zeros_like(g), {"mu": np.zeros_like(g), "nu": abs_sq(g)}
    x = g / np.maximum(np.sqrt(s["nu"]), eps)
    if use_clipping:
        x = np.clip(x, -((t - 1) ** 0.25), (t - 1) ** 0.25)
    mu = ema(b1, s["mu"], x)
    nu = ema(b2, s["nu"], abs_sq(g))
    u = ema(b1, mu, x) if nesterov else mu
    return u, {"mu": mu, "nu": nu}


def ademamix(g, s, *, t, b1=0.9, b2=0.999, b3=0.9999, alpha=6.0, eps=1e-8, eps_root=0.0):
    """Pagliardini, Ablin & Grangier (2024), Algorithm 1: m2 has no bias correction, on purpose.

    The paper warms up alpha and b3; pass this step's values.
    Differing copies: defaults of alpha, optax.contrib.ademamix 5 and scale_by_ademamix 6.
    Checked: optax.contrib.scale_by_ademamix 2e-16; once, by hand, pytorch_optimizer 3e-16.
    """
    m1 = ema(b1, s.get("m1", 0.0), g)
    m2 = ema(b3, s.get("m2", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    m1_hat = m1 / (1 - b1**t)
    nu_hat = nu / (1 - b2**t)
    u = (m1_hat + alpha * m2) / (np.sqrt(nu_hat + eps_root) + eps)
    return u, {"m1": m1, "m2": m2, "nu": nu}


def simplified_ademamix(g, s, *, t, b1=0.99, b2=0.95, alpha=0.0, eps=1e-8, eps_root=0.0):
    """Morwani et al. (2025), Simplified AdEMAMix: m is a sum, and is not corrected.

    Differing copies: Optax squares a complex g without the absolute value; pytorch_optimizer
    averages m.
    Checked: optax.contrib.scale_by_simplified_ademamix 5e-15.
    """
    m = b1 * s.get("m", 0.0) + g
    n = ema(b2, s.get("n", 0.0), abs_sq(g))
    n_hat = n / (1 - b2**t)
    u = (m + alpha * g) / (np.sqrt(n_hat + eps_root) + eps)
    return u, {"m": m, "n": n}


def adan(g, s, *, t, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, eps_root=0.0):
    """Xie et al. (2022), Algorithm 1, in the authors' convention betas = (0.98, 0.92, 0.99).

    The paper writes (1 - beta_2) with its beta = 1 - b, so the coefficient of the difference is b2
    here.
    Differing copies: Optax multiplies by 1 - b2 = 0.08 instead, see adan_optax.
    Checked: the authors' code, transcribed, 1e-16; once, by hand, pytorch_optimizer 2e-16.
    """
    diff = g - s.get("g", g)
    m = ema(b1, s.get("m", 0.0), g)
    v = ema(b2, s.get("v", 0.0), diff)
    n = ema(b3, s.get("n", 0.0), abs_sq(g + b2 * diff))
    m_hat, v_hat, n_hat = m / (1 - b1**t), v / (1 - b2**t), n / (1 - b3**t)
    u = (m_hat + b2 * v_hat) / (np.sqrt(n_hat + eps_root) + eps)
    return u, {"m": m, "v": v, "n": n, "g": g.copy()}


def adan_optax(g, s, *, t, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, eps_root=0.0):
    """optax.scale_by_adan: a known wrong copy, with 1 - b2 where the paper and its authors have b2.

    Checked: optax.scale_by_adan 2e-16.
    """
    diff = g - s.get("g", g)
    m = ema(b1, s.get("m", 0.0), g)
    v = ema(b2, s.get("v", 0.0), diff)
    n = ema(b3, s.get("n", 0.0), abs_sq(g + (1 - b2) * diff))
    m_hat, v_hat, n_hat = m / (1 - b1**t), v / (1 - b2**t), n / (1 - b3**t)
    u = (m_hat + (1 - b2) * v_hat) / (np.sqrt(n_hat + eps_root) + eps)
    return u, {"m": m, "v": v, "n": n, "g": g.copy()}


def adam_atan2(g, s, *, t, b1=0.9, b2=0.999, a=1.27, b=1.0):
    """Everett et al. (2024), Adam-atan2: no eps, and |u| <= a pi / 2. Real gradients.

    Checked: the angle of the complex number b sqrt(nu_hat) + i mu_hat 3e-15; once, by hand,
    adam-atan2-pytorch 2e-16.
    """
    mu = ema(b1, s.get("mu", 0.0), g)
    nu = ema(b2, s.get("nu", 0.0), abs_sq(g))
    mu_hat = mu / (1 - b1**t)
    nu_hat = nu / (1 - b2**t)
    u = a * np.arctan2(mu_hat, b * np.sqrt(nu_hat))
    return u, {"mu": mu, "nu": nu}


def adam_s(g, s, *, t, b1=0.9, b2=0.95, eps=1e-8):
    """Zhang, Wang & Chen (2025), arXiv 2505.16363: the normalizer holds mu of the step before.

    No bias corrections, so the first step is (1 - b1) / sqrt(1 - b2) = 0.45 for the defaults; t is
    not used. Another algorithm is called AdamS too (Zhou & Xie: stable weight decay).
    Checked: the closed form for a constant gradient 2e-16; the formula in the documentation of zij,
    a PyTorch library, is this one. No independent implementation was run.
    """
    mu_before = s.get("mu", 0.0)
    mu = ema(b1, mu_before, g)
    nu = ema(b2, abs_sq(mu_before), abs_sq(g))
    u = mu / (np.sqrt(nu) + eps)
    return u, {"mu": mu}


def stable_adamw(g, s, *, t, b1=0.9, b2=0.999, eps=1e-8):
    """Wortsman et al. (2023), Algorithm 2: Adam over max(1, RMS), the mean taken over the array.

    Differing copies: torch-optimi divides the learning rate, and with it the weight decay;
    Wortsman's gist divides the direction only, as here.
    Checked: the authors' form with decay rates that change by step, transcribed, 7e-15; once, by
    hand, torch-optimi 6e-15.
    """
    u, s = adam(g, s, t=t, b1=b1, b2=b2, eps=eps)
    nu_hat = s["nu"] / (1 - b2**t)
    rms = np.sqrt(np.mean(abs_sq(g) / np.maximum(nu_hat, eps**2)))
    return u / max(1.0, rms), s


def novograd(g, s, *, t, p=0.0, b1=0.9, b2=0.25, eps=1e-8, eps_root=0.0, decay_in_mu=0.0):
    """Ginsburg et al. (2019), Algorithm 1: v_1 = ||g_1||^2, m_1 = g_1 / (sqrt(v_1) + eps) + d w_1.

    p is the parameter, d is decay_in_mu, and eps_root is Optax's.
    Differing copies: NVIDIA's PyTorch code can multiply the term by 1 - b1 (grad_averaging).
    Checked: optax.scale_by_novograd 2e-15.
    """
    norm_sq = np.sum(abs_sq(g))
    nu = norm_sq if t == 1 else ema(b2, s["nu"], norm_sq)
    term = g / (np.sqrt(nu + eps_root) + eps) + decay_in_mu * p
    mu = b1 * s.get("mu", 0.0) + term
    return mu, {"mu": mu, "nu": nu}


# --- RMSprop, momentum, Lion --------------------------------------------------------------------


def rms(
    g, s, *, t, decay=0.9, eps=1e-8, initial_scale=0.0, eps_in_sqrt=True, bias_correction=False
):
    """Tieleman & Hinton (2012), RMSprop; the options are optax.scale_by_rms's.

    Differing copies: PyTorch has eps outside the root (eps_in_sqrt=False) and decay 0.99;
    TensorFlow inside.
    Checked: optax.scale_by_rms 2e-16, all options; torch.optim.RMSprop 2e-16.
    """
    nu = ema(decay, s.get("nu", initial_scale), abs_sq(g))
    nu_hat = nu / (1 - decay**t) if bias_correction else nu
    u = g / np.sqrt(nu_hat + eps) if eps_in_sqrt else g / (np.sqrt(nu_hat) + eps)
    return u, {"nu": nu}


def rms_centered(
    g, s, *, t, decay=0.9, eps=1e-8, initial_scale=0.0, eps_in_sqrt=True, bias_correction=False
):
    """Graves (2013), eqs. 38-41 without the momentum (optax.scale_by_stddev).

    nu - |mu|^2 can round to a negative number: NaN with eps_in_sqrt=False and
    bias_correction at t = 1.
    Checked: optax 3e-16, bias-corrected 4e-11 (that rounding); torch.optim.RMSprop(centered=True)
    3e-16.
    """
    mu = ema(decay, s.get("mu", 0.0), g)
    nu = ema(decay, s.get("nu", initial_scale), abs_sq(g))
    mu_hat = mu / (1 - decay**t) if bias_correction else mu
    nu_hat = nu / (1 - decay**t) if bias_correction else nu
    var = nu_hat - abs_sq(mu_hat)
    u = g / np.sqrt(var + eps) if eps_in_sqrt else g / (np.sqrt(var) + eps)
    return u, {"mu": mu, "nu": nu}


def rms_variance(
    g, s, *, t, decay=0.9, eps=1e-8, initial_scale=0.0, eps_in_sqrt=True, bias_correction=False
):
    """`rms_centered`, with the variance nu - |mu|^2 in the state instead of nu.

    Checked: it is rms_centered.
    """
    mu = s.get("mu", 0.0)
    before = {"mu": mu, "nu": s.get("variance", initial_scale) + abs_sq(mu)}
    options = {"eps": eps, "eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    u, after = rms_centered(g, before, t=t, decay=decay, **options)
    return u, {"mu": after["mu"], "variance": after["nu"] - abs_sq(after["mu"])}


def trace(g, s, *, t, decay=0.9, nesterov=False):
    """Heavy-ball momentum (Polyak, 1964); Nesterov's as Sutskever et al. (2013).

    t is not used.
    Checked: optax.trace 5e-15, torch.optim.SGD(momentum=decay) 2e-16.
    """
    new = g + decay * s.get("trace", 0.0)
    u = g + decay * new if nesterov else new
    return u, {"trace": new}


def lion(g, s, *, t, b1=0.9, b2=0.99, mode="hard", smooth_beta=1.0):
    """Chen et al. (2023), Algorithm 2 ("hard"); "smooth" and "refined" are Optax's; t is not used.

    Checked: optax.scale_by_lion, all modes, 2e-16; once, by hand, pytorch_optimizer ("hard") 0.
    """
    mu = s.get("mu", 0.0)
    x = ema(b1, mu, g)
    if mode == "hard":
        u = np.sign(x)
    elif mode == "smooth":
        u = np.tanh(smooth_beta * x)
    elif mode == "refined":
        u = np.where(np.abs(x) < 1, x, np.sign(x))
    else:
        raise ValueError(mode)
    return u, {"mu": ema(b2, mu, g)}


# --- Functions of a direction, a gradient, or a parameter ---------------------------------------


def cautious(u, g):
    """Liang et al. (2024), zero components that oppose the gradient, scale the others.

    Differing copies: the paper multiplies by n / (sum phi + 1); the authors' code divides by the
    mean, at least 1e-3, as here; adam-atan2-pytorch has 1e-5.
    Checked: by hand-made numbers; once, by hand, pytorch_optimizer's mask times (sum phi + 1) /
    sum phi 2e-16.
    """
    phi = (u * g > 0).astype(np.float64)
    return u * phi / max(np.mean(phi), 1e-3)


def grams(u, g):
    """Cao, Li & Song (2024), Grams: the magnitude of u, the sign of g.

    Checked: Adam with it once, by hand, pytorch_optimizer 3e-16.
    """
    return np.sign(g) * np.abs(u)


def mars(g, g_prev, *, gamma=0.025, b1=0.95):
    """Yuan et al. (2024), MARS-approx: the gradient plus its scaled change, clipped to norm 1.

    g_prev is the gradient before, or None at the first step, which has no correction. The exact
    form takes g_prev at the same batch.
    Differing copies: the authors' code starts from g_prev = 0, so its first gradient is 1.475 g.
    Checked: the authors' code, transcribed, 1e-16; once, by hand, pytorch_optimizer's MARS-AdamW
    2e-16 with its 1e-15 under the root.
    """
    c = g if g_prev is None else g + gamma * b1 / (1 - b1) * (g - g_prev)
    return c / max(1.0, np.linalg.norm(c.ravel()))


def grokfast(g, s, *, t, alpha=0.98, lamb=2.0):
    """Lee et al. (2024), Grokfast, Algorithm 2 (EMA): the gradient plus its amplified average.

    Differing copies: defaults of the authors' code, alpha = 0.99 and lamb = 5.
    Checked: the authors' gradfilter_ema (ironjr/grokfast), transcribed, 0.
    """
    slow = g if t == 1 else ema(alpha, s["slow"], g)
    return g + lamb * slow, {"slow": slow}


def trust_ratio(u, p):
    """You et al. (2020), LAMB, Algorithm 2 with phi(x) = x: give u the norm of p.

    Differing copies clip the norm of p to [0, 10].
    Checked: optax.scale_by_trust_ratio 2e-16.
    """
    p_norm, u_norm = np.linalg.norm(p.ravel()), np.linalg.norm(u.ravel())
    return u * (p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0)


def hyperball(u, p, radius, *, learning_rate):
    """Wen et al. (2026), Hyperball: the new parameter, R n(p - lr R n(u)) with n(x) = x / ||x||.

    radius is R, the norm of the first p. A zero u only scales p to R.
    Differing copies: Levanter's first version takes the norm of the current p for R.
    Checked: Levanter's AdamH (marin-community/marin, _adamh_projected_update), transcribed, 4e-16.
    """
    u_norm = np.linalg.norm(u.ravel())
    new = p - learning_rate * radius * u / u_norm if u_norm > 0 else p
    return radius * new / np.linalg.norm(new.ravel())


def decoupled(u, p, weight_decay):
    """Loshchilov & Hutter (2019), Algorithm 2 as libraries have it: lr times (u + weight_decay p).

    Checked: torch.optim.AdamW, the parameters of 60 steps, 1e-15.
    """
    return u + weight_decay * p


def cautious_decay(u, p, weight_decay):
    """Chen et al. (2025), cautious weight decay: only where u p >= 0.

    Not checked against an independent implementation.
    """
    return u + weight_decay * p * (u * p >= 0)


# --- Schedule-Free ------------------------------------------------------------------------------


class ScheduleFreeAdamW:
    """Defazio et al. (2024), Algorithm 1: train at y, evaluate at x, the steps go to z.

        sf = ScheduleFreeAdamW(p, lr=0.0025)
        sf.step(gradient at sf.y)         # any number of times; the result is sf.x

    The paper bias-corrects through the learning rate, lr sqrt(1 - b2^t), so its averaging weights
    grow with t (0.18 apart); schedulefree 1.4.1 has nu / (1 - b2^t), as here. The weights are
    lr_max^2, lr_max being the largest rate so far.
    Differing copies: with warmup, Optax steps with the rate of step t - 1, but averages with the
    rate of step t (0.04 apart).
    Checked: the authors' other form (x not stored), transcribed, 7e-16; optax.contrib without
    warmup 2e-15; once, by hand, schedulefree 6e-16, with warmup and decay.
    """

    def __init__(
        self, p, *, lr=0.0025, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, warmup_steps=0
    ):
        self.lr, self.b1, self.b2, self.eps = lr, b1, b2, eps
        self.weight_decay, self.warmup_steps = weight_decay, warmup_steps
        self.x = self.y = self.z = p
        self.nu, self.lr_max, self.weight_sum, self.t = 0.0, 0.0, 0.0, 0

    def step(self, g):
        self.t += 1
        lr = self.lr * min(1.0, self.t / max(1, self.warmup_steps))
        self.nu = ema(self.b2, self.nu, abs_sq(g))
        nu_hat = self.nu / (1 - self.b2**self.t)
        u = g / (np.sqrt(nu_hat) + self.eps) + self.weight_decay * self.y
        self.z = self.z - lr * u
        self.lr_max = max(self.lr_max, lr)
        weight = self.lr_max**2
        self.weight_sum += weight
        c = weight / self.weight_sum
        self.x = (1 - c) * self.x + c * self.z
        self.y = self.b1 * self.x + (1 - self.b1) * self.z
        return self.y


# --- Prodigy ------------------------------------------------------------------------------------


def prodigy(
    g, s, *, t, p=0.0, b1=0.9, b2=0.999, b3=0.9995, eps=1e-8, gamma=1.0, estim_lr0=1e-3,
    estim_lr_coef=1.0,
):  # fmt: skip
    """Return the direction of `Prodigy` if the parameters stay at p0, so that d stays at d0."""
    m = ema(b1, s.get("exp_avg", 0.0), estim_lr0 * g)
    v = ema(b2, s.get("exp_avg_sq", 0.0), abs_sq(estim_lr0 * g))
    return m / (np.sqrt(v) + estim_lr0 * eps), {"exp_avg": m, "exp_avg_sq": v}


class Prodigy:
    """Mishchenko & Defazio (2023), Algorithm 4, for all parameters as one vector.

        prodigy = Prodigy(p)
        prodigy.step(gradient at prodigy.p)   # any number of times

    Bias correction, sqrt(1 - b2^t) / (1 - b1^t), is an option of the authors' code; Optax always
    has it, and so does this. The sums r and s are divided by d0, as in both codes: r/‖s‖ is d.
    Differing copies: Optax has the next step's d in eps.
    Checked: optax.contrib.prodigy with eps = 1e-30 2e-16 of the parameters after 40 steps.
    """

    def __init__(
        self, p, *, lr=1.0, b1=0.9, b2=0.999, b3=None, eps=1e-8, d0=1e-6, d_coef=1.0,
        weight_decay=0.0, safeguard_warmup=False,
    ):  # fmt: skip
        self.lr, self.b1, self.b2, self.eps, self.d0 = lr, b1, b2, eps, d0
        self.b3 = b2**0.5 if b3 is None else b3
        self.d_coef, self.weight_decay, self.safeguard = d_coef, weight_decay, safeguard_warmup
        self.p = self.p0 = p
        self.m = self.v = self.s = np.zeros_like(p)
        self.d, self.r, self.t = d0, 0.0, 0

    def step(self, g):
        self.t += 1
        d, lr = self.d, self.lr(self.t - 1) if callable(self.lr) else self.lr
        dlr = d * lr * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        self.m = ema(self.b1, self.m, d * g)
        self.v = ema(self.b2, self.v, (d * g) ** 2)
        self.r = self.b3 * self.r + d / self.d0 * dlr * np.sum(g * (self.p0 - self.p))
        self.s = self.b3 * self.s + d / self.d0 * (d if self.safeguard else dlr) * g
        u = self.m / (np.sqrt(self.v) + d * self.eps)
        self.p = self.p - dlr * (u + self.weight_decay * self.p)
        self.d = max(d, self.d_coef * self.r / np.sum(np.abs(self.s)))
        return self.p

"""The rules in reference.py against independent implementations, in float64, over 60 steps."""

import functools

import jax
import numpy as np
import optax
import pytest

import reference as ref

pytestmark = pytest.mark.standard_promotion  # it runs Optax's own code

STEPS = 60
TINY = 1e-11  # relative to 1 + |u|: what is left is rounding


def gradients(complex_=False):
    """Scales from 1e-3 to 10, one row always zero, the whole array zero at steps 20 to 22."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-3, 1, (8, 6))
    g = rng.normal(size=(STEPS, 8, 6)) * scale
    if complex_:
        g = g + 1j * rng.normal(size=g.shape) * scale
    g[:, 3] = 0
    g[20:23] = 0
    return g


def run(rule, grads, **kw):
    s, us = {}, []
    for t, g in enumerate(grads, 1):
        u, s = rule(g, s, t=t, **kw)
        us.append(u)
    return np.stack(us)


def with_optax(tx, grads, params=None):
    us, params = [], 0 * grads[0] if params is None else params
    with jax.enable_x64(True):
        s = tx.init(jax.numpy.asarray(grads[0]) * 0)
        update = jax.jit(tx.update)
        for g in grads:
            u, s = update(jax.numpy.asarray(g), s, params)
            us.append(np.asarray(u))
    return np.stack(us)


def with_torch(name, grads, **kw):
    """Return the directions of a PyTorch optimizer: its steps from p = 0 at learning rate 1."""
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.zeros(grads[0].shape, dtype=torch.float64))
    opt = getattr(torch.optim, name)([p], lr=1.0, **kw)
    us = []
    for g in grads:
        p.data.zero_()
        p.grad = torch.from_numpy(g.copy())
        opt.step()
        us.append(-p.data.numpy().copy())
    return np.stack(us)


def distance(a, b):
    return np.max(np.abs(a - b) / (1 + np.abs(a)))


def assert_close(a, b, tol=TINY):
    assert np.isfinite(a).all()
    assert distance(a, b) <= tol


OFF = dict(bias_correction_mu=False, bias_correction_nu=False)
ADAM = dict(b1=0.8, b2=0.99, eps=1e-6, eps_root=1e-10)

OPTAX = [
    (ref.adam, optax.scale_by_adam, {}),
    (ref.adam, optax.scale_by_adam, ADAM),
    (ref.nadam, lambda **kw: optax.scale_by_adam(nesterov=True, **kw), {}),
    (ref.nadam, lambda **kw: optax.scale_by_adam(nesterov=True, **kw), ADAM),
    (ref.amsgrad, optax.scale_by_amsgrad, {}),
    (ref.amsgrad, optax.scale_by_amsgrad, ADAM | OFF),
    (ref.amsgrad_raw, optax.scale_by_amsgrad, ADAM | OFF),
    (ref.adamax, optax.scale_by_adamax, {}),
    (ref.radam, optax.scale_by_radam, {}),
    (ref.radam, optax.scale_by_radam, ADAM | dict(threshold=4.5, nesterov=True)),
    (ref.rms, optax.scale_by_rms, {}),
    (ref.rms, optax.scale_by_rms, dict(initial_scale=0.5, eps_in_sqrt=False, bias_correction=True)),
    (ref.rms_centered, optax.scale_by_stddev, {}),
    (ref.rms_centered, optax.scale_by_stddev, dict(bias_correction=True, eps=1e-4)),
    (ref.rms_centered, optax.scale_by_stddev, dict(initial_scale=0.5, eps_in_sqrt=False)),
    (ref.trace, optax.trace, dict(decay=0.9)),
    (ref.trace, optax.trace, dict(decay=0.7, nesterov=True)),
    (ref.adabelief, optax.scale_by_belief, {}),
    (ref.adabelief, optax.scale_by_belief, dict(eps=1e-8, nesterov=True)),
    (ref.yogi, optax.scale_by_yogi, {}),
    (ref.yogi, optax.scale_by_yogi, dict(initial_accumulator_value=0.1)),
    (ref.adan_optax, optax.scale_by_adan, {}),
    (ref.adopt, optax.contrib.scale_by_adopt, {}),
    (ref.adopt, optax.contrib.scale_by_adopt, dict(b2=0.99, nesterov=True, use_clipping=False)),
    (ref.ademamix, optax.contrib.scale_by_ademamix, {}),
    (ref.ademamix, optax.contrib.scale_by_ademamix, ADAM | dict(b3=0.999, alpha=2.0)),
    (ref.simplified_ademamix, optax.contrib.scale_by_simplified_ademamix, {}),
    (ref.simplified_ademamix, optax.contrib.scale_by_simplified_ademamix, dict(alpha=3.0)),
    (ref.novograd, optax.scale_by_novograd, {}),
    (ref.novograd, optax.scale_by_novograd, dict(b1=0.8, b2=0.9, eps=1e-6, eps_root=1e-6)),
    (ref.lion, optax.scale_by_lion, {}),
    (ref.lion, optax.scale_by_lion, dict(mode="smooth", smooth_beta=2.0)),
    (ref.lion, optax.scale_by_lion, dict(mode="refined")),
]


@pytest.mark.slow
@pytest.mark.parametrize("rule, tx, kw", OPTAX)
def test_a_reference_equals_optax(rule, tx, kw):
    g = gradients()
    tol = 1e-9 if rule is ref.rms_centered else TINY  # nu - |mu|^2 cancels
    assert_close(run(rule, g, **kw), with_optax(tx(**kw), g), tol)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, tx",
    [
        (ref.adam, optax.scale_by_adam),
        (ref.adamax, optax.scale_by_adamax),
        (ref.radam, optax.scale_by_radam),
        (ref.adabelief, optax.scale_by_belief),
        (ref.yogi, optax.scale_by_yogi),
        (ref.rms, optax.scale_by_rms),
        (ref.rms_centered, optax.scale_by_stddev),
        (ref.ademamix, optax.contrib.scale_by_ademamix),
        (ref.adan_optax, optax.scale_by_adan),
        (ref.lion, optax.scale_by_lion),
    ],
)
def test_a_reference_equals_optax_on_complex_leaves(rule, tx):
    g = gradients(complex_=True)
    assert_close(run(rule, g), with_optax(tx(), g))


TORCH = [
    (ref.adam, {}, "Adam", {}, TINY),
    (ref.amsgrad_raw, {}, "Adam", dict(amsgrad=True), TINY),
    (ref.nadam_scheduled, {}, "NAdam", {}, 1e-6),  # torch's mu_product is float32
    (ref.nadam_scheduled, dict(momentum_decay=1.0), "NAdam", dict(momentum_decay=1.0), 1e-6),
    (ref.radam, dict(eps=1e-16), "RAdam", dict(eps=1e-16), TINY),
    (ref.adamax, {}, "Adamax", {}, TINY),
    (ref.rms, dict(eps_in_sqrt=False), "RMSprop", dict(alpha=0.9), TINY),
    (ref.rms_centered, dict(eps_in_sqrt=False), "RMSprop", dict(alpha=0.9, centered=True), 1e-9),
    (ref.trace, {}, "SGD", dict(momentum=0.9), TINY),
    (ref.trace, dict(nesterov=True), "SGD", dict(momentum=0.9, nesterov=True), TINY),
]


@pytest.mark.parametrize("rule, kw, name, torch_kw, tol", TORCH)
def test_a_reference_equals_pytorch(rule, kw, name, torch_kw, tol):
    g = gradients()
    assert_close(run(rule, g, **kw), with_torch(name, g, **torch_kw), tol)


def test_decoupled_decay_equals_pytorchs_adamw():
    torch = pytest.importorskip("torch")
    grads, s = gradients(), {}
    p = np.linspace(-2, 2, 48).reshape(8, 6)
    q = torch.nn.Parameter(torch.from_numpy(p.copy()))
    opt = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    for t, g in enumerate(grads, 1):
        u, s = ref.adam(g, s, t=t)
        p = p - 0.01 * ref.decoupled(u, p, 0.1)
        q.grad = torch.from_numpy(g.copy())
        opt.step()
        assert_close(p, q.detach().numpy())


# Other forms of the same rule: the authors' own arrangement, or a closed form.


def adan_authors(grads, b1=0.98, b2=0.92, b3=0.99, eps=1e-8):
    """sail-sg/Adan, _single_tensor_adan: keeps the negative gradient, and reuses it as scratch."""
    us, minus, m, d, n = [], -grads[0], 0.0, 0.0, 0.0
    for k, g in enumerate(grads, 1):
        scratch = minus + g
        m = m * b1 + g * (1 - b1)
        d = d * b2 + scratch * (1 - b2)
        scratch = scratch * b2 + g
        n = n * b3 + scratch * scratch * (1 - b3)
        denom = np.sqrt(n) / np.sqrt(1 - b3**k) + eps
        us.append(m / denom / (1 - b1**k) + d / denom * (b2 / (1 - b2**k)))
        minus = -g
    return np.stack(us)


def laprop_authors(grads, b1=0.9, b2=0.999, eps=1e-8, lr=0.3):
    """Z-T-WANG/LaProp-Optimizer: the rate is inside the average, corrections are running sums."""
    us, m, v, lr1, lr2 = [], 0.0, 0.0, 0.0, 0.0
    for g in grads:
        v = v * b2 + (1 - b2) * g * g
        lr1 = lr1 * b1 + (1 - b1) * lr
        lr2 = lr2 * b2 + (1 - b2)
        m = m * b1 + (1 - b1) * lr * (g / (np.sqrt(v / lr2) + eps))
        us.append(m / (lr1 / lr) / lr)
    return np.stack(us)


def stable_adamw_authors(grads, b1=0.9, b2=0.999, eps=1e-8):
    """Wortsman's gist: decay rates that change by step, so that the moments need no correction."""
    us, v, u = [], 0.0, 0.0
    for k, g in enumerate(grads, 1):
        b1_hat = b1 * (1 - b1 ** (k - 1)) / (1 - b1**k)
        b2_hat = b2 * (1 - b2 ** (k - 1)) / (1 - b2**k)
        v = b1_hat * v + (1 - b1_hat) * g
        u = b2_hat * u + (1 - b2_hat) * g * g
        rms = np.sqrt((g * g / np.maximum(u, eps**2)).mean())
        us.append(v / (np.sqrt(u) + eps) / max(1.0, rms))
    return np.stack(us)


def nadam_algoperf(grads, b1=0.9, b2=0.999, eps=1e-8):
    """mlcommons/algorithmic-efficiency, scale_by_nadam: mu is averaged with g a second time."""
    us, mu, nu = [], 0.0, 0.0
    for k, g in enumerate(grads, 1):
        mu = (1 - b1) * g + b1 * mu
        nu = (1 - b2) * g**2 + b2 * nu
        ahead = ((1 - b1) * g + b1 * mu) / (1 - b1**k)
        us.append(ahead / (np.sqrt(nu / (1 - b2**k)) + eps))
    return np.stack(us)


def grokfast_authors(grads, alpha=0.98, lamb=2.0):
    """ironjr/grokfast, gradfilter_ema: the average is made from the first gradient, then moved."""
    us, average = [], None
    for g in grads:
        average = g if average is None else average
        average = average * alpha + g * (1 - alpha)
        us.append(g + average * lamb)
    return np.stack(us)


def eps_hat_by_adam(grads):
    s, us = {}, []
    for t, g in enumerate(grads, 1):
        u, s = ref.adam(g, s, t=t, eps=1e-8 / np.sqrt(1 - 0.999**t))
        us.append(u)
    return np.stack(us)


def atan2_by_angle(grads, b1=0.9, b2=0.999, a=1.27, b=1.0):
    """Weighted sums over the whole past, no recursion, and the angle of a complex number."""
    us = []
    for t in range(1, len(grads) + 1):
        w1, w2 = b1 ** np.arange(t)[::-1], b2 ** np.arange(t)[::-1]
        m = np.tensordot(w1 / w1.sum(), grads[:t], 1)
        v = np.tensordot(w2 / w2.sum(), grads[:t] ** 2, 1)
        us.append(a * np.angle(b * np.sqrt(v) + 1j * m))
    return np.stack(us)


@pytest.mark.parametrize(
    "rule, other",
    [
        (ref.adan, adan_authors),
        (functools.partial(ref.nadam, correction="algoperf"), nadam_algoperf),
        (ref.grokfast, grokfast_authors),
        (ref.laprop, laprop_authors),
        (ref.stable_adamw, stable_adamw_authors),
        (ref.adam_eps_hat, eps_hat_by_adam),
        (ref.adam_atan2, atan2_by_angle),
    ],
)
def test_a_reference_equals_another_form_of_its_rule(rule, other):
    assert_close(run(rule, gradients()), other(gradients()))


def test_adam_s_equals_its_closed_form():
    t = np.arange(1, STEPS + 1)
    expected = (1 - 0.9**t) / np.sqrt(0.95 * (1 - 0.9 ** (t - 1)) ** 2 + 0.05)
    u = run(ref.adam_s, np.full((STEPS, 2), [3.0, -0.02]), eps=0.0)
    assert_close(u, expected[:, None] * [1, -1])


# Rules that follow a direction.


def test_mars_equals_the_authors_code():
    """AGI-Arena/MARS, update_fn. Its first step differs: last_grad starts at zero there."""
    last = grads = gradients() * 0.05
    for k, g in enumerate(grads):
        c = (g - last) * (0.025 * (0.95 / (1.0 - 0.95))) + g
        norm = np.sqrt((c * c).sum())
        c = c / norm if norm > 1.0 else c
        assert k == 0 or distance(ref.mars(g, last), c) <= TINY
        last = g
    first = ref.mars(1e-3 * grads[0], None)
    np.testing.assert_array_equal(first, 1e-3 * grads[0])
    assert_close(ref.mars(1e-3 * grads[0], 0 * grads[0]), 1.475 * first)
    np.testing.assert_allclose(np.linalg.norm(ref.mars(1e3 * grads[0], None)), 1.0)


def test_trust_ratio_equals_optax():
    g = gradients()
    p = np.linspace(-2, 2, 48).reshape(8, 6)
    us = with_optax(optax.scale_by_trust_ratio(), g, p)
    assert_close(np.stack([ref.trust_ratio(x, p) for x in g]), us)
    np.testing.assert_array_equal(ref.trust_ratio(p, 0 * p), p)


def adamh_levanter(p, grads, lr, b1=0.9, b2=0.95, eps=1e-8):
    """Step as marin-community/marin's _adamh_projected_update, which adds a projected update."""
    target, m, v = np.sqrt(np.sum(p**2)), 0.0, 0.0
    for k, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = m / (1 - b1**k) / (np.sqrt(v / (1 - b2**k)) + eps)
        length = np.sqrt(np.sum(u**2))
        projected = np.sum(p**2) - 2 * lr * target * np.sum(p * u) / length + lr**2 * target**2
        ratio = target / np.sqrt(projected)
        p = p + p * (ratio - 1) - u * (lr * target * ratio / length)
    return p


def test_hyperball_equals_levanters_adamh():
    p = q = np.linspace(-2, 2, 48).reshape(8, 6)
    grads, s = gradients(), {}
    for t, g in enumerate(grads, 1):
        u, s = ref.adam(g, s, t=t, b2=0.95)
        q = ref.hyperball(u, q, np.linalg.norm(p), learning_rate=0.05)
    assert_close(q, adamh_levanter(p, grads, 0.05))


def test_cautious_and_grams_equal_values_found_by_hand():
    u, g = np.array([1.0, -2.0, 3.0, 4.0]), np.array([5.0, 6.0, -7.0, 0.0])
    np.testing.assert_array_equal(ref.cautious(u, g), [4, 0, 0, 0])
    np.testing.assert_array_equal(ref.cautious(u, -u), [0, 0, 0, 0])
    np.testing.assert_array_equal(ref.grams(u, g), [1, 2, -3, 0])
    p = np.array([1.0, 1.0, -1.0, 0.0])
    np.testing.assert_allclose(ref.decoupled(u, p, 0.1), [1.1, -1.9, 2.9, 4])
    np.testing.assert_allclose(ref.cautious_decay(u, p, 0.1), [1.1, -2, 3, 4])


# Schedule-Free.


def schedule_free_authors(y, grads, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, warmup=0):
    """facebookresearch/schedule_free, AdamWScheduleFree.step: y moves in place, x is not stored."""
    ys, z, v, lr_max, weight_sum = [], y, 0.0, -1.0, 0.0
    for k, g in enumerate(grads):
        rate = lr * ((k + 1) / warmup if k < warmup else 1.0)
        lr_max = max(rate, lr_max)
        weight_sum = weight_sum + lr_max**2
        ckp1 = lr_max**2 / weight_sum
        v = v * b2 + (1 - b2) * g * g
        g = g / (np.sqrt(v / (1 - b2 ** (k + 1))) + eps) + decay * y
        y = y + ckp1 * (z - y) + rate * (b1 * (1 - ckp1) - 1) * g
        z = z - rate * g
        ys.append(y)
    return np.stack(ys), y + (1 - 1 / b1) * (z - y)


def schedule_free_optax(y, grads, lr, decay, warmup):
    with jax.enable_x64(True):
        tx = optax.contrib.schedule_free_adamw(lr, weight_decay=decay, warmup_steps=warmup or None)
        y = jax.numpy.asarray(y)
        s, ys, update = tx.init(y), [], jax.jit(tx.update)
        for g in grads:
            u, s = update(jax.numpy.asarray(g), s, y)
            y = y + u
            ys.append(np.asarray(y))
    return np.stack(ys)


def schedule_free_reference(y, grads, lr, decay, warmup):
    sf = ref.ScheduleFreeAdamW(y, lr=lr, weight_decay=decay, warmup_steps=warmup)
    return np.stack([sf.step(g) for g in grads]), sf.x


@pytest.mark.parametrize("decay, warmup", [(0.0, 0), (0.1, 0), (0.1, 20)])
def test_schedule_free_equals_the_authors_code(decay, warmup):
    y, g = np.linspace(-2, 2, 48).reshape(8, 6), gradients()
    ys, x = schedule_free_reference(y, g, 0.1, decay, warmup)
    other_ys, other_x = schedule_free_authors(y, g, 0.1, decay=decay, warmup=warmup)
    assert_close(ys, other_ys)
    assert_close(x, other_x)


def test_schedule_free_equals_optax_without_warmup():
    y, g = np.linspace(-2, 2, 48).reshape(8, 6), gradients()
    ys, _ = schedule_free_reference(y, g, 0.1, 0.1, 0)
    assert_close(ys, schedule_free_optax(y, g, 0.1, 0.1, 0))
    # Known: with warmup, Optax's step has the learning rate of the step before.
    ys, _ = schedule_free_reference(y, g, 0.1, 0.1, 20)
    assert distance(ys, schedule_free_optax(y, g, 0.1, 0.1, 20)) > 0.01


# Known differences between other libraries, which a reference must not "fix"


def test_amsgrad_of_optax_is_not_pytorchs():
    g = gradients()
    assert distance(run(ref.amsgrad, g), run(ref.amsgrad_raw, g)) > 0.01
    assert (
        distance(with_optax(optax.scale_by_amsgrad(), g), with_torch("Adam", g, amsgrad=True))
        > 0.01
    )


def test_nadam_of_optax_is_not_pytorchs():
    g = gradients()
    assert distance(run(ref.nadam, g), run(ref.nadam_scheduled, g)) > 0.01
    assert (
        distance(with_optax(optax.scale_by_adam(nesterov=True), g), with_torch("NAdam", g)) > 0.01
    )
    # ... and the constant form is the limit of the schedule.
    assert_close(run(ref.nadam, g), run(ref.nadam_scheduled, g, momentum_decay=1e9))


def test_adan_of_optax_is_not_the_authors():
    g = gradients()
    assert distance(with_optax(optax.scale_by_adan(), g), adan_authors(g)) > 0.01
    np.testing.assert_allclose(run(ref.adan, g[:1]), run(ref.adan_optax, g[:1]))


def test_the_radam_paper_rectifies_one_step_earlier():
    """b2 = 0.999 has rho_5 = 4.996: Optax and torch rectify from step 6, the paper from step 5."""
    g = gradients()
    differ = [
        not np.array_equal(a, b)
        for a, b in zip(run(ref.radam, g), run(ref.radam, g, threshold=4.0 + 1e-12), strict=True)
    ]
    assert [t for t, d in enumerate(differ, 1) if d] == [5]


# Housekeeping.


@pytest.mark.parametrize(
    "rule", sorted({r for r, *_ in OPTAX + TORCH} | {ref.adan, ref.laprop, ref.adam_s}, key=str)
)
def test_references_do_not_change_their_arguments(rule):
    g = gradients()
    _, s = rule(g[0], {}, t=1)
    before = {k: np.copy(v) for k, v in s.items()}
    g1 = g[1].copy()
    rule(g1, s, t=2)
    np.testing.assert_array_equal(g1, g[1])
    assert s.keys() == before.keys()
    for k in s:
        np.testing.assert_array_equal(s[k], before[k])

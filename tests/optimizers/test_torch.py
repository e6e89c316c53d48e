"""In float64 our optimizers equal PyTorch's, and with some options Keras's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax

STEPS = 100
LR = 1e-2
P0 = np.linspace(-2, 2, 12).reshape(3, 4)


def gradients():
    """Draw scales from 1e-3 to 10 that fall tenfold halfway, and one step without a gradient."""
    rng = np.random.default_rng(3)
    g = rng.normal(size=(STEPS, 3, 4)) * 10.0 ** rng.uniform(-3, 1, size=(3, 4))
    g[STEPS // 2 :] *= 0.1
    g[20] = 0
    return g


def ours(tx):
    """Return the parameters after each step."""

    def step(carry, g):
        p, state = carry
        u, state = tx.update(g, state, p)
        return (p + u, state), p + u

    with jax.enable_x64(True):
        p = jnp.asarray(P0)
        _, path = jax.jit(lambda c, g: jax.lax.scan(step, c, g))(
            (p, tx.init(p)), jnp.asarray(gradients())
        )
        return np.asarray(path)


# PyTorch


def theirs(name, **given):
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.from_numpy(P0.copy()))
    optimizer = getattr(torch.optim, name)([p], lr=LR, **given)
    path = []
    for g in gradients():
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        path.append(p.detach().numpy().copy())
    return np.stack(path)


L2 = {"weight_decay": 0.1, "weight_decay_form": "l2"}
DECAY = {"weight_decay": 0.1}
BETAS = {"betas": (0.8, 0.99), "eps": 1e-6}
OURS = {"b1": 0.8, "b2": 0.99, "eps": 1e-6}
RMS = {"decay": 0.99, "eps_in_sqrt": False}
TINY, SMALL = 1e-12, 1e-6  # SMALL: torch's momentum product is float32; its RAdam has ε elsewhere

TORCH = [
    ("adam", {}, "Adam", {}, TINY),
    ("adam", OURS, "Adam", BETAS, TINY),
    ("adam", L2, "Adam", DECAY, TINY),
    ("adamw", DECAY, "AdamW", DECAY, TINY),
    ("adamw", OURS | DECAY, "AdamW", BETAS | DECAY, TINY),
    ("amsgrad", {"max_of": "raw"}, "Adam", {"amsgrad": True}, TINY),
    ("amsgrad", DECAY | {"max_of": "raw"}, "AdamW", DECAY | {"amsgrad": True}, TINY),
    ("adamax", {}, "Adamax", {}, TINY),
    ("adamax", OURS | L2, "Adamax", BETAS | DECAY, TINY),
    ("nadam", {"momentum_decay": 0.004}, "NAdam", {}, SMALL),
    (
        "nadamw",
        DECAY | {"momentum_decay": 0.01},
        "NAdam",
        DECAY | {"momentum_decay": 0.01, "decoupled_weight_decay": True},
        SMALL,
    ),
    ("radam", {}, "RAdam", {}, SMALL),
    ("radam", L2, "RAdam", DECAY, SMALL),
    ("sgd", {}, "SGD", {}, TINY),
    ("sgd", L2, "SGD", DECAY, TINY),
    ("sgd", {"momentum": 0.9}, "SGD", {"momentum": 0.9}, TINY),
    (
        "sgd",
        L2 | {"momentum": 0.9, "nesterov": True},
        "SGD",
        DECAY | {"momentum": 0.9, "nesterov": True},
        TINY,
    ),
    ("rmsprop", RMS, "RMSprop", {}, TINY),
    ("rmsprop", RMS | L2 | {"momentum": 0.9}, "RMSprop", DECAY | {"momentum": 0.9}, TINY),
    ("rmsprop", RMS | {"centered": True}, "RMSprop", {"centered": True}, 1e-9),
]


def spelled(x):
    return f"({', '.join(f'{k}={v}' for k, v in x.items())})" if isinstance(x, dict) else str(x)


@pytest.mark.parametrize("name, given, torch_name, torch_given, tolerance", TORCH, ids=spelled)
def test_equals_pytorch(name, given, torch_name, torch_given, tolerance):
    path = ours(getattr(adam_jax, name)(LR, **given))
    np.testing.assert_allclose(path, theirs(torch_name, **torch_given), rtol=0, atol=tolerance)


# Keras 3, whose formulas are written out here: src/optimizers/adam.py and nadam.py, update_step

B1, B2, EPS = 0.9, 0.999, 1e-7  # Keras's defaults


def keras_adam(amsgrad=False, weight_decay=0.0, eps=EPS):
    p, m, v, v_hat = P0, 0.0, 0.0, 0.0
    for t, g in enumerate(gradients(), start=1):
        p = p - p * weight_decay * LR
        alpha = LR * np.sqrt(1 - B2**t) / (1 - B1**t)
        m = m + (g - m) * (1 - B1)
        v = v + (g * g - v) * (1 - B2)
        v_hat = np.maximum(v_hat, v)
        p = p - m * alpha / (np.sqrt(v_hat if amsgrad else v) + eps)
        yield p


def keras_nadam():
    p, m, v, product = P0, 0.0, 0.0, 1.0
    for t, g in enumerate(gradients(), start=1):
        u, u_next = (B1 * (1 - 0.5 * 0.96**s) for s in (t, t + 1))
        product = product * u
        m = m + (g - m) * (1 - B1)
        v = v + (g * g - v) * (1 - B2)
        m_hat = u_next * m / (1 - product * u_next) + (1 - u) * g / (1 - product)
        p = p - m_hat * LR / (np.sqrt(v / (1 - B2**t)) + EPS)
        yield p


K = {"b1": B1, "b2": B2, "eps": EPS}
K0 = K | {"eps": 0.0}  # Keras's AMSGrad has eps_hat, ours has not


@pytest.mark.parametrize(
    "tx, keras",
    [
        (adam_jax.adam(LR, **K, eps_hat=True), keras_adam()),
        (adam_jax.adamw(LR, **K, eps_hat=True, **DECAY), keras_adam(**DECAY)),
        (adam_jax.nadam(LR, **K, momentum_decay=1.0), keras_nadam()),
        (adam_jax.amsgrad(LR, **K0, max_of="raw"), keras_adam(amsgrad=True, eps=0.0)),
    ],
    ids=["adam", "adamw", "nadam", "amsgrad"],
)
def test_equals_keras(tx, keras):
    np.testing.assert_allclose(ours(tx), np.stack(list(keras)), rtol=0, atol=TINY)

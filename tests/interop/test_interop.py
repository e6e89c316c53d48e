"""A run that starts in PyTorch continues in adam_jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import adam_jax
from adam_jax.interop import flax_names, from_torch
from helpers import says

START = {"w": np.linspace(-1, 1, 6144).reshape(48, 128), "b": np.linspace(0.5, 2, 3)}
START = {name: value.astype(np.float32) for name, value in START.items()}


def gradient(name, p, t):
    """Return a gradient; the same function serves arrays of NumPy, PyTorch, and JAX."""
    return (0.5 + (name == "b")) * p + np.float32(0.3 * np.cos(t))


VARIANTS = {
    "AdamW": ({}, lambda **k: adam_jax.adamw(1e-2, weight_decay=1e-2, **k)),
    "Adam": (
        {"amsgrad": True},
        lambda **k: adam_jax.amsgrad(1e-2, max_of="raw", **k),
    ),
    "NAdam": ({}, lambda **k: adam_jax.nadam(1e-2, momentum_decay=0.004, **k)),
    "RAdam": ({}, lambda **k: adam_jax.radam(1e-2, **k)),
    "Adamax": ({}, lambda **k: adam_jax.adamax(1e-2, **k)),
    "SGD": ({"momentum": 0.9}, lambda **k: adam_jax.sgd(1e-2, momentum=0.9, **k)),
    "RMSprop": (
        {"centered": True},
        lambda **k: adam_jax.rmsprop(1e-2, 0.99, eps_in_sqrt=False, centered=True, **k),
    ),
}


@pytest.mark.parametrize(
    "name, storage",
    [
        *((name, "float32") for name in VARIANTS),
        *((n, "int8") for n in ("AdamW", "SGD", "RMSprop")),
    ],
)
def test_a_pytorch_run_continues_in_adam_jax(name, storage):
    torch = pytest.importorskip("torch")
    given, make = VARIANTS[name]
    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in START.items()}
    theirs = getattr(torch.optim, name)(tensors.values(), lr=1e-2, **given)

    def steps(first):
        for t in range(first, first + 25):
            for k, p in tensors.items():
                p.grad = torch.tensor(gradient(k, p.detach().numpy(), t))
            theirs.step()

    steps(1)
    params = {k: jnp.asarray(p.detach().numpy().copy()) for k, p in tensors.items()}
    half = dict(params)
    tx = make(storage=storage)
    state = from_torch(theirs.state_dict(), tx, params, ["w", "b"])
    update = jax.jit(tx.update)
    steps(26)
    for t in range(26, 51):
        grads = {k: gradient(k, p, t) for k, p in params.items()}
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for k, p in tensors.items():
        stayed = p.detach().numpy()
        if storage == "float32":
            np.testing.assert_allclose(params[k], stayed, rtol=1e-6, atol=1e-6)
        else:  # each moment is off by up to a step of the code, without bias
            moved = np.linalg.norm(stayed - half[k])
            assert np.linalg.norm(params[k] - stayed) <= 0.03 * moved


def entry(shape, step=3):
    rng = np.random.default_rng(len(shape))
    return {"step": step, "exp_avg": rng.normal(size=shape), "exp_avg_sq": rng.random(shape)}


def dict_of(shapes, names=None, steps=None):
    group = {"params": list(range(len(shapes)))} | ({"param_names": names} if names else {})
    steps = steps or [3] * len(shapes)
    entries = {i: entry(s, t) for i, (s, t) in enumerate(zip(shapes, steps, strict=True))}
    return {"state": entries, "param_groups": [group]}


class Net(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(7, 12, name="embed")(tokens)
        x = linen.Conv(4, (3, 2), name="conv")(x.reshape(1, 4, 3, 12))
        return linen.Dense(5, name="head")(linen.LayerNorm(name="norm")(x))


TORCH = {
    "embed.weight": (7, 12),
    "conv.weight": (4, 12, 3, 2),
    "conv.bias": (4,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "head.weight": (5, 4),
    "head.bias": (5,),
}


def test_flax_names_match_names_and_axes_of_pytorch():
    params = Net().init(jax.random.key(0), jnp.zeros(12, jnp.int32))["params"]
    state_dict = dict_of(list(TORCH.values()), list(TORCH))
    state = from_torch(state_dict, adam_jax.adamw(1e-3), params, flax_names(params))
    mu = state[0].mu
    given = {name: state_dict["state"][i]["exp_avg"] for i, name in enumerate(TORCH)}
    np.testing.assert_allclose(mu["head"]["kernel"], given["head.weight"].T, rtol=1e-6)
    conv = given["conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(mu["conv"]["kernel"], conv, rtol=1e-6)
    np.testing.assert_allclose(mu["embed"]["embedding"], given["embed.weight"], rtol=1e-6)
    np.testing.assert_allclose(mu["norm"]["scale"], given["norm.weight"], rtol=1e-6)
    assert adam_jax.step_count(state) == 3


def test_from_torch_takes_nnx_and_the_names_in_a_state_dict():
    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    state_dict = dict_of([(5, 4), (5,)], ["weight", "bias"])
    renamed = {"weight": "kernel", "bias": "bias"}
    state = from_torch(
        state_dict, adam_jax.adamw(1e-3), params, lambda name, x: (renamed[name], x.T)
    )
    assert adam_jax.moments(state)["mu"]["kernel"][...].shape == (4, 5)
    plain = dict_of([(2, 2)], ["head.w"])
    state = from_torch(plain, adam_jax.adamw(1e-3), {"head": {"w": jnp.ones((2, 2))}})
    assert adam_jax.step_count(state) == 3


@pytest.mark.parametrize(
    "state_dict, mapping, parts",
    [
        (
            dict_of([(3, 2)]),
            ["w"],
            ("exp_avg", "0", "(3, 2)", "'w'", "(2, 3)"),
        ),
        (dict_of([(2, 3)]), ["v"], ("'v'", "['w']")),
        (dict_of([(2, 3)]), ["w", "b"], ("mapping", "2", "1")),
        (dict_of([(2, 3)]), None, ("param_names", "mapping=")),
        (dict_of([(3, 2)]), flax_names({}), ("'0'", "no param_names", "named_parameters()")),
        (dict_of([(2, 3), (2, 3)], steps=[1, 2]), ["w", "w"], ("numbers of steps",)),
        (
            {"state": {}, "param_groups": [{"params": [0]}]},
            ["w"],
            ("mu, nu", "state"),
        ),
    ],
)
def test_from_torch_names_what_does_not_fit(state_dict, mapping, parts):
    with pytest.raises(ValueError, match=says("from_torch", *parts)):
        from_torch(state_dict, adam_jax.adamw(1e-3), {"w": jnp.ones((2, 3))}, mapping)

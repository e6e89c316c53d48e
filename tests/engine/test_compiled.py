"""The compiled step: traces, temporary buffers, kernels, and donation."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adam_jax
from helpers import QUICKLY, optimizer, slowly, step_of, tree


def counting_rule():
    """Return Adam as a rule that records its traces, and the records."""
    traced = []

    @adam_jax.rule(mu=adam_jax.signed, nu=adam_jax.positive)
    def counted(g, mu, nu, *, t, b1=0.9, b2=0.999, eps=1e-8):
        traced.append(g.shape)
        return adam_jax.rules.adam(g, mu, nu, t=t, b1=b1, b2=b2, eps=eps, eps_root=0.0)

    return counted, traced


def test_a_leaf_is_traced_once_for_each_shape_and_dtype():
    rule, traced = counting_rule()
    tx = adam_jax.from_rule(rule, 1e-3, weight_decay=0.1)
    params = {f"layer{i}": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)} for i in range(50)}
    jax.jit(tx.update).trace(params, tx.init(params), params)
    assert sorted(traced) == [(3, 4), (4,)]


def test_an_eager_loop_is_traced_once():
    rule, traced = counting_rule()
    params = {f"layer{i}": jnp.ones(4) for i in range(5)}
    state = adam_jax.from_rule(rule, 1e-3).init(params)
    for step in range(5):
        _, state = adam_jax.from_rule(rule, 1e-3 / (step + 1), b2=0.99).update(params, state)
    assert traced == [(4,)]


def compiled(make, donate=()):
    tx = make(1e-3)
    params = {"w": jnp.ones((512, 512)), "b": jnp.ones(512)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=donate)
    return jitted.lower(params, tx.init(params), params).compile()


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "name, donate",
    [
        ("adamw", ()),
        *((n, (0, 1)) for n in ("adamw", "amsgrad", "radam")),
        *(slowly(n, (0, 1)) for n in ("adam", "nadam", "adamax", "sgd")),
    ],
)
def test_a_float32_step_needs_no_more_temporaries_than_optax(name, donate):
    ours, theirs = (
        compiled(getattr(m, name), donate).memory_analysis().temp_size_in_bytes
        for m in (adam_jax, optax)
    )
    scalars = 256 if name == "radam" else 0  # its averaging length takes a few more of them
    assert ours <= theirs + scalars


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_float32_step_compiles_to_the_kernels_of_optax(name):
    """Compare their number, results, and numbers of operands."""

    def kernels(module):
        entry = compiled(getattr(module, name), donate=(0, 1)).as_text().partition("ENTRY")[2]
        calls = re.findall(r"= (\S+) fusion\((.*?)\), kind", entry)
        return sorted((result, operands.count("%")) for result, operands in calls)

    ours = kernels(adam_jax)
    assert len(ours) >= 6
    assert ours == kernels(optax)


def test_the_whole_state_is_donated():
    analysis = compiled(adam_jax.adamw, donate=(0, 1)).memory_analysis()
    params_and_state = 3 * 4 * (512 * 512 + 512) + 4
    assert analysis.alias_size_in_bytes == params_and_state


@pytest.mark.parametrize(
    "jit",
    [slowly(lambda f: f), jax.jit],
    ids=["eager init", "jitted init"],
)
def test_state_and_parameters_can_be_donated(jit):
    tx, params, grads = optimizer("amsgrad", weight_decay=0.1), tree(0), tree(1)
    params, grads = ({"float32": x, "bfloat16": narrow(x)} for x in (params, grads))
    state = jit(tx.init)(params)
    expected = (jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, state))
    kept = jax.jit(step_of(tx), compiler_options=QUICKLY)
    donated = jax.jit(step_of(tx), donate_argnums=(0, 1), compiler_options=QUICKLY)
    for _ in range(2):
        before = params, state
        params, state = donated(params, state, grads)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        expected = kept(*expected, grads)
    chex.assert_trees_all_equal((params, state), expected)


def narrow(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

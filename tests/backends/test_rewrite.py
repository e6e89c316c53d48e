"""A kernel's rewritten computation equals the original up to rounding, with fewer operations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

from adam_jax._backends import rewrite, stages
from adam_jax.storage._blockwise import block_absmax, per_element
from adam_jax.storage._random_bits import positions, random_bits, second_bits
from helpers import normal


def rewritten(function, *operands):
    """Return the jaxpr of a function, inlined and rewritten as for every kernel."""
    jaxpr = jax.make_jaxpr(function)(*operands)
    for rewritings in ({}, rewrite.SIMPLER):
        again = functools.partial(rewrite.rewrite, jaxpr, rewritings=rewritings)
        jaxpr = jax.make_jaxpr(lambda *xs, again=again: again(operands=xs))(*operands)
    return jaxpr


def clip(x, y):
    largest = jnp.where(x > y, x, y)
    return jnp.where(largest < 2.0, largest, 2.0)


@pytest.mark.parametrize(
    "function, gone, used",
    [
        (clip, {"select_n", "gt", "lt"}, {"max", "min"}),
        (lambda x, y: x / y[0, 0], set(), {"mul"}),
        (lambda x, y: jax.lax.optimization_barrier(x) + y, {"optimization_barrier"}, {"add"}),
        (lambda x, y: x * 0.3 * per_element(y[:, :2], 128, 256), set(), {"mul"}),
    ],
)
def test_a_rewritten_computation_gives_the_same_numbers(function, gone, used):
    x, y = 3 * normal((2, 8, 256))
    jaxpr = rewritten(function, x, y)
    live = jax.jit(jax.extend.core.jaxpr_as_fun(jaxpr))
    np.testing.assert_allclose(live(x, y)[0], function(x, y), rtol=3e-7)
    live = jax.make_jaxpr(lambda x, y: live_part(jaxpr, x, y))(x, y)
    names = {eqn.primitive.name for eqn in live.eqns}
    assert used <= names and not gone & names


def live_part(jaxpr, *operands):
    """Evaluate a jaxpr without equations whose results are unused."""
    kept, _ = pe.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return jax.core.eval_jaxpr(kept, jaxpr.consts, *operands)


def quantized(x, scales, row):
    """Return arrays per element, per block, and per row, over two stages and a sum."""
    y = jnp.sqrt(jnp.abs(x)) * per_element(scales, 128, 512) + row
    largest = block_absmax(y, block=128)
    lane = jax.lax.broadcasted_iota(jnp.float32, (1, 512), 1)
    return y / per_element(largest, 128, 512) + lane, largest * 2, jnp.sum(y, axis=1, keepdims=True)


def test_a_tile_in_slices_equals_the_whole_tile():
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [jax.random.uniform(k, (8, n)) for k, n in zip(keys, (512, 4, 1), strict=True)]
    jaxpr = rewritten(quantized, *operands)
    plan = stages.plan(jaxpr.jaxpr, 512)
    assert len(plan.stages) == 2 and len(plan.kept) == 1
    scratch = [np.full((8, 512), np.nan, np.float32)]
    out = [np.full(v.aval.shape, np.nan, np.float32) for v in jaxpr.jaxpr.outvars]

    def write(k, x, at):
        out[k][at] = x

    stages.run(plan, [], [np.asarray(x) for x in operands], write, scratch)
    for got, expected in zip(out, quantized(*operands), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_two_moments_round_independently_with_one_hash():
    key, step = jnp.uint32(123), jnp.uint32(7)
    bits = random_bits(key, step, positions((512, 2048)), "mu")
    first, second = (np.asarray(b >> 8, float) / 2**24 for b in (bits, second_bits(bits)))
    error = 1 / np.sqrt(first.size)
    assert abs(np.mean(second) - 0.5) <= 4 * error / np.sqrt(12)
    for lag in range(64):
        a, b = (first[:, : 2048 - lag], second[:, lag:])
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) <= 4.5 * error
    counts, *_ = np.histogram2d(first.ravel(), second.ravel(), bins=16)
    expected = first.size / 256
    assert np.sum((counts - expected) ** 2 / expected) <= 255 + 5 * np.sqrt(2 * 255)

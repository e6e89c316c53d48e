"""Kernels on a GPU equal XLA on the same GPU, for every rule and storage.

pytest -m gpu tests/backends                         # on a GPU
ADAM_JAX_INTERPRET=1 pytest -m gpu tests/backends    # on CPU, which emulates a GPU's arithmetic

A kernel on a GPU divides and takes square roots with errors of 2 ulp, and fuses products with sums.
Therefore floats may differ in their last bits, and a code may be the neighbor of XLA's. Each step
starts from XLA's parameters and state, so that differences don't accumulate.
"""

from __future__ import annotations

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax._backends import choice, pallas
from helpers import CALL, EVERY_RULE, QUICKLY, REFERENCES, TYPICAL, defaults, leaves_of, masters

triton = pytest.importorskip("adam_jax._backends.triton", exc_type=ImportError)
pytestmark = pytest.mark.standard_promotion  # apply_updates adds float32 to bfloat16

SHAPES = {"aligned": (64, 256), "unaligned": (2, 37, 300), "small": (3,), "nan": (64, 256)}
STEPS = 2

# the storage of the moments, the parameters' dtype, and a wrapper
STORAGES = {
    "float32": ("float32", jnp.float32, None),
    "bfloat16": ("bfloat16", jnp.float32, None),
    "int8": ("int8", jnp.float32, None),
    "compact": ("compact", jnp.float32, None),
    "int8, bfloat16 parameters": ("int8", jnp.bfloat16, None),
    "int8, master weights": ("int8", jnp.bfloat16, masters),
}


def emulated(assembly, *operands):
    """Compute what PTX instructions do, with the largest error that they may have."""
    x, *others = operands
    if ".NaN" in assembly:
        return jnp.maximum(x, *others) if "max" in assembly else jnp.minimum(x, *others)
    if "sqrt" in assembly:
        return inexact(jnp.sqrt(x))
    if "rcp" in assembly:
        return inexact(1 / x)
    (y, z), negated = others, re.search(r"neg.ftz.f32 t, \$(\d)", assembly)
    signs = [-1.0 if negated and int(negated[1]) == k else 1.0 for k in (1, 3)]
    return inexact(signs[0] * x * y) + signs[1] * z


def inexact(x):
    """Return a neighbor of x, above or below; the largest number stays finite."""
    is_odd = jax.lax.bitcast_convert_type(x, jnp.int32) & 1
    neighbor = x * jnp.where(is_odd == 1, 1 + 2.0**-23, 1 - 2.0**-23).astype(x.dtype)
    return jnp.where(jnp.isinf(neighbor), x, neighbor)


def ignoring_nan(site):
    """Return a maximum or minimum as Triton computes it without our rewriting."""
    out = site.eqn.primitive.bind(*site.operands)
    if not jnp.issubdtype(out.dtype, jnp.floating) or jnp.ndim(out) < 2:
        return out
    x, y = site.operands
    return jnp.where(jnp.isnan(x), y, jnp.where(jnp.isnan(y), x, out))


EMULATED = {"max": ignoring_nan, "min": ignoring_nan, **triton.FAST}


@pytest.fixture
def compiler_options(request, monkeypatch):
    """Return options for XLA's compiler; interpret kernels with a GPU's arithmetic on CPU."""
    if jax.default_backend() == "gpu":
        return {}
    is_slow = request.node.get_closest_marker("slow") is not None
    if not is_slow and not os.environ.get("ADAM_JAX_INTERPRET"):
        pytest.skip("needs a GPU; ADAM_JAX_INTERPRET=1 runs it on CPU, in interpreted kernels")
    monkeypatch.setattr(triton, "_ptx", emulated)
    target = pallas.interpreted()._replace(rewritings=EMULATED)
    monkeypatch.setattr(pallas, "TARGETS", {"cpu": lambda: target})
    traced_anew = functools.partial(pallas.execute_leaf)
    monkeypatch.setitem(choice.BACKENDS, "pallas", traced_anew)
    return QUICKLY


def make(name, storage, implementation):
    rule, (moments, _, wrap) = EVERY_RULE[name], STORAGES[storage]
    options = {
        "storage": lambda path, leaf: moments,  # however small the leaf is
        "implementation": implementation,
    }
    if name in REFERENCES:
        tx = adam_jax.from_rule(rule, 0.125, **options, **defaults(name))
    else:  # a part of an optimizer
        tx = adam_jax.scale_by_rule(rule, **options, **dict.fromkeys(rule.hyperparams, 0.5))
    return wrap(tx) if wrap else tx


def update(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, updates


def apply(tx, grads, state, params):
    return adam_jax.apply(tx, grads, state, params)


WAYS = {"update": update, "apply": apply}


def params_and_grads(storage):
    """Return parameters, and the gradients of each step; some of one leaf's aren't finite."""
    dtype = STORAGES[storage][1]
    params = {
        name: jax.random.normal(jax.random.key(k), shape).astype(dtype)
        for k, (name, shape) in enumerate(SHAPES.items())
    }
    grads = []
    for t in range(STEPS):
        g = jax.tree.map(lambda p, t=t: jnp.sin(p * (3.0 + t)), params)
        bad = g["nan"].at[5, 200].set(jnp.nan).at[40, 3].set(jnp.inf)
        grads.append({**g, "nan": bad})
    return params, grads


def check(name, storage, way, options):
    kernel, xla = (make(name, storage, i) for i in ("pallas", "xla"))
    params, grads = params_and_grads(storage)
    state = xla.init(params)
    ours, reference = (
        jax.jit(functools.partial(WAYS[way], tx)).lower(grads[0], state, params).compile(options)
        for tx in (kernel, xla)
    )
    if jax.default_backend() == "gpu":
        assert CALL["cuda"] in ours.as_text() and CALL["cuda"] not in reference.as_text()
    for g in grads:
        expected = reference(g, state, params)
        assert_close(with_masters(ours(g, state, params)), with_masters(expected))
        params, state = expected[:2]


def with_masters(result):
    """Replace residuals by masters, because a residual wraps around if its parameter differs.

    Updates differ as much as their parameters, so they aren't compared.
    """
    params, state, *_ = result
    if not isinstance(state, adam_jax.transforms.master_weights.MasterWeightsState):
        return result
    precise = adam_jax.get_master_weights(params, state)
    return params, state._replace(rest=()), {"masters": precise}


ULP = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 2.0**-7}
MASTER_ULP = 2.0**-15


def assert_close(ours, expected):
    """Check that floats differ by rounding, integers by one code, and the same elements are NaN."""
    for (path, a), (_, b) in zip(leaves_of(ours), leaves_of(expected), strict=True):
        assert a.dtype == b.dtype, path
        if jnp.issubdtype(a.dtype, jnp.floating):
            rtol = MASTER_ULP if "masters" in path else ULP[a.dtype]
            # a bfloat16 parameter's update is bfloat16, too, unless XLA leaves out this rounding
            is_sum = path.startswith("0/") and a.dtype == jnp.bfloat16
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            largest = np.max(np.abs(b), where=np.isfinite(b), initial=0)
            atol = (2.0**-7 if is_sum else 1e-6) * largest
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)
        elif "nan" not in path:  # a block's codes mean nothing if its scale is NaN
            distance = np.abs(np.asarray(a, int) - np.asarray(b, int))
            assert np.max(distance, initial=0) <= 1, path


def way_of(storage):
    """Return the way to step parameters of this dtype: float32 by update, bfloat16 by apply."""
    return "update" if STORAGES[storage][1] == jnp.float32 else "apply"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, storage",
    [
        (name, storage)
        for name, rule in EVERY_RULE.items()
        for storage in STORAGES
        if rule.moments or storage not in ("bfloat16", "int8", "compact")
    ],
)
def test_a_kernel_equals_xla_on_a_gpu(name, storage, compiler_options):
    check(name, storage, way_of(storage), compiler_options)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", TYPICAL)
def test_kernels_equal_xla_on_a_gpu_with_update_and_apply_swapped(name, storage, compiler_options):
    (way,) = WAYS.keys() - {way_of(storage)}
    check(name, storage, way, compiler_options)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8, master weights", "compact"])
def test_the_tests_for_a_gpu_pass_on_cpu(storage, compiler_options):
    check("stable_adamw", storage, way_of(storage), compiler_options)

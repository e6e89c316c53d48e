"""Pallas kernels compiled by Triton, for GPUs: masked access, and lowering without a warning.

From jax 0.12 on, JAX warns whenever it lowers a Pallas kernel for Triton that it will remove this
compiler. It warns from its own code, long after ours has returned, so that a user with warnings as
errors could not run a kernel that this library chose. The warning is for us: the lowering of our
kernels, and nothing else, ignores it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.pallas import triton
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

COMPILER = triton.CompilerParams(num_warps=4)


def load(ref: Any, mask: Callable[[], jax.Array | None]) -> jax.Array:
    """Read the elements of a tile that the mask selects; the others are undefined."""
    inside = mask()
    return ref[...] if inside is None else triton.load(ref, mask=inside)


def store(ref: Any, x: jax.Array, mask: Callable[[], jax.Array | None]) -> None:
    """Write the elements of a tile that the mask selects."""
    inside = mask()
    if inside is None:
        ref[...] = x
    else:
        triton.store(ref, x, mask=inside)


def without_warning(kernel: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """Return `kernel`, whose lowering ignores the deprecation of Pallas on Triton."""

    def call(*operands: jax.Array) -> list[jax.Array]:
        return _kernel_p.bind(*operands, jaxpr=jax.make_jaxpr(kernel)(*operands))

    return call


_kernel_p = Primitive("adam_jax_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_impl
def _run(*operands: jax.Array, jaxpr: Any) -> Sequence[jax.Array]:
    return jaxpr_as_fun(jaxpr)(*operands)


@_kernel_p.def_abstract_eval
def _types(*operands: Any, jaxpr: Any) -> Sequence[Any]:
    del operands
    return jaxpr.out_avals


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, jaxpr: Any) -> Any:
    with warnings.catch_warnings():
        message = "The Pallas Triton backend is deprecated"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, jaxpr: Any) -> Any:
    out = without_warning(jax.vmap(jaxpr_as_fun(jaxpr), tuple(axes)))(*operands)
    return out, [0] * len(out)


mlir.register_lowering(_kernel_p, _lower)
batching.primitive_batchers[_kernel_p] = _batch

"""A primitive that wraps a Pallas kernel, to explain errors and to hide a deprecation warning.

From jax 0.12 on, lowering a Pallas kernel for Triton warns that JAX will remove this compiler.
Lowering happens after our code has returned, so a user who turns warnings into errors couldn't run
a kernel that this library chose. The primitive ignores the warning when it is lowered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir


def kernel_call(
    kernel: Callable[..., Sequence[jax.Array]], shape: tuple[int, ...]
) -> Callable[..., list[jax.Array]]:
    """Wrap a kernel in the primitive; error messages show the leaf's `shape`."""

    def call(*operands: jax.Array) -> list[jax.Array]:
        return _kernel_p.bind(*operands, jaxpr=jax.make_jaxpr(kernel)(*operands), shape=shape)

    return call


_kernel_p = Primitive("adam_jax_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_impl
def _run(*operands: jax.Array, jaxpr: Any, shape: tuple[int, ...]) -> Sequence[jax.Array]:
    del shape
    return jaxpr_as_fun(jaxpr)(*operands)


@_kernel_p.def_abstract_eval
def _types(*operands: Any, jaxpr: Any, shape: tuple[int, ...]) -> Sequence[Any]:
    del operands, shape
    return jaxpr.out_avals


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, jaxpr: Any, shape: Any) -> Any:
    with warnings.catch_warnings():
        message = "The Pallas Triton backend is deprecated"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        try:
            return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)
        except Exception as error:
            raise unsupported(shape, error) from error


def unsupported(shape: tuple[int, ...], error: Exception) -> NotImplementedError:
    """Return the error for a rule that doesn't compile as a kernel."""
    return NotImplementedError(
        f"adam_jax: the rule must compile as a Pallas kernel for a leaf of shape {shape}, got "
        f"{error}; use implementation='stream'"
    )


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, jaxpr: Any, shape: Any) -> Any:
    batched = jax.vmap(jaxpr_as_fun(jaxpr), tuple(axes))
    out = kernel_call(batched, shape)(*operands)
    return out, [0] * len(out)


mlir.register_lowering(_kernel_p, _lower)
batching.primitive_batchers[_kernel_p] = _batch

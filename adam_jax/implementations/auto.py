"""The choice of an implementation, leaf by leaf."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from adam_jax import storage
from adam_jax.implementations import stream, xla
from adam_jax.implementations.platform import target_platform
from adam_jax.implementations.steps import Step


def run(
    leaf: Callable[..., Step], asks: Sequence[int], over: int, u: jax.Array, *operands: Any
) -> Any:
    """Coded state in a kernel where there are any, else in tiles; XLA fuses the rest well."""
    if not any(storage.is_coded(x) for moments in operands[2] for x in moments):
        return xla.run(leaf, asks, over, u, *operands)
    streamed = functools.partial(stream.run, leaf, asks, over)
    if target_platform() == "cpu":
        return streamed(u, *operands)
    from adam_jax.implementations import pallas  # at the first kernel: Pallas takes a while

    kernel = functools.partial(pallas.run, leaf, asks, over)
    if not _compiles(kernel, u, *operands):
        return streamed(u, *operands)
    # a program that an accelerator's host runs itself is not to interpret a kernel
    return jax.lax.platform_dependent(u, *operands, cpu=streamed, default=kernel)


def _compiles(step: Callable[..., Any], *operands: Any) -> bool:
    """Whether the step compiles for operands like these; the first that does not is told."""
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    try:
        if target_platform() == jax.default_backend():
            jax.jit(step).lower(*types).compile()
        else:  # ahead of time: only lowering, which comes later, knows more than a trace
            jax.eval_shape(step, *types)
    except Exception as error:  # compilers raise what they like
        if not _told:
            _told.append(error)
            warnings.warn(
                f"adam_jax: no kernel on {target_platform()} for a leaf of shape "
                f"{types[0].shape}, which is slower without; it runs as implementation='stream' "
                f"does. {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    return True


_told: list[Exception] = []

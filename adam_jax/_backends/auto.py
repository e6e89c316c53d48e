"""The choice of an implementation, leaf by leaf."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from adam_jax import storage
from adam_jax._backends import tiled, xla
from adam_jax._backends.per_shard import is_unknown
from adam_jax._backends.platform import target_platform
from adam_jax._backends.steps import Step


def run(
    leaf: Callable[..., Step],
    asks: Sequence[int],
    over: int,
    sharding: NamedSharding | None,
    u: jax.Array,
    *operands: Any,
) -> Any:
    """Run the step of quantized state in a kernel or in tiles; XLA fuses the other steps well."""
    if not storage.any_coded(operands[2]):
        return xla.run(leaf, asks, over, sharding, u, *operands)
    streamed = functools.partial(tiled.run, leaf, asks, over, sharding)
    if target_platform() == "cpu":
        return streamed(u, *operands)
    if target_platform() == "tpu" and is_unknown(u, sharding):
        _warn_once(
            "a leaf may be sharded over automatic mesh axes, and on TPU kernels need to know how; "
            "it runs as implementation='xla' does, which is slower. Use explicit axes "
            "(jax.make_mesh), or wrap the optimizer, e.g. adam_jax.zero1(tx, mesh, specs=specs) "
            "with the PartitionSpecs of the parameters"
        )
        return xla.run(leaf, asks, over, sharding, u, *operands)
    from adam_jax._backends import pallas  # at the first kernel: Pallas takes a while

    kernel = functools.partial(pallas.run, leaf, asks, over, sharding)
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
        _warn_once(
            f"no kernel on {target_platform()} for a leaf of shape {types[0].shape}, which is "
            f"slower without; it runs as implementation='stream' does. "
            f"{type(error).__name__}: {error}"
        )
        return False
    return True


def _warn_once(message: str) -> None:
    if not _warned:
        _warned.append(message)
        warnings.warn(f"adam_jax: {message}", RuntimeWarning, stacklevel=3)


_warned: list[str] = []

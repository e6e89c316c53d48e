"""The backends by name, and the choice of one for a leaf."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding

from adam_jax._backends import tiled, xla
from adam_jax._backends.per_shard import is_unknown
from adam_jax._backends.step import Operands, Result, Step
from adam_jax.storage._moments import any_bfloat16, any_lossy, any_total


def choose(step: Step, operands: Operands, sharding: NamedSharding | None) -> Result:
    """Run steps of lossy state in a kernel or in tiles, and others in XLA, which fuses well.

    On TPU, a kernel also runs steps of bfloat16 state, because XLA moves 1.4 times as many bytes
    as necessary. On GPU, it also runs rules with totals, because XLA reads the leaf twice.
    """
    platform = step.platform
    is_lossy = any_lossy(operands.moments)
    special = {"tpu": any_bfloat16, "gpu": any_total}.get(platform)
    if not is_lossy and not (special and special(operands.moments)):
        return xla.execute_leaf(step, operands, sharding)
    if platform == "cpu" and operands.update.size <= tiled.TILE["cpu"]:
        return xla.execute_leaf(step, operands, sharding)
    if platform not in ("gpu", "tpu"):
        if platform != "cpu":
            _warn_once(
                f"the platform must be gpu or tpu for kernels, got {platform}; falling back to "
                f"implementation='stream', which is slower"
            )
        return tiled.execute_leaf(step, operands, sharding)
    if platform == "gpu" and not has_triton():
        return xla.execute_leaf(step, operands, sharding)
    if platform == "tpu" and is_unknown(operands.update, sharding):
        if is_lossy:
            _warn_once(
                "on TPU, kernels need a leaf's sharding, which automatic mesh axes don't provide; "
                "falling back to implementation='xla', which is slower. Use explicit axes "
                "(jax.make_mesh), or wrap the optimizer, e.g. adam_jax.zero1(tx, mesh, "
                "specs=specs) with the PartitionSpecs of the parameters"
            )
        return xla.execute_leaf(step, operands, sharding)
    # the program may run on the accelerator's host CPU, where kernels don't compile
    return jax.lax.platform_dependent(
        operands,
        cpu=functools.partial(tiled.execute_leaf, step, sharding=sharding),
        default=functools.partial(execute_in_kernel, step, sharding=sharding),
    )


@functools.cache
def has_triton() -> bool:
    """Whether this JAX still compiles Pallas kernels with Triton, which jax 0.12 deprecates."""
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return False
    return True


def execute_in_kernel(step: Step, operands: Operands, sharding: NamedSharding | None) -> Result:
    """Run the step in a Pallas kernel. Only this imports Pallas, which is slow."""
    if step.platform == "gpu" and not has_triton():
        raise NotImplementedError(
            "implementation='pallas': JAX must have jax.experimental.pallas.triton for kernels on "
            "gpu, got a JAX without it; use implementation='xla'"
        )
    from adam_jax._backends import pallas

    return pallas.execute_leaf(step, operands, sharding)


BACKENDS: dict[str, Callable[[Step, Operands, NamedSharding | None], Result]] = {
    "auto": choose,
    "xla": xla.execute_leaf,
    "stream": tiled.execute_leaf,
    "pallas": execute_in_kernel,
}
"""Functions that run the step of a leaf, by the name that `implementation=` takes."""


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"adam_jax: {message}", RuntimeWarning, stacklevel=3)

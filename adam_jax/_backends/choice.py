"""The backends by name, and which one runs a leaf."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding

from adam_jax._backends import tiled, xla
from adam_jax._backends.per_shard import is_unknown
from adam_jax._backends.step import Operands, Result, Step
from adam_jax.storage._moments import any_quantized


def choose(step: Step, operands: Operands, sharding: NamedSharding | None) -> Result:
    """Run the step of quantized state in a kernel or in tiles; XLA fuses the other steps well."""
    platform = step.platform
    if not any_quantized(operands.moments):
        return xla.execute_leaf(step, operands, sharding)
    if platform == "cpu" and operands.update.size <= tiled.TILE["cpu"]:
        return xla.execute_leaf(step, operands, sharding)
    if platform not in ("gpu", "tpu"):
        if platform != "cpu":
            _warn_once(
                f"kernels must run on a GPU or a TPU, got {platform}; the step runs as "
                f"implementation='stream' does, which is slower"
            )
        return tiled.execute_leaf(step, operands, sharding)
    if platform == "tpu" and is_unknown(operands.update, sharding):
        _warn_once(
            "a leaf may be sharded over automatic mesh axes, and on TPU kernels need to know how; "
            "it runs as implementation='xla' does, which is slower. Use explicit axes "
            "(jax.make_mesh), or wrap the optimizer, e.g. adam_jax.zero1(tx, mesh, specs=specs) "
            "with the PartitionSpecs of the parameters"
        )
        return xla.execute_leaf(step, operands, sharding)
    # an accelerator's host may run the program, and must not interpret a kernel
    return jax.lax.platform_dependent(
        operands,
        cpu=functools.partial(tiled.execute_leaf, step, sharding=sharding),
        default=functools.partial(execute_in_kernel, step, sharding=sharding),
    )


def execute_in_kernel(step: Step, operands: Operands, sharding: NamedSharding | None) -> Result:
    """Run the step in a Pallas kernel; Pallas is imported at the first one, because it is slow."""
    from adam_jax._backends import pallas

    return pallas.execute_leaf(step, operands, sharding)


BACKENDS: dict[str, Callable[[Step, Operands, NamedSharding | None], Result]] = {
    "auto": choose,
    "xla": xla.execute_leaf,
    "stream": tiled.execute_leaf,
    "pallas": execute_in_kernel,
}
"""Runs the step of a leaf, by the name that `implementation=` takes."""


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"adam_jax: {message}", RuntimeWarning, stacklevel=3)

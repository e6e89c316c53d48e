"""Plain XLA: the step is traced as it is, and XLA fuses it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from adam_jax import storage
from adam_jax._backends import unaligned
from adam_jax._backends.per_shard import per_shard
from adam_jax._backends.steps import Step, finish
from adam_jax._util.partition_specs import is_explicit
from adam_jax.storage._random_bits import whole


def run(
    leaf: Callable[..., Step],
    asks: Sequence[int],
    over: int,
    sharding: NamedSharding | None,
    u: jax.Array,
    *operands: Any,
) -> Any:
    """Run the step of the whole leaf at once.

    Explicit axes allow no reshape that splits a sharded axis into blocks, so that quantized state
    is stepped shard by shard there.
    """
    del asks
    if is_explicit(u) and storage.any_coded(operands[2]):
        return per_shard(functools.partial(_run, leaf), over, sharding, u, *operands)
    place = None if operands[-1] is None else whole(u.shape)  # for random bits alone
    step = leaf(u, *operands, place, ordered=orders())
    return finish(step, lambda xs: [jnp.mean(x) for x in xs])


def _run(leaf: Callable[..., Step], *operands: Any) -> Any:
    """Run the step of what one device has of a leaf."""
    *given, shard = operands
    if shard.cut:
        return unaligned.run(leaf, *operands)
    step = leaf(*given, shard.all_of(given[0].shape))
    return finish(step, lambda xs: shard.mean([jnp.sum(x) for x in xs]))


def orders() -> bool:
    """Whether what is stored waits for the new parameter, so that XLA:CPU writes it in place.

    One of its elements is at hand only where leaves are not spread over devices.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1

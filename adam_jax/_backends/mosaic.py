"""Fast arithmetic for kernels that Mosaic compiles for TPUs."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.experimental import pallas
from jax.experimental.pallas import tpu

from adam_jax._backends.rewrite import SIMPLER, Rewriting, by_reciprocal


def _reciprocal(x: jax.Array) -> jax.Array:
    """Return 1/x by one Newton step, as XLA does, but with fewer special cases."""
    reciprocal = getattr(tpu, "reciprocal", None) or pallas.reciprocal  # before jax 0.11
    about = reciprocal(x, approx=True)
    nearer = about + about * (1 - x * about)
    return jax.lax.select(nearer == nearer, nearer, about)  # 0·Inf for x = 0 and x = Inf


FAST: Mapping[str, Rewriting] = {**SIMPLER, "div": by_reciprocal(_reciprocal)}
"""Rewritings into instructions that Mosaic doesn't use by itself."""

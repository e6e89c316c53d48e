"""Fast arithmetic for kernels that Mosaic compiles for TPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import pallas
from jax.experimental.pallas import tpu

from adam_jax._backends.rewrite import (
    SIMPLER,
    Rewriting,
    Site,
    as_extremum,
    by_reciprocal,
    equation_of,
    source,
)
from adam_jax._util.numerics import TINY


def _reciprocal(x: jax.Array) -> jax.Array:
    """Return 1/x by one Newton step, as XLA does, but with fewer special cases."""
    reciprocal = getattr(tpu, "reciprocal", None) or pallas.reciprocal  # in jax 0.10
    about = reciprocal(x, approx=True)
    nearer = about + about * (1 - x * about)
    return jax.lax.select(nearer == nearer, nearer, about)  # NaN for x = 0 and x = Inf


def _select(site: Site) -> Any:
    """Turn where(|x| < TINY, 0, x) into x, because TPUs flush smaller results to 0."""
    out = as_extremum(site)
    predicate, x, zero = site.eqn.invars
    made = equation_of(predicate, site)
    if out is not None or made is None or made.primitive.name != "lt":
        return out
    size, low = (equation_of(made.invars[0], site), source(made.invars[1], site))
    is_size = size is not None and size.primitive.name == "abs" and size.invars[0] is x
    return site.value(x) if is_size and (low, source(zero, site)) == (TINY, 0) else None


FAST: Mapping[str, Rewriting] = {**SIMPLER, "select_n": _select, "div": by_reciprocal(_reciprocal)}
"""Rewritings into instructions that Mosaic doesn't use by itself."""

"""Rewrite the computation of a tile for a kernel: fewer instructions, equal up to rounding.

XLA makes most of these changes itself, but compilers of kernels don't.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
"""The parameter that has the function, by the name of the primitive that calls it."""
KEPT = ("per_element", "block_absmax")
"""Functions that stay calls, because `stages.py` treats them as one operation."""


class Site(NamedTuple):
    """An equation to rewrite, with the values of its operands."""

    eqn: JaxprEqn
    operands: list[Any]
    made_by: Mapping[Any, JaxprEqn]
    """The equation of each variable."""
    value: Callable[[Any], Any]
    """Returns the value of a variable that precedes the equation."""


Rewriting = Callable[[Site], Any]
"""Returns the result of an equation, or None to leave the equation unchanged."""


def rewrite(closed: Any, operands: Sequence[Any], rewritings: Mapping[str, Rewriting]) -> list[Any]:
    """Evaluate a closed jaxpr with calls inlined and primitives rewritten; can be traced."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, operands, strict=True)
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def value(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        name, given = eqn.primitive.name, [value(x) for x in eqn.invars]
        out = None
        if name in CALLS and eqn.params.get("name") not in KEPT:
            out = rewrite(eqn.params[CALLS[name]], given, rewritings)
        elif name in rewritings:
            out = rewritings[name](Site(eqn, given, made_by, value))
        if out is None:
            out = eqn.primitive.bind(*given, **eqn.params)
        is_list = isinstance(out, (list, tuple))
        values |= zip(eqn.outvars, out if is_list else [out], strict=True)
    return [value(x) for x in jaxpr.outvars]


def without_barrier(site: Site) -> list[Any]:
    """Drop an optimization barrier, which only XLA needs."""
    return site.operands


def as_extremum(site: Site) -> Any:
    """Turn where(x > y, x, y) into maximum(x, y), and where(x < y, x, y) into minimum(x, y)."""
    predicate, no, *yes = site.eqn.invars
    made = equation_of(predicate, site)
    functions = {"gt": jnp.maximum, "lt": jnp.minimum}
    if made is None or made.primitive.name not in functions or len(yes) != 1:
        return None
    x, y = (source(v, site) for v in made.invars)
    if (source(yes[0], site), source(no, site)) != (x, y):
        return None
    return functions[made.primitive.name](*site.operands[:0:-1])


def as_product(site: Site) -> Any:
    """Turn a division by a scalar into a product with its reciprocal, which is computed once."""
    x, y = site.operands
    made = equation_of(site.eqn.invars[1], site)
    if made is not None and made.primitive.name == "broadcast_in_dim":
        y = site.value(made.invars[0])
    if jnp.ndim(y) or not jnp.ndim(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    return x * (1 / y)


def by_reciprocal(reciprocal: Callable[[Any], Any]) -> Rewriting:
    """Return a rewriting of a division of tiles that uses this function.

    Divisions of a constant stay exact, for the inverses of scales.
    """

    def rewriting(site: Site) -> Any:
        product = as_product(site)
        is_constant = isinstance(site.eqn.invars[0], Literal)
        if product is not None or is_constant or not is_tile(site.eqn.outvars[0].aval):
            return product
        x, y = site.operands
        return x * reciprocal(y)

    return rewriting


def is_tile(x: Any) -> bool:
    """Whether this is the type of a tile of float32 numbers."""
    return len(x.shape) == 2 and x.dtype == jnp.float32


def equation_of(x: Any, site: Site) -> JaxprEqn | None:
    """Return the equation that makes x, or None if there is none."""
    return None if isinstance(x, Literal) else site.made_by.get(x)


def as_scale(site: Site) -> Any:
    """Multiply a block's scale, not each of its elements, by a constant factor."""
    product, scale = (equation_of(v, site) for v in site.eqn.invars)
    if product is None or product.primitive.name != "mul":
        return None
    if scale is None or scale.params.get("name") != "per_element":
        return None
    x, factor = product.invars
    if not isinstance(factor, Literal):
        return None
    per_block = site.value(scale.invars[0]) * factor.val
    return site.value(x) * scale.primitive.bind(per_block, **scale.params)[0]


def _dtype(x: Any) -> Any:
    return x.aval.dtype


def source(x: Any, site: Site) -> Any:
    """Return the variable or number that x is a broadcast of."""
    while not isinstance(x, Literal):
        made = site.made_by.get(x)
        if made is None or made.primitive.name not in ("broadcast_in_dim", "convert_element_type"):
            return x
        (made_from, *_), (result,) = made.invars, made.outvars
        if _dtype(made_from) != _dtype(result):
            return x
        x = made.invars[0]
    return x.val


SIMPLER: Mapping[str, Rewriting] = {
    "optimization_barrier": without_barrier,
    "select_n": as_extremum,
    "div": as_product,
    "mul": as_scale,
}
"""Rewritings for every kernel."""

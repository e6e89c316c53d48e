"""Masked access to tiles and fast arithmetic, for kernels that Triton compiles for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jax.extend.core import Literal, Var

from adam_jax._backends.rewrite import (
    SIMPLER,
    Rewriting,
    Site,
    as_extremum,
    as_scale,
    by_reciprocal,
    equation_of,
    is_tile,
    source,
)


def compiler(elements: int) -> triton.CompilerParams:
    """Return the compiler's parameters for tiles of this many elements: 16 for each thread."""
    return triton.CompilerParams(num_warps=max(4, elements // 512))


def load(ref: Any, mask: Callable[[], jax.Array | None]) -> jax.Array:
    """Read the elements of a tile that the mask selects; the rest is undefined."""
    inside = mask()
    return ref[...] if inside is None else triton.load(ref, mask=inside)


def store(ref: Any, x: jax.Array, mask: Callable[[], jax.Array | None], at: Any) -> None:
    """Write the elements of a tile that the mask selects."""
    inside = mask()
    if inside is None:
        ref[at] = x
    else:
        triton.store(ref, x, mask=inside)


def _ptx(assembly: str, *operands: jax.Array) -> jax.Array:
    """Run PTX instructions on each float32 element: $0 is the result, $1, … are the operands."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
    (out,) = triton.elementwise_inline_asm(
        assembly,
        args=[jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in operands],
        constraints=",".join(["=f", *"f" * len(operands)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return out


def _sqrt(site: Site) -> Any:
    """Compute a square root with an error of at most 2⁻²³."""
    if not is_tile(site.eqn.outvars[0].aval):
        return None
    return _ptx("sqrt.approx.ftz.f32 $0, $1;", *site.operands)


def _reciprocal(x: jax.Array) -> jax.Array:
    """Return 1/x with an error of 1 ulp."""
    return _ptx("rcp.approx.ftz.f32 $0, $1;", x)


def _extremum(assembly: str) -> Rewriting:
    """Return a rewriting of a maximum or minimum that propagates NaN, unlike Triton's own."""

    def rewriting(site: Site) -> Any:
        return _ptx(assembly, *site.operands) if is_tile(site.eqn.outvars[0].aval) else None

    return rewriting


_MAXIMUM = _extremum("max.NaN.ftz.f32 $0, $1, $2;")
_MINIMUM = _extremum("min.NaN.ftz.f32 $0, $1, $2;")


def _select(site: Site) -> Any:
    """Turn where(x > y, x, y) into a maximum that propagates NaN, unless y is a constant."""
    out = as_extremum(site)
    predicate, fallback, *_ = site.eqn.invars
    if out is None or not isinstance(source(fallback, site), Var):
        return out
    made = equation_of(predicate, site)
    is_maximum = made is not None and made.primitive.name == "gt"
    pair = site._replace(operands=site.operands[1:])
    propagated = (_MAXIMUM if is_maximum else _MINIMUM)(pair)
    return out if propagated is None else propagated


_FMA = "fma.rn.ftz.f32 $0, $1, $2, $3;"
_NEGATED = "{{ .reg .f32 t; neg.ftz.f32 t, ${0}; fma.rn.ftz.f32 $0, {1}; }}"


def _fused(product_first: str, product_last: str) -> Rewriting:
    """Return a rewriting of a sum of x·y and z as one instruction, with one rounding."""

    def rewriting(site: Site) -> Any:
        if not is_tile(site.eqn.outvars[0].aval):
            return None
        for k, assembly in enumerate((product_first, product_last)):
            made = equation_of(site.eqn.invars[k], site)
            if made is not None and made.primitive.name == "mul":
                x, y = map(site.value, made.invars)
                return _ptx(assembly, x, y, site.operands[1 - k])
        return None

    return rewriting


def _mul(site: Site) -> Any:
    """Turn (x - 1)·y into x·y - y, computed with one rounding."""
    made = equation_of(site.eqn.invars[0], site)
    if made is None or made.primitive.name != "sub" or not is_tile(site.eqn.outvars[0].aval):
        return as_scale(site)
    x, one = made.invars
    if not isinstance(one, Literal) or one.val != 1:
        return as_scale(site)
    y = site.operands[1]
    return _ptx(_NEGATED.format(3, "$1, $2, t"), site.value(x), y, y)


FAST: Mapping[str, Rewriting] = {
    **SIMPLER,
    "mul": _mul,
    "sqrt": _sqrt,
    "div": by_reciprocal(_reciprocal),
    "max": _MAXIMUM,
    "min": _MINIMUM,
    "select_n": _select,
    "add": _fused(_FMA, _FMA),
    "sub": _fused(_NEGATED.format(3, "$1, $2, t"), _NEGATED.format(1, "t, $2, $3")),
}
"""Rewritings into PTX instructions that Triton doesn't use by itself."""

"""Hoist scalar-only computations out of a kernel.

A kernel runs once per tile. Bias corrections and schedules are the same for all tiles, and use
operations that kernels lack (`expm1`, sums of series).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal, jaxpr_as_fun


class Halves(NamedTuple):
    """A split computation: scalars = front(*small), then results = rest(*scalars, *large)."""

    front: Callable[..., Sequence[jax.Array]]
    rest: Any
    """A closed jaxpr."""


def hoist(closed: Any, num_small: int) -> Halves:
    """Split a computation whose first `num_small` operands are the same for all tiles.

    `closed` comes from `jax.make_jaxpr`; its class differs between jax 0.10 and 0.12.
    """
    jaxpr = closed.jaxpr
    small_vars, large_vars = jaxpr.invars[:num_small], jaxpr.invars[num_small:]
    invariant: dict[Any, None] = dict.fromkeys([*jaxpr.constvars, *small_vars])  # an ordered set
    for eqn in jaxpr.eqns:
        if all(v in invariant for v in _variables(eqn.invars)) and not eqn.effects:
            invariant.update(dict.fromkeys(eqn.outvars))

    front: list[JaxprEqn] = []
    rest: list[JaxprEqn] = []
    needed = set(_variables(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        used = needed.intersection(eqn.outvars)
        # only scalars are passed to `rest`, which makes arrays of them itself, e.g. by broadcasting
        if all(v in invariant for v in eqn.outvars) and not any(v.aval.shape for v in used):
            front.append(eqn)
        elif used:
            rest.append(eqn)
            needed.update(_variables(eqn.invars))
    computed = {v for eqn in rest for v in eqn.outvars}
    passed = [v for v in invariant if v in needed and v not in computed]
    for v in passed:
        if v.aval.shape:
            raise NotImplementedError(f"a constant array, {v.aval}, which kernels can't use")

    front_jaxpr = jaxpr.replace(invars=small_vars, outvars=passed, eqns=front[::-1])
    rest_jaxpr = jaxpr.replace(constvars=[], invars=[*passed, *large_vars], eqns=rest[::-1])
    return Halves(
        jaxpr_as_fun(closed.replace(jaxpr=front_jaxpr)),
        closed.replace(jaxpr=rest_jaxpr, consts=[]),
    )


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [x for x in atoms if not isinstance(x, Literal)]

"""What of a computation depends on scalars alone is taken out of it and computed once, in front.

A kernel runs for every tile. Bias corrections and schedules are the same in all of them, and made
of what kernels lack (`expm1`, sums of series).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal, Var, jaxpr_as_fun


class Halves(NamedTuple):
    """A computation in two: scalars = front(*small), then results = rest(*scalars, *large)."""

    front: Callable[..., Sequence[jax.Array]]
    rest: Callable[..., Sequence[jax.Array]]


def hoist(closed: Any, small: int, drop: Collection[str]) -> Halves:
    """Split a computation whose first `small` operands are the same for all tiles.

    `closed` is what `jax.make_jaxpr` returns, whose class differs between jax 0.10 and 0.12.
    `rest` does without the primitives named in `drop`, whose results are their operands.
    """
    jaxpr = closed.jaxpr
    same, large = jaxpr.invars[:small], jaxpr.invars[small:]
    known: dict[Any, None] = dict.fromkeys([*jaxpr.constvars, *same])  # a set, in order
    for eqn in jaxpr.eqns:
        if all(v in known for v in _variables(eqn.invars)) and not eqn.effects:
            known.update(dict.fromkeys(eqn.outvars))

    front: list[JaxprEqn] = []
    rest: list[JaxprEqn] = []
    needed = set(_variables(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        wanted = needed.intersection(eqn.outvars)
        # an array made of scalars, such as a broadcast, is made inside: only scalars go over
        if all(v in known for v in eqn.outvars) and not any(v.aval.shape for v in wanted):
            front.append(eqn)
        elif wanted:
            rest.append(eqn)
            needed.update(_variables(eqn.invars))
    made = {v for eqn in rest for v in eqn.outvars}
    handed = [v for v in known if v in needed and v not in made]
    for v in handed:
        if v.aval.shape:
            raise NotImplementedError(f"a kernel can't hold an array of its own, got {v.aval}")

    before = jaxpr.replace(invars=same, outvars=handed, eqns=front[::-1])
    eqns, outvars = _without(drop, rest[::-1], jaxpr.outvars)
    inside = jaxpr.replace(constvars=[], invars=[*handed, *large], outvars=outvars, eqns=eqns)
    return Halves(
        jaxpr_as_fun(closed.replace(jaxpr=before)),
        jaxpr_as_fun(closed.replace(jaxpr=inside, consts=[])),
    )


def _without(
    drop: Collection[str], eqns: Sequence[JaxprEqn], outvars: Sequence[Any]
) -> tuple[list[JaxprEqn], list[Any]]:
    """The equations and results once operands stand for the results of what is dropped."""
    stands_for: dict[Var, Any] = {}

    def renamed(atoms: Iterable[Any]) -> list[Any]:
        return [x if isinstance(x, Literal) else stands_for.get(x, x) for x in atoms]

    kept = []
    for eqn in eqns:
        if eqn.primitive.name in drop:
            stands_for.update(zip(eqn.outvars, renamed(eqn.invars), strict=True))
        else:
            kept.append(eqn.replace(invars=renamed(eqn.invars)))
    return kept, renamed(outvars)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [x for x in atoms if not isinstance(x, Literal)]

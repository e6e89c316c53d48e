"""The computation of a tile in slices of 128 columns, for a TPU's vector unit.

A slice has one block of each quantized moment. Elementwise computations run slice by slice, in
registers. Computations per block run once for all blocks of the tile. A maximum over blocks, or a
sum over columns, ends a stage: the next stage loops over all slices again. A later
stage reads float32 arrays from scratch memory, and recomputes others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from adam_jax._backends.step import Extent
from adam_jax.storage._blockwise import magnitudes

WIDTH = 128
"""The columns of a slice: the lanes of a vector register, and a block of int8."""


class Stage(NamedTuple):
    """The equations between two boundaries."""

    whole: list[JaxprEqn]
    """Equations on arrays per block, row, or tile."""
    sliced: list[JaxprEqn]
    """Equations on slices, which run after `whole`."""
    maxima: list[JaxprEqn]
    """Maxima over blocks, each read from an array in scratch memory."""
    sums: list[JaxprEqn]
    """Reductions over all columns."""
    written: list[Any]
    """The variables in `sliced` to write to scratch memory."""


class Plan(NamedTuple):
    """A tile's computation, split into stages."""

    jaxpr: Any
    columns: int
    stages: list[Stage]

    @property
    def kept(self) -> list[Any]:
        """Return the variables in scratch memory."""
        return [v for stage in self.stages for v in stage.written]


def fits(extents: Sequence[Extent], columns: int) -> bool:
    """Whether a tile has several slices, and slices are the blocks of its moments."""
    spans = {extent.span for extent in extents}
    return columns % WIDTH == 0 and columns > WIDTH and spans <= {1, WIDTH}


def plan(jaxpr: Any, columns: int) -> Plan:
    """Split a jaxpr with inlined calls into stages, for tiles with this many columns."""
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    level: dict[Any, int] = {}  # the stage that computes a variable
    ends: dict[int, list[JaxprEqn]] = {}
    for eqn in jaxpr.eqns:
        stage = max((level.get(v, 0) for v in _variables(eqn.invars)), default=0)
        is_end = _any_sliced(eqn.invars, columns) and not _any_sliced(eqn.outvars, columns)
        if is_end:
            ends.setdefault(stage, []).append(eqn)
        level |= dict.fromkeys(eqn.outvars, stage + is_end)

    stages: list[Stage] = []
    kept: list[Any] = []
    computed: set[Any] = set()
    for k in range(1 + max(level.values(), default=0)):
        maxima, sums = _split(ends.get(k, []), lambda eqn: _name(eqn) == "block_absmax")
        maximized = [v for eqn in maxima for v in eqn.invars[:1]]
        wanted = [v for v in _variables(jaxpr.outvars) if level.get(v, 0) == k]
        wanted += [*maximized, *(v for eqn in sums for v in eqn.invars)]
        needed: set[Any] = set()
        missing = [v for v in _variables(wanted) if _is_sliced(v, columns)]
        while missing:
            v = missing.pop()
            if v in needed or v in kept or v not in made_by:
                continue
            if v in computed and _is_worth_keeping(made_by[v], columns):
                kept.append(v)
                continue
            needed.add(v)
            missing += [x for x in _variables(made_by[v].invars) if _is_sliced(x, columns)]
        computed |= needed
        kept += [v for v in dict.fromkeys(maximized) if v not in kept and v in made_by]
        sliced = [eqn for eqn in jaxpr.eqns if needed.intersection(eqn.outvars)]
        ended = {id(eqn) for eqn in ends.get(k - 1, [])}
        whole = [
            eqn
            for eqn in jaxpr.eqns
            if level[eqn.outvars[0]] == k
            and id(eqn) not in ended
            and not _any_sliced(eqn.outvars, columns)
        ]
        stages.append(Stage(whole, sliced, maxima, sums, []))
    for v in kept:
        first = next(s for s in stages if any(v in eqn.outvars for eqn in s.sliced))
        first.written.append(v)
    return Plan(jaxpr, columns, stages)


def run(
    plan: Plan,
    given: Sequence[Any],
    tile: Sequence[Any],
    write: Callable[[int, jax.Array, Any], None],
    scratch: Sequence[Any],
) -> None:
    """Run a plan.

    Args:
      plan: what to run.
      given: the values of the jaxpr's first variables.
      tile: references to the values of the other variables.
      write: a function (index of a result, array, index in the tile), called once for a result, or
        for each of its slices.
      scratch: references to float32 arrays of the tile's shape, one for each kept variable.
    """
    jaxpr, columns = plan.jaxpr, plan.columns
    whole: dict[Any, Any] = dict(zip(jaxpr.invars, given, strict=False))
    refs = dict(zip(plan.kept, scratch, strict=True))
    refs |= zip(jaxpr.invars[len(given) :], tile, strict=True)
    outputs = [(k, v) for k, v in enumerate(jaxpr.outvars)]
    done: set[int] = set()

    def value(v: Any, at: slice, local: dict[Any, Any]) -> Any:
        if isinstance(v, Literal):
            return v.val
        if v in local:
            return local[v]
        if v in refs:
            return refs[v][:, at] if _is_sliced(v, columns) else refs[v][...]
        return whole[v]

    for stage in plan.stages:
        for eqn in stage.whole:
            values = [value(v, slice(None), {}) for v in eqn.invars]
            whole |= zip(eqn.outvars, _bind(eqn, values), strict=True)
        computed = {v for eqn in stage.sliced for v in eqn.outvars}
        added: dict[Any, Any] = {}
        for j in range(columns // WIDTH):
            at = slice(j * WIDTH, (j + 1) * WIDTH)
            local: dict[Any, Any] = {}
            for eqn in stage.sliced:
                values = [value(v, at, local) for v in eqn.invars]
                local |= zip(eqn.outvars, _bind_slice(eqn, values, j), strict=True)
            for v in stage.written:
                refs[v][:, at] = local[v]
            for eqn in stage.sums:
                (v,) = eqn.invars
                x = value(v, at, local)
                added[v] = x if v not in added else added[v] + x
            for k, v in outputs:
                if not isinstance(v, Literal) and v in computed and k not in done:
                    write(k, local[v], (slice(None), at))
        done |= {k for k, v in outputs if not isinstance(v, Literal) and v in computed}
        for eqn in stage.sums:
            whole |= zip(eqn.outvars, _bind(eqn, [added[eqn.invars[0]]]), strict=True)
        for eqn in stage.maxima:
            whole[eqn.outvars[0]] = _maxima(eqn, value, columns)
    for k, v in outputs:
        if k not in done:
            write(k, value(v, slice(None), {}), ...)


def _maxima(eqn: JaxprEqn, value: Callable[..., Any], columns: int) -> jax.Array:
    """Return the largest magnitude of each block, from an array in scratch memory."""
    x, *width = eqn.invars
    found = []
    for j in range(columns // WIDTH):
        sizes = magnitudes(value(x, slice(j * WIDTH, (j + 1) * WIDTH), {}))
        if width:  # the tile exceeds the leaf
            lane = j * WIDTH + jax.lax.broadcasted_iota(jnp.int32, (1, WIDTH), 1)
            sizes = jnp.where(lane < value(width[0], slice(None), {}), sizes, 0)
        found.append(jnp.max(sizes, axis=-1, keepdims=True))
    return jnp.concatenate(found, axis=-1)


def _bind(eqn: JaxprEqn, values: Sequence[Any], **changed: Any) -> Sequence[Any]:
    out = eqn.primitive.bind(*values, **(eqn.params | changed))
    return out if eqn.primitive.multiple_results else [out]


def _bind_slice(eqn: JaxprEqn, values: Sequence[Any], j: int) -> Sequence[Any]:
    """Evaluate an equation for the j-th slice."""
    name = _name(eqn)
    if name == "per_element":
        column = values[0][:, j : j + 1]
        return [jnp.broadcast_to(column, (column.shape[0], WIDTH))]
    if name == "broadcast_in_dim":
        return _bind(eqn, values, shape=(*eqn.params["shape"][:-1], WIDTH))
    if name == "reshape":
        return _bind(eqn, values, new_sizes=(*eqn.params["new_sizes"][:-1], WIDTH))
    if name == "iota" and eqn.params["dimension"] == len(eqn.params["shape"]) - 1:
        (lane,) = _bind(eqn, values, shape=(*eqn.params["shape"][:-1], WIDTH))
        return [lane + jnp.asarray(j * WIDTH, lane.dtype)]
    return _bind(eqn, values)


def _name(eqn: JaxprEqn) -> str:
    """Return the name of an equation's primitive, or of the function that it calls."""
    is_call = eqn.primitive.name in ("jit", "pjit")
    return eqn.params["name"] if is_call else eqn.primitive.name


def _is_worth_keeping(eqn: JaxprEqn, columns: int) -> bool:
    """Whether to keep a result in scratch memory: a float32 with a sliced operand."""
    result: Any = eqn.outvars[0]
    return result.aval.dtype == jnp.float32 and _any_sliced(eqn.invars, columns)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [x for x in atoms if not isinstance(x, Literal)]


def _is_sliced(v: Any, columns: int) -> bool:
    return v.aval.shape[-1:] == (columns,)


def _any_sliced(atoms: Iterable[Any], columns: int) -> bool:
    return any(_is_sliced(v, columns) for v in _variables(atoms))


def _split(
    eqns: Iterable[JaxprEqn], holds: Callable[[JaxprEqn], bool]
) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
    eqns = list(eqns)
    return [e for e in eqns if holds(e)], [e for e in eqns if not holds(e)]

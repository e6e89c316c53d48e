"""Sharding of optimizer state: derived from the parameters' shardings, or ZeRO-1.

Moments are sharded like their parameters. With explicit mesh axes, a sharding is part of an array's
type, so tracing `init` gives the sharding of every leaf of any transformation's state. This module
traces with explicit axes whatever the mesh's axis types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from adam_jax._engine.apply import step
from adam_jax._engine.transformation import Transformation, describe, is_exact, transformation_of
from adam_jax._util import errors
from adam_jax._util.partition_specs import drop_indivisible, is_explicit, making_known, names, parts
from adam_jax._util.paths import by_key, is_box, rebox, unbox
from adam_jax._util.typing import PyTree


def state_sharding(
    tx: optax.GradientTransformation,
    params: PyTree,
    specs: PyTree | None = None,
    mesh: Mesh | None = None,
    memory_kind: str | None = None,
) -> PyTree:
    """Return the sharding of the state of `tx`, derived from its parameters' shardings.

    Moments, codes, and residuals are sharded like their parameter. Scales are, too, along each axis
    that divides evenly over the devices, and replicated along the others. Scalars such as step
    counts are replicated. `memory_report(tx, params)` shows the bytes on each device.

    Use it as `jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params)`. A jitted init
    doesn't shard its results by itself; an eager init does.

    Args:
      tx: any Optax transformation, including chains and `zero1`.
      params: arrays or `jax.ShapeDtypeStruct`s, with shardings unless specs are given.
      specs: PartitionSpecs of the parameters, or of subtrees of them.
      mesh: the mesh of the specs; by default, the mesh of the parameters.
      memory_kind: the memory for the state, such as "pinned_host" for host memory; by default,
        device memory.

    Returns:
      a tree like the state, with a `NamedSharding` for each leaf.

    Raises:
      ValueError: mesh is not given, and the parameters have none.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
    >>> specs = {"w": jax.sharding.PartitionSpec("data")}
    >>> tuple(state_sharding(adam_jax.adamw(1e-3), params, specs, mesh)[0].mu["w"].spec)
    ('data', None)
    """
    with errors.error_context("state_sharding"):
        errors.transformation("tx", tx, "state_sharding(tx, params)")
    mesh = _mesh(params) if mesh is None else mesh
    if mesh is None:
        raise errors.no_mesh("state_sharding")
    specs = jax.tree.map(_spec, params) if specs is None else _broadcast(specs, params)
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )
    typed = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(explicit, drop_indivisible(explicit, spec, x.shape)),
        ),
        params,
        specs,
    )
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, typed)
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(x), memory_kind=memory_kind), state)


def zero1(
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axis: str = "data",
    specs: PyTree | None = None,
) -> Transformation:
    """Shard the optimizer state over the data axis, and replicate the parameters (ZeRO-1).

    Gradients are resharded like the state (a reduce-scatter if XLA merges the preceding
    all-reduce), each device steps its shard, and the updates are gathered. With `adam_jax.apply`,
    the new parameters are gathered instead; bfloat16 parameters are half the size of float32
    updates. Moments, codes, and residuals never leave their device.

    A step equals the step on one device: norms and means, such as the norm in
    `optax.clip_by_global_norm`, are over whole arrays, and random bits depend on positions in whole
    arrays. If shards split a block of codes, its maximum is computed across devices.

    A leaf is sharded along its first axis that divides evenly, preferably an unsharded one, or
    replicated. `memory_report(tx, params)` shows bytes per device and replicated leaves.

    Use it under `jit`, with automatic or explicit axes, around everything that computes updates,
    including `master_weights`. The state is the state of `tx`; a jitted init needs no
    out_shardings.
    Source: Rajbhandari et al. (2020), ZeRO, stage 1.

    Args:
      tx: any Optax transformation.
      mesh: the mesh of devices.
      axis: the name of the mesh axis to shard over.
      specs: PartitionSpecs of the parameters (or subtrees), if other axes of the mesh shard them.
        Explicit axes don't need them. With automatic axes, parameters without specs are assumed
        replicated; if they aren't, results are right, but the gather is larger.

    Returns:
      a transformation with the state and updates of `tx`.

    Raises:
      ValueError: the mesh has no such axis.
      TypeError: tx isn't a transformation, or mesh isn't a mesh.

    >>> import adam_jax, jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> params = jax.device_put(
    ...     {"w": jnp.ones((64, 128))}, jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    ... )
    >>> tx = zero1(adam_jax.adamw(1e-3), mesh)
    >>> tuple(tx.init(params)[0].mu["w"].sharding.spec)
    ('data', None)
    """
    with errors.error_context("zero1"):
        errors.transformation("tx", tx, "zero1(tx, mesh)")
    errors.mesh_axis("zero1", mesh, axis)
    explicit = AxisType.Explicit in mesh.axis_types
    specs = _unboxed(specs)

    def outer_specs(params: PyTree) -> PyTree:
        """Return the specs of the given parameters."""
        if specs is not None:
            return _broadcast(specs, params)
        return jax.tree.map(lambda p: _spec(p) if is_explicit(p) else P(), params)

    def inner_specs(params: PyTree) -> PyTree:
        """Return the specs inside a step."""
        return jax.tree.map(
            lambda p, spec: _spread(mesh, axis, spec, p.shape), params, outer_specs(params)
        )

    def state_layout(params: PyTree, layout: PyTree) -> PyTree:
        return state_sharding(tx, params, layout, mesh)

    def init(params: PyTree) -> PyTree:
        params = _unboxed(params)
        layout = inner_specs(params)
        return _place(mesh, tx.init(_place(mesh, params, layout)), state_layout(params, layout))

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, PyTree],
        *,
        emit_params: bool,
    ) -> tuple[PyTree, PyTree]:
        with errors.error_context("zero1"):
            errors.on_explicit_mesh(mesh, updates)
        boxes = params if emit_params else updates
        updates, params = _unboxed(updates), _unboxed(params)
        like = updates if params is None else params
        layout = inner_specs(like)
        inside = None if params is None else _place(mesh, params, layout)
        updates = _place(mesh, updates, layout)
        specs_by_key = {} if explicit else by_key(layout)
        with making_known({k: NamedSharding(mesh, spec) for k, spec in specs_by_key.items()}):
            out, state = step(tx, updates, state, inside, extra, emit_params=emit_params)
        if _has_auto_tracers(out):  # without this, XLA chooses the sharding
            state = _place(mesh, state, state_layout(like, layout))
        out = _place(mesh, out, outer_specs(like))
        return jax.tree.map(rebox, boxes, out, is_leaf=lambda x: x is None or is_box(x)), state

    text = f"zero1({describe(tx)}, {dict(mesh.shape)}, axis={axis})"
    return transformation_of((tx,), init, update, text, emits_params=True, exact=is_exact(tx))


def _spread(mesh: Mesh, axis: str, spec: P, shape: Sequence[int]) -> P:
    """Return the spec with `axis` added to the first divisible array axis, preferably unsharded.

    Return `spec` itself if there is none, or if it has `axis` already.
    """
    entries = [names(entry) for entry in (*spec, *[None] * (len(shape) - len(spec)))]
    if any(axis in entry for entry in entries):
        return spec
    for free in (True, False):
        for k, (entry, size) in enumerate(zip(entries, shape, strict=True)):
            fits = size > 0 and size % (parts(mesh, entry) * mesh.shape[axis]) == 0
            if fits and (not entry) == free:
                entries[k] = (*entry, axis)
                return P(*(e[0] if len(e) == 1 else e or None for e in entries))
    return spec


def _place(mesh: Mesh, tree: PyTree, layout: PyTree) -> PyTree:
    """Shard every array of a tree, under jit or eagerly."""

    def place(x: PyTree, sharding: PyTree) -> PyTree:
        if x is None:
            return None
        spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
        if not isinstance(x, Tracer):
            return jax.device_put(x, NamedSharding(mesh, spec))
        typed = jax.typeof(x).sharding.mesh if is_explicit(x) else mesh
        if AxisType.Explicit in typed.axis_types:  # as in state_sharding
            return jax.reshard(x, NamedSharding(typed, spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, layout, is_leaf=lambda x: x is None)


def _unboxed(tree: PyTree) -> PyTree:
    """Remove Flax's boxes, because the shardings that they name aren't the state's."""
    return jax.tree.map(unbox, tree, is_leaf=is_box)


def _has_auto_tracers(tree: PyTree) -> bool:
    return any(isinstance(x, Tracer) and not is_explicit(x) for x in jax.tree.leaves(tree))


def _spec(x: PyTree) -> P:
    """Return the PartitionSpec of an array; empty without one."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    return getattr(sharding, "spec", P())


def _mesh(params: PyTree) -> PyTree:
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def _broadcast(specs: PyTree, params: PyTree) -> PyTree:
    """Return a spec for each parameter; one in `specs` may cover a subtree."""
    return jax.tree.map(
        lambda spec, subtree: jax.tree.map(lambda _: P() if spec is None else spec, subtree),
        specs,
        params,
        is_leaf=lambda x: x is None or isinstance(x, P),
    )

"""State spread over devices: its shardings from those of the parameters, and ZeRO-1 in one line.

A moment lies as its parameter does. JAX can tell so itself: with explicit mesh axes a sharding is
part of an array's type, and tracing `init` gives the type of every leaf of any transformation's
state. That is asked here whatever kind of axes the mesh has.
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
    """How the state of `tx` lies on the devices of its parameters: a tree of `NamedSharding`s.

    Moments, codes and the bits below parameters lie as their parameter does. So do the scales of
    codes along every axis that the devices divide; along the others they are whole on each device,
    as counts and the like are. `memory_report(tx, params)` shows what each device holds.

    For `jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params)`: a jitted init does not
    spread its results by itself. An eager one does.

    Args:
      tx: any Optax transformation, chains and `zero1` among them.
      params: arrays or `jax.ShapeDtypeStruct`s, with shardings unless specs are given.
      specs: PartitionSpecs of the parameters, or of subtrees of them.
      mesh: of the specs; that of the parameters' shardings by default.
      memory_kind: where the state is to lie, such as "pinned_host" for host memory; by default in
        the devices' own.

    Returns:
      a `NamedSharding` for each leaf of the state, in its structure.

    Raises:
      ValueError: there is no mesh, neither given nor among the parameters' shardings.

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
    """ZeRO-1: parameters on every device, their state spread over the axis along which data is.

    Gradients go into the state's layout (a reduce-scatter, where XLA finds the all-reduce in front
    of it), each device steps its part, and what comes out is gathered: updates, or with
    `adam_jax.apply` the new parameters, which for bfloat16 is half of that. Moments, codes and the
    bits below parameters never leave their device. Norms and means, such as the one in
    `optax.clip_by_global_norm` inside, are of whole arrays, and random draws depend on an element's
    place in them: a step is that of one device. Where a shard's edge cuts a block of codes, its
    largest element is found across devices.

    A leaf is spread along its first axis that the devices divide; one without such an axis stays
    whole on each. `memory_report(tx, params)` says what a device holds and what stays whole.

    It is for `jit`, with automatic or explicit axes; goes around everything that computes updates,
    `master_weights` too. The state is that of `tx`; to make it under jit needs no out_shardings.
    Source: Rajbhandari et al. (2020), ZeRO, stage 1.

    Args:
      tx: any Optax transformation.
      mesh: the devices.
      axis: the name of the mesh axis to spread over.
      specs: PartitionSpecs of parameters that are sharded over other axes of the mesh, or of
        subtrees of them. Explicit axes tell by themselves. On automatic ones parameters are taken
        to be whole: where they are not, results are right, but more is gathered than needs be.

    Returns:
      a transformation with the state and updates of `tx`.

    Raises:
      ValueError: the mesh has no such axis.
      TypeError: tx is no transformation, or mesh no mesh.

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

    def whole(params: PyTree) -> PyTree:
        """How parameters lie outside."""
        if specs is not None:
            return _broadcast(specs, params)
        return jax.tree.map(lambda p: _spec(p) if is_explicit(p) else P(), params)

    def spread(params: PyTree) -> PyTree:
        """How they lie inside."""
        return jax.tree.map(
            lambda p, spec: _spread(mesh, axis, spec, p.shape), params, whole(params)
        )

    def of_state(params: PyTree, layout: PyTree) -> PyTree:
        return state_sharding(tx, params, layout, mesh)

    def init(params: PyTree) -> PyTree:
        params = _unboxed(params)
        layout = spread(params)
        return _place(mesh, tx.init(_place(mesh, params, layout)), of_state(params, layout))

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
        layout = spread(like)
        inside = None if params is None else _place(mesh, params, layout)
        updates = _place(mesh, updates, layout)
        specs_by_key = {} if explicit else by_key(layout)
        with making_known({k: NamedSharding(mesh, spec) for k, spec in specs_by_key.items()}):
            out, state = step(tx, updates, state, inside, extra, emit_params=emit_params)
        if _guessed(out):  # by the partitioner, where nothing tells it how results lie
            state = _place(mesh, state, of_state(like, layout))
        out = _place(mesh, out, whole(like))
        return jax.tree.map(rebox, boxes, out, is_leaf=lambda x: x is None or is_box(x)), state

    text = f"zero1({describe(tx)}, {dict(mesh.shape)}, axis={axis})"
    return transformation_of((tx,), init, update, text, emits_params=True, exact=is_exact(tx))


def _spread(mesh: Mesh, axis: str, spec: P, shape: Sequence[int]) -> P:
    """The spec with the axis on the first of the array's that it divides, free ones before others.

    As it is, where there is none, or where the array is spread over the axis already.
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
    """Shard every array of a tree, inside a jitted function and outside."""

    def place(x: PyTree, sharding: PyTree) -> PyTree:
        if x is None:
            return None
        spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
        if not isinstance(x, Tracer):
            return jax.device_put(x, NamedSharding(mesh, spec))
        typed = jax.typeof(x).sharding.mesh if is_explicit(x) else mesh
        if AxisType.Explicit in typed.axis_types:  # of the context, as in state_sharding
            return jax.reshard(x, NamedSharding(typed, spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, layout, is_leaf=lambda x: x is None)


def _unboxed(tree: PyTree) -> PyTree:
    """Return the tree without boxes of Flax: the shardings that they name aren't the state's."""
    return jax.tree.map(unbox, tree, is_leaf=is_box)


def _guessed(tree: PyTree) -> bool:
    return any(isinstance(x, Tracer) and not is_explicit(x) for x in jax.tree.leaves(tree))


def _spec(x: PyTree) -> P:
    """How an array lies: an entry for each axis that is sharded."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    return getattr(sharding, "spec", P())


def _mesh(params: PyTree) -> PyTree:
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def _broadcast(specs: PyTree, params: PyTree) -> PyTree:
    """A spec for each parameter, where one may stand for a subtree."""
    return jax.tree.map(
        lambda spec, subtree: jax.tree.map(lambda _: P() if spec is None else spec, subtree),
        specs,
        params,
        is_leaf=lambda x: x is None or isinstance(x, P),
    )

"""Compositions of the library's parts as plain data, and a Hypothesis strategy that draws them.

A `Composition` names an optimizer, its arguments, the wrappers around it, parameters, gradients,
and a mesh. Its repr is the code that makes it, so a failure can be pasted into a test. The strategy
reads the constructors from `adam_jax.catalogue()`, so new variants are included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import adam_jax
from adam_jax import not_matching
from adam_jax.optimizers._constructor import Form

STEPS = 3
DEVICES = 8

# What a composition is made of


def warmup(count):
    """Return a learning rate or a weight decay that grows with the step count."""
    return 1e-2 * jnp.asarray(count + 1, jnp.float32)


def small_int8(path, leaf):
    """Request int8 for every leaf, including leaves too small for "int8"."""
    return "int8"


def small_compact(path, leaf):
    """Request compact for every leaf."""
    return "compact"


def mixed(path, leaf):
    """Request int8 for matrices and bfloat16 for the other leaves."""
    return "int8" if np.ndim(leaf) > 1 else "bfloat16"


class Pair(NamedTuple):
    first: Any
    rest: Any
    nothing: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    first: Any
    rest: Any
    nothing: Any = None
    empty: Any = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class Struct:
    first: Any
    rest: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


CONTAINERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "dict": lambda leaves: dict(leaves),
    "nested": lambda leaves: {"layer": {"inner": dict(leaves)}, "empty": {}},
    "same paths": lambda leaves: {"a/b": _first(leaves), "a": {"b": _first(leaves) * 2}},
    "array": lambda leaves: _first(leaves),
    "list": lambda leaves: [None, *leaves.values(), ()],
    "NamedTuple": lambda leaves: Pair(_first(leaves), _rest(leaves)),
    "dataclass": lambda leaves: Block(_first(leaves), _rest(leaves)),
    "flax.struct": lambda leaves: Struct(_first(leaves), _rest(leaves)),
    "linen boxes": lambda leaves: dict(leaves),  # boxed once the layout is known
    "no leaves": lambda leaves: {"empty": {}, "nothing": None},
}
"""Pytrees of leaves given by name."""


def _first(leaves: Mapping[str, Any]) -> Any:
    return next(iter(leaves.values()))


def _rest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return dict(list(leaves.items())[1:])


WRAPPERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "chain": lambda tx, mesh: adam_jax.chain(adam_jax.clip_by_global_norm(1.0), tx),
    "optax.chain": lambda tx, mesh: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "record": lambda tx, mesh: adam_jax.diagnostics.record(tx, every=1),
    "master_weights(32)": lambda tx, mesh: adam_jax.master_weights(tx, bits=32),
    "master_weights(24)": lambda tx, mesh: adam_jax.master_weights(tx, bits=24),
    "stochastic_rounding": lambda tx, mesh: adam_jax.stochastic_rounding(tx),
    "zero1": lambda tx, mesh: adam_jax.zero1(tx, mesh),
    "apply_if_finite": lambda tx, mesh: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx, mesh: optax.MultiSteps(tx, 2).gradient_transformation(),
}
"""Wrappers of a transformation, in the only order in which they may be nested, innermost first.

"tunable" and "groups" come before them, because they wrap the constructor.
"""

LOW_PRECISION = ("master_weights(32)", "master_weights(24)", "stochastic_rounding")
OUTERMOST = ("apply_if_finite", "MultiSteps")
LAYOUTS = ("replicated", "rows", "columns")
WAYS = ("update", "apply", "eager", "extra arguments", "xla")
"""Ways to make a step, which must all agree with a scan over `update`."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __repr__(self) -> str:
        dtype = "" if self.dtype == "float32" else f", {self.dtype!r}"
        return f"Leaf({self.shape}{dtype})"


@dataclasses.dataclass(frozen=True)
class Composition:
    """An optimizer with everything around it, and what it's run on."""

    optimizer: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    leaves: Mapping[str, Leaf] = dataclasses.field(
        default_factory=lambda: {"kernel": Leaf((4, 6)), "bias": Leaf((3,))}
    )
    container: str = "dict"
    arrays: str = "jax"
    gradients: str = "normal"
    gradient_dtype: str | None = None
    mesh: str | None = None
    layout: str = "replicated"
    in_mesh_context: bool = False
    way: str = "update"

    def __repr__(self) -> str:
        """Return the code that makes the composition, without arguments at their defaults."""
        defaults = Composition("")
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(defaults, field.name)
        }
        return f"Composition({', '.join(f'{k}={_code(v)}' for k, v in given.items())})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # which Hypothesis would replace by one of its own

    def transformation(self) -> optax.GradientTransformation:
        """Return the optimizer with its wrappers around it."""
        make = getattr(adam_jax, self.optimizer)
        arguments = {"learning_rate": 1e-2, **self.arguments}
        if "tunable" in self.wrappers:
            make = adam_jax.tunable(make)
        if "groups" in self.wrappers:
            frozen = f"^{re.escape(self.paths()[-1])}$"
            tx = adam_jax.groups(make, {frozen: "frozen"}, **arguments)
        else:
            tx = make(**arguments)
        mesh = self.device_mesh()
        for name, wrap in WRAPPERS.items():
            tx = wrap(tx, mesh) if name in self.wrappers else tx
        return tx

    def on_one_device(self) -> Composition:
        """Return the composition without its mesh and `zero1`, stepped by `update`."""
        wrappers = tuple(name for name in self.wrappers if name != "zero1")
        return dataclasses.replace(self, mesh=None, wrappers=wrappers, way="update")

    def params(self) -> Any:
        """Return parameters on the devices of the mesh; their values depend only on the leaves."""
        return self._placed(self._tree(0, None))

    def grads(self) -> list[Any]:
        """Return the gradients of every step."""
        trees = [self._tree(step, self.gradient_dtype) for step in range(1, STEPS + 1)]
        if self.gradients == "large":  # g² leaves float32's range, g doesn't
            trees[1] = jax.tree.map(_with_large_element, trees[1])
        if self.gradients == "zero":
            trees = jax.tree.map(lambda g: g * 0, trees)
        if self.gradients == "tiny":
            trees = jax.tree.map(lambda g: g * np.asarray(1e-25, g.dtype), trees)
        return [self._placed(tree) for tree in trees]

    def paths(self) -> list[str]:
        """Return the path of every leaf as a user writes it: boxes aren't part of it."""
        tree = nn.unbox(self._tree(0, None))
        return [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]

    def device_mesh(self) -> Mesh | None:
        if self.mesh is None:
            return None
        kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[self.mesh]
        return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the mesh as a context, or one that does nothing."""
        mesh = self.device_mesh()
        return jax.set_mesh(mesh) if mesh and self.in_mesh_context else contextlib.nullcontext()

    def promotion(self) -> str:
        """Return "standard" if the composition goes through parts of Optax that need it."""
        dtypes = [leaf.dtype for leaf in self.leaves.values()]
        optaxs = {*LOW_PRECISION, *OUTERMOST, "optax.chain"} & {*self.wrappers}
        mixes = self.gradient_dtype is not None or "complex64" in dtypes
        if self.clips_as_optax():
            mixes = mixes or len({*dtypes}) > 1
        return "standard" if mixes or optaxs else "strict"

    def clips_as_optax(self) -> bool:
        """Whether Optax clips, in the gradients' dtypes, instead of our step."""
        apart = {"groups", "tunable"} & {*self.wrappers} or self.optimizer == "schedule_free_adamw"
        return "optax.chain" in self.wrappers or ("chain" in self.wrappers and bool(apart))

    def stores_complex_as_real(self) -> bool:
        storage = self.arguments.get("storage")
        real = isinstance(storage, Mapping) or storage in ("float32", "bfloat16", mixed)
        return real and any(leaf.dtype == "complex64" for leaf in self.leaves.values())

    def rounding(self) -> float:
        """Return the relative rounding error of a step, besides the state's."""
        if self.clips_as_optax():
            return self.rounding_of_gradients()
        return 2.0**-15 if "master_weights(24)" in self.wrappers else 0.0

    def rounding_of_gradients(self) -> float:
        """Return the relative error of the gradients' dtypes, which updates have, too."""
        dtypes = [self.gradient_dtype or leaf.dtype for leaf in self.leaves.values()]
        return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)

    def _tree(self, seed: int, dtype: str | None) -> Any:
        rng = np.random.default_rng(seed)

        def array(leaf: Leaf) -> Any:
            x = rng.normal(size=leaf.shape)
            if leaf.dtype == "complex64":
                return np.asarray(x + 1j * rng.normal(size=leaf.shape), leaf.dtype)
            return np.asarray(x, jnp.dtype(dtype or leaf.dtype))

        return CONTAINERS[self.container]({k: array(leaf) for k, leaf in self.leaves.items()})

    def _placed(self, tree: Any) -> Any:
        """Return the tree in the arrays, boxes, and layout of the composition."""
        mesh = self.device_mesh()
        if mesh is not None:
            tree = jax.tree.map(
                lambda x: jax.device_put(x, NamedSharding(mesh, self._spec(x))), tree
            )
        elif self.arrays == "jax":
            tree = jax.tree.map(jnp.asarray, tree)
        if self.container == "linen boxes":
            tree = jax.tree.map(lambda x: nn.Partitioned(x, names=tuple(self._spec(x))), tree)
        return tree

    def _spec(self, x: Any) -> P:
        """Return the spec that shards the axis of the layout, if the devices divide it."""
        axis = {"rows": 0, "columns": np.ndim(x) - 1}.get(self.layout, -1)
        if not 0 <= axis < np.ndim(x) or x.shape[axis] % DEVICES or not x.size:
            return P(*[None] * np.ndim(x))
        return P(*("data" if k == axis else None for k in range(np.ndim(x))))


def _code(value: Any) -> str:
    if callable(value):
        return value.__name__
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {_code(v)}' for k, v in value.items())}}}"
    return repr(value)


def _with_large_element(g: Any) -> Any:
    if np.size(g) == 0 or float(jnp.finfo(g.dtype).max) < 1e20:
        return g
    return np.where(np.arange(np.size(g)).reshape(np.shape(g)) == 0, np.asarray(2e19, g.dtype), g)


# The strategy

REAL_ONLY = ("adopt", "adam_atan2", "simplified_ademamix", "yogi")
"""Optimizers whose rules order or compare numbers, which complex ones don't support."""

SHAPES = [
    (),
    (3,),
    (1,),
    (4, 6),
    (5, 1),
    (0, 3),
    (2, 3, 5),
    (8, 16),
    (16, 257),
    (33, 128),
    (8, 384),
]
"""Shapes without axes, without elements, odd, of several blocks, or cut by a shard's edge."""

DTYPES = ["float32", "float32", "bfloat16", "bfloat16", "float16", "complex64"]
NAMES = ["kernel", "bias", "value", "scale"]


@st.composite
def compositions(draw: st.DrawFn, devices: int, thorough: bool = False) -> Composition:
    """Draw a composition for this number of devices; `thorough` includes slow parts."""
    name = draw(st.sampled_from([entry.name for entry in adam_jax.catalogue()]))
    containers = [c for c in CONTAINERS if devices == 1 or c != "no leaves"]
    container = draw(st.sampled_from(containers))
    kinds = ["auto"] if container == "linen boxes" else ["auto", "explicit"]
    mesh = None if devices == 1 else draw(st.sampled_from(kinds))
    leaves = draw(_leaves(real=name in REAL_ONLY))
    is_complex = any(leaf.dtype == "complex64" for leaf in leaves.values())
    wrappers = draw(_wrappers(mesh, container, is_complex))
    first = next(iter(Composition(name, leaves=leaves, container=container).paths()), "")
    masked = first.split("/")[-1] or None  # a pattern that finds nothing brings a warning
    arguments = draw(_arguments(name, is_complex, masked, thorough))
    way = draw(st.sampled_from(WAYS))
    # JAX computes eagerly with explicitly sharded arrays only in the context of their mesh
    needs_context = (way, mesh) == ("eager", "explicit")
    if needs_context and "apply_if_finite" in wrappers:
        way = "update"  # the branches of Optax's cond differ in type
    in_mesh_context = mesh is not None and (needs_context or draw(st.booleans()))
    gradient_dtype = draw(st.sampled_from([None, None, None, "float32", "bfloat16"]))
    if "apply_if_finite" in wrappers and {*LOW_PRECISION} & {*wrappers}:
        gradient_dtype = "float32"  # both branches of apply_if_finite need one dtype
    if "optax.chain" in wrappers and gradient_dtype == "bfloat16":
        way = "update" if way == "eager" else way  # XLA sums a fused norm in float32
    gradients = ["normal", "normal", "normal", "zero", "tiny"]
    if all(leaf.dtype != "float16" for leaf in leaves.values()):  # float16 could overflow
        gradients.append("large")
    return Composition(
        optimizer=name,
        arguments=arguments,
        wrappers=wrappers,
        leaves=leaves,
        container=container,
        arrays="jax" if mesh else draw(st.sampled_from(["jax", "jax", "numpy"])),
        gradients=draw(st.sampled_from(gradients)),
        gradient_dtype=gradient_dtype,
        mesh=mesh,
        layout="replicated" if "zero1" in wrappers else draw(st.sampled_from(LAYOUTS)),
        in_mesh_context=in_mesh_context,
        way=way,
    )


@st.composite
def _leaves(draw: st.DrawFn, real: bool) -> dict[str, Leaf]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    dtypes = DTYPES[:-1] if real else DTYPES
    leaf = st.builds(Leaf, st.sampled_from(SHAPES), st.sampled_from(dtypes))
    return {name: draw(leaf) for name in names}


@st.composite
def _wrappers(
    draw: st.DrawFn, mesh: str | None, container: str, is_complex: bool
) -> tuple[str, ...]:
    named = container not in ("array", "no leaves")
    outermost = OUTERMOST[:1] if is_complex else OUTERMOST  # MultiSteps accumulates real numbers
    choices = [
        [None, None, None, "tunable"],
        [None, None, None, "groups" if named else None],
        [None, None, "chain", "optax.chain"],
        [None, None, None, "record"],
        [None, None, *LOW_PRECISION],
        [None, "zero1"] if mesh else [None],
        [None, None, None, *outermost],
    ]
    drawn = [draw(st.sampled_from(choice)) for choice in choices]
    return tuple(name for name in drawn if name is not None)


@st.composite
def _arguments(
    draw: st.DrawFn, name: str, is_complex: bool, masked: str | None, thorough: bool
) -> dict[str, Any]:
    """Draw arguments; annotations and defaults give the options of any constructor."""
    signature = inspect.signature(getattr(adam_jax, name), eval_str=True)
    parameters = dict(signature.parameters)
    given: dict[str, Any] = {}

    def maybe(argument: str, *values: Any) -> None:
        value = draw(st.sampled_from([None, None, *values])) if argument in parameters else None
        if value is not None:
            given[argument] = value

    maybe("learning_rate", warmup)
    maybe("momentum", 0.9)
    maybe("weight_decay", 0.1, *([warmup] if name != "schedule_free_adamw" else []))
    make = inspect.unwrap(getattr(adam_jax, name))  # the wrapper shows types by name only
    types = {**inspect.get_annotations(make, eval_str=True), "weight_decay_form": Form}
    for argument, parameter in parameters.items():
        literals = typing.get_args(types.get(argument))
        if isinstance(parameter.default, bool):
            if argument == "cautious" and is_complex:
                continue
            maybe(argument, not parameter.default)
        elif argument == "weight_decay_form":
            decays = given.get("weight_decay") is not None
            real = [form for form in literals if form in ("decoupled", "independent", "l2")]
            maybe(argument, *((real if is_complex else literals) if decays else ()))
        elif typing.get_origin(types.get(argument)) is typing.Literal:
            maybe(argument, *literals)
    if given.get("weight_decay") is not None and masked is not None:
        maybe("weight_decay_mask", not_matching(masked))
    moment = next(e.state for e in adam_jax.catalogue() if e.name == name)[:1]
    mappings = [{moment[0]: "int8"}, {moment[0]: "bfloat16"}] if moment else []
    lossy = ["int8", small_int8, small_int8, "compact", small_compact, mixed]
    storages = ["float32", "bfloat16", *lossy, *mappings]
    maybe("storage", *storages)
    kernels = ["pallas"] if thorough else []  # interpreted on CPU
    maybe("implementation", *["xla", "stream"] * 2, *kernels)
    if given.get("centered"):
        given.pop("bias_correction", None)  # its first nu − mu² is nothing but rounding
    if given.get("nesterov"):
        given.pop("eps_hat", None)  # NAdam has no such form
    return given

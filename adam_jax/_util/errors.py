"""What may be given, and the wording of errors: who, what, the value, what is allowed, the fix."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_jax._util.numerics import Decay
from adam_jax._util.paths import leaves_with_path, path_string
from adam_jax._util.typing import FROM_ZERO, UNIT, UP_TO_ONE, KeyPath, PyTree, Range

if TYPE_CHECKING:
    from adam_jax._util.declare import Moment, Rule


_function: contextvars.ContextVar[str] = contextvars.ContextVar("function", default="adam_jax")


@contextlib.contextmanager
def error_context(name: str) -> Generator[None, None, None]:
    """Begin the messages of errors with this name, unless a caller has set its own.

    It works as a decorator and in a `with` statement.
    """
    token = _function.set(name) if _function.get() == "adam_jax" else None
    try:
        yield
    finally:
        if token:
            _function.reset(token)


def value_error(message: str) -> ValueError:
    """Return a ValueError whose message begins with the function that the user called."""
    return ValueError(f"{_function.get()}: {message}")


def type_error(message: str) -> TypeError:
    """Return a TypeError whose message begins with the function that the user called."""
    return TypeError(f"{_function.get()}: {message}")


DECAY_RATE = re.compile(r"b\d+|decay|momentum")
_RANGES = {
    "decay": UP_TO_ONE,
    "momentum": UP_TO_ONE,
    "learning_rate": FROM_ZERO,
    "weight_decay": FROM_ZERO,
    "eps": FROM_ZERO,
    "eps_root": FROM_ZERO,
    "initial_scale": FROM_ZERO,
    "initial_accumulator_value": FROM_ZERO,
}


def is_decay_rate(name: str) -> bool:
    """Whether a hyperparameter is a decay rate, by the convention of its name."""
    return DECAY_RATE.fullmatch(name) is not None


def range_of(name: str) -> Range | None:
    """Return the range of a rule's hyperparameter, by the convention of its name."""
    return _RANGES.get(name, UNIT if is_decay_rate(name) else None)


def in_range(name: str, value: Any, allowed: Range | None) -> None:
    """Check a number; arrays, tracers, and schedules can't be looked at."""
    if allowed and isinstance(value, (bool, np.bool_)):
        raise type_error(f"{name} must be a number {allowed.text}, got {value}; pass a float")
    if allowed and isinstance(value, NUMBERS) and not allowed.low <= value < allowed.high:
        raise value_error(f"{name} must be {allowed.text}, got {value}")


def hyperparam(name: str, value: Any) -> None:
    """Check the type of a hyperparameter, and its range if it is a number."""
    if value is inspect.Parameter.empty:
        raise type_error(f"the hyperparameter {name!r} has no default; give {name}=")
    in_range(name, value, range_of(name))
    if isinstance(value, (*NUMBERS, Decay)):
        return
    if _is_schedule(value):
        schedule(name, value)
    elif not _is_real_array(value):
        raise type_error(f"{name} must be a number, a scalar array or a schedule, got {value!r}")
    elif value.ndim != 0:
        raise value_error(
            f"{name} must be a scalar, got an array of shape {value.shape}; "
            f"for a value per leaf use optax.partition, for a population jax.vmap"
        )


def schedule(name: str, value: Any) -> None:
    """A schedule must take one argument, the step count."""
    if not _takes(value, 1):
        raise type_error(
            f"{name} must be a number, a scalar array or a schedule, which is a function "
            f"of the step count, got {_shown(value)}, which cannot be called with one argument; "
            f"write lambda count: ..., or call the function that makes the schedule, e.g. "
            f"optax.cosine_decay_schedule(1e-3, 10_000)"
        )


def scheduled(name: str, value: Any) -> None:
    """What a schedule returned must be a scalar."""
    if isinstance(value, NUMBERS) or (_is_real_array(value) and value.ndim == 0):
        return
    got = f"an array of shape {value.shape}" if _is_real_array(value) else repr(value)
    if callable(value):
        got = (
            f"{_shown(value)}; call the function that makes the schedule, e.g. "
            f"optax.constant_schedule(1e-3)"
        )
    raise type_error(f"the schedule of {name} must return a scalar, got {got}")


def storage_function(function: Any) -> None:
    """A function given for `storage` must take a path and a leaf."""
    if not _takes(function, 2):
        raise type_error(
            f"storage must be a format or a function of two arguments, (path, leaf), got "
            f"{_shown(function)}, which cannot be called with two; write lambda path, leaf: ..."
        )


def no_schedule(caller: str, function: Any) -> PyTree:
    """Return the storage function, which raises our error if it is called like a schedule."""

    @functools.wraps(function)
    def checked(*args: PyTree) -> PyTree:
        if len(args) == 1:
            raise TypeError(
                f"{caller}: storage must be called with a path and a leaf, got a step count: "
                f"optax.inject_hyperparams takes functions for schedules; name it in static_args, "
                f"optax.inject_hyperparams({caller}, static_args=('storage',))"
            )
        return function(*args)

    return checked


def _takes(function: Any, number: int) -> bool:
    """Whether a function takes so many positional arguments; True if it can't be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in functions
        return True
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True


def _shown(value: Any) -> str:
    """Return a value for an error: its repr if that is short, else its name or its type."""
    if value is None or isinstance(value, (*NUMBERS, str)):
        return repr(value)
    if callable(value) and hasattr(value, "__name__"):
        return f"the {'class' if isinstance(value, type) else 'function'} {name_of(value)}"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def name_of(function: Any) -> str:
    """Return the name of a function, or of its type if it has none (functools.partial)."""
    return getattr(function, "__name__", type(function).__name__)


def is_transformation(value: Any) -> bool:
    """Whether a value has the functions of an Optax transformation, of whatever class it is."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def transformation(name: str, value: Any, usage: str) -> None:
    """What a wrapper goes around must be a transformation. `usage` is the right call."""
    if is_transformation(value):
        return
    got, fix = _shown(value), f"call {usage}"
    if isinstance(value, (list, tuple)) and any(map(is_transformation, value)):
        fix = "pass its elements as separate arguments, e.g. adam_jax.chain(clip, adamw)"
    elif hasattr(value, "__name__"):  # a model may be callable, too
        fix = f"call it first, e.g. {name_of(value)}(1e-3)"
    raise type_error(f"{name} must be an Optax transformation, got {got}; {fix}")


def maker(value: Any, usage: str) -> None:
    """A constructor must be given as the function that it is, not called."""
    if not callable(value):
        got = "a transformation" if is_transformation(value) else _shown(value)
        raise type_error(
            f"constructor must be a function that makes a transformation, got {got}; "
            f"pass the function and its arguments apart, {usage}"
        )


def mapping(name: str, value: Any, usage: str) -> None:
    if not isinstance(value, Mapping):
        got = repr(value) if isinstance(value, (list, tuple, str)) else _shown(value)
        raise type_error(f"{name} must be a mapping, got {got}; write {usage}")


def torch_state(value: Any) -> None:
    """A PyTorch optimizer's state dict has these two keys; a model's has not."""
    if not (isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()):
        raise type_error(
            f"state_dict must be a mapping with 'state' and 'param_groups', got "
            f"{_shown(value)}; pass optimizer.state_dict()"
        )


NUMBERS = (int, float, np.floating, np.integer)


def _is_schedule(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and not hasattr(value, "dtype")


def _is_real_array(value: Any) -> bool:
    dtype = None if isinstance(value, type) else getattr(value, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating)
        or jnp.issubdtype(dtype, jnp.integer)
        or jnp.issubdtype(dtype, jnp.bool_)
    )


def arguments(
    signature: inspect.Signature, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]
) -> inspect.BoundArguments:
    """The arguments of a call by their names."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise type_error(f"{error}; its arguments are {', '.join(signature.parameters)}") from None


def a_rule(caller: str, rule: Any, kind: type) -> None:
    if not isinstance(rule, kind):
        raise TypeError(
            f"{caller}: needs a rule, got {rule!r}; declare one with @adam_jax.rule, or take one "
            f"of adam_jax.rules"
        )


def choice(name: str, value: Any, options: Iterable[str]) -> None:
    options = list(options)
    if not isinstance(value, str) or value not in options:
        listed = ", ".join(repr(o) for o in options)
        raise value_error(f"{name} must be one of {listed}, got {value!r}")


def known_hyperparams(given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise type_error(
                f"there is no hyperparameter {name!r}; it has {', '.join(known) or 'none'}"
            )


def leaf(what: str, path: KeyPath, x: PyTree) -> None:
    """A parameter or gradient must be a floating-point or complex array, or a Python number."""
    dtype = getattr(x, "dtype", None)
    if isinstance(x, (int, float, complex)) and not isinstance(x, bool):
        return
    if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
        return
    kind = "a PRNG key" if _is_key(dtype) else f"of type {dtype or type(x).__name__}"
    raise type_error(
        f"{_at(what, path)} is {kind}, which has no gradient to follow; keep it "
        f"out of the optimizer, e.g. with optax.masked or optax.partition, or make it a float"
    )


def _is_key(dtype: PyTree) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _at(what: str, path: KeyPath) -> str:
    """'the gradient of' with the leaf's path, which a tree of one leaf has not."""
    return f"{what} {path_string(path)!r}" if path else what.removesuffix(" of")


def _equal_shapes(path: KeyPath, gradient: PyTree, what: str, other: PyTree) -> None:
    if not isinstance(other, (*NUMBERS, complex)) and not hasattr(other, "shape"):
        raise value_error(
            f"{_at('the gradient of', path)} is one array, its {what} is a "
            f"{type(other).__name__}; pass the tree that init was given"
        )
    if np.shape(gradient) != np.shape(other):
        raise value_error(
            f"{_at('the gradient of', path)} has shape {np.shape(gradient)}, its "
            f"{what} {np.shape(other)}; they must be equal (nothing is broadcast)"
        )


def moment(path: KeyPath, gradient: PyTree, name: str, declared: Moment, stored: PyTree) -> None:
    """A stored moment must fit the gradient of its leaf."""
    if stored is None:
        raise value_error(
            f"{_at('the parameter', path)} has a gradient but no {name} in the state; "
            f"it was None when init was called: make the state anew"
        )
    _equal_shapes(path, gradient, name, stored)
    if declared.signed and jnp.iscomplexobj(gradient) and not jnp.iscomplexobj(stored):
        raise value_error(
            f"{_at(f'{name} of the complex leaf', path)} is stored as {stored.dtype} "
            f"and would lose its imaginary part; choose a complex dtype, or none"
        )


def scales(path: KeyPath, name: str, codes: PyTree, scales: PyTree, block: int) -> None:
    """The scales of a coded moment must be those of its format's blocks."""
    wanted = (*codes.shape[:-1], -(-codes.shape[-1] // block))
    if scales.shape != wanted:
        raise value_error(
            f"{_at(f'{name} of', path)} has codes of shape {codes.shape} and scales of "
            f"shape {scales.shape}; blocks of {block} need {wanted}: the state was coded with "
            f"another block size; make it anew, or restore it with the version that wrote it"
        )


def parameter(
    path: KeyPath, gradient: PyTree, p: PyTree, rules: Sequence[Rule], applied: bool
) -> None:
    """Parameters have the gradients' shapes; rules that use them and applied updates need them."""
    if p is None and not rules and not applied:
        return
    if p is None:
        needy = "apply" if applied else rules[0].name
        if rules and "weight_decay" in rules[0].hyperparams:
            needy = "weight_decay"
        raise value_error(
            f"{needy} needs the parameters, and {_at('the gradient of', path)} came "
            f"without one; call update(gradients, state, params)"
        )
    _equal_shapes(path, gradient, "parameter", p)


def returned(rule: Rule, out: PyTree) -> None:
    """A rule with moments must return a tuple of its direction and them."""
    wanted = ("direction", *rule.moments)
    if not isinstance(out, tuple) or len(out) != len(wanted):
        got = "one array" if hasattr(out, "dtype") else f"a {type(out).__name__}"
        got = f"{len(out)} values" if isinstance(out, tuple) else got
        raise ValueError(
            f"rule {rule.name}: must return the tuple ({', '.join(wanted)}), returned {got}"
        )


def outputs(rule: Rule, u: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array]) -> None:
    """A rule must return a direction and its moments, shaped and typed as they came."""
    named = zip(("direction", *rule.moments), (u, *old), new, strict=True)
    for name, before, after in named:
        want = f"shape {before.shape} and dtype {before.dtype}"
        if not hasattr(after, "dtype") or not hasattr(after, "shape"):
            raise ValueError(f"rule {rule.name}: the {name} must have {want}, got {after!r}")
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(
                f"rule {rule.name}: the {name} must have {want}, "
                f"got {after.shape} and {after.dtype}"
            )


def structure(what: str, gradients: PyTree, tree: PyTree) -> ValueError:
    """The error for gradients whose structure is not that of the parameters or the state."""
    ours, theirs = (_paths(t) for t in (gradients, tree))
    missing, extra = sorted(theirs - ours), sorted(ours - theirs)
    found = [
        f"without a gradient: {', '.join(missing[:5])}" if missing else "",
        f"not in the {what}: {', '.join(extra[:5])}" if extra else "",
        ""
        if missing or extra
        else f"{jax.tree.structure(gradients)} against {jax.tree.structure(tree)}",
    ]
    return value_error(
        f"the gradients and the {what} have different structures "
        f"({'; '.join(f for f in found if f)}); pass the tree that init was given"
    )


def _paths(tree: PyTree) -> set[str]:
    return {path_string(path) or "one array" for path, _ in leaves_with_path(tree)}


def states(state: PyTree, expected: Sequence[type], masked: Sequence[bool], bare: bool) -> None:
    """A state must be what this optimizer's init makes, at least in its outline."""
    got = [state] if bare else state
    if isinstance(got, (tuple, list)) and len(got) == len(expected):
        inner = [
            getattr(s, "inner_state", None) if m else s for s, m in zip(got, masked, strict=True)
        ]
        fields = [set(getattr(s, "_fields", "?")) for s in inner]
        if fields == [set(e._fields) for e in expected]:
            return
    made = ", ".join(
        f"MaskedState({e.__name__})" if m else e.__name__
        for e, m in zip(expected, masked, strict=True)
    )
    raise value_error(
        f"this state is not of its making: got {_outline(state)}, init makes "
        f"{made if bare else f'({made})'}; use the state of the same optimizer, or make a new one"
    )


def _outline(state: PyTree) -> str:
    if type(state) is tuple:
        return f"({', '.join(map(_outline, state))})"
    if isinstance(state, optax.MaskedState):
        return f"MaskedState({_outline(state.inner_state)})"
    return type(state).__name__


def mask(given: PyTree, gradients: PyTree, *, no_tree: bool = False) -> Exception:
    """Return the error for a mask that isn't a tree of bools, or not a prefix of the gradients."""
    error = type_error if no_tree else value_error
    return error(
        f"the mask of weight_decay, {given!r}, must be a tree of bools with the "
        f"gradients' structure or a prefix of it, or a function that returns one, such as "
        f"adam_jax.not_matching('bias'); the gradients have {jax.tree.structure(gradients)}"
    )


def no_step_count(name: str, state: type) -> None:
    raise value_error(
        f"{name} cannot be a schedule, because {state.__name__} has no step count; "
        f"wrap the constructor in optax.inject_hyperparams"
    )


def one_mask(mask: PyTree, weight_decay_mask: PyTree) -> PyTree:
    if mask is not None and weight_decay_mask is not None:
        raise value_error("mask and weight_decay_mask are one argument; give one of them")
    return weight_decay_mask if mask is None else mask


def only_eps(eps_root: PyTree, nesterov: bool) -> None:
    # an array may be the 0 that inject_hyperparams made of the default
    if nesterov or callable(eps_root) or (isinstance(eps_root, NUMBERS) and eps_root != 0):
        raise value_error(
            f"eps_hat=True has neither eps_root nor nesterov, got eps_root={eps_root}, "
            f"nesterov={nesterov}; leave them out, or eps_hat"
        )


def finished(wrapper: str, text: str) -> None:
    raise ValueError(
        f"{wrapper}: tx must be a direction, whose updates point along the gradient, got {text}, "
        f"which is a finished optimizer: its updates point against the gradient, and training "
        f"would freeze; wrap the direction instead: "
        f"optax.chain({wrapper}(adam_jax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))"
        + (", or give the constructor cautious=True" if wrapper == "cautious" else "")
    )


def not_one(caller: str, what: str, found: int) -> None:
    raise ValueError(
        f"{caller}: the state holds {found} {what}; pass the state of one optimizer that has it"
    )


def mask_without_decay(weight_decay: PyTree, mask: PyTree) -> None:
    if weight_decay is None and mask is not None:
        raise value_error(
            "weight_decay_mask is given, but weight_decay is None; give weight_decay="
        )


def above_zero(name: str, value: Any) -> None:
    if isinstance(value, NUMBERS) and not value > 0:
        raise value_error(f"{name} must be > 0, got {value}")


def at_least(low: int, name: str, value: Any) -> None:
    if isinstance(value, NUMBERS) and not value >= low:
        raise value_error(f"{name} must be >= {low}, or None for none, got {value}")


def not_a_schedule(name: str, value: Any, because: str = " here") -> None:
    if callable(value):
        raise value_error(f"{name} cannot be a schedule{because}; give a number")


def no_derivative(because: str) -> TypeError:
    """The error for a gradient through an update that has none."""
    return TypeError(
        f"adam_jax: a gradient through the update, whose state {because}, which has no "
        f"derivative; use storage='float32' and implementation='xla' for what is differentiated"
    )


def not_convertible(moments: Iterable[Sequence[str]], why: str) -> None:
    named = "; ".join(", ".join(names) for names in moments)
    raise value_error(
        f"the moments {named}, {why}; convert between states of one variant and of the "
        f"same parameters, or start anew with tx.init(params)"
    )


def chained(state: PyTree, parts: int) -> None:
    """The state of a chain must have one for each of its parts."""
    if not isinstance(state, (tuple, list)) or hasattr(state, "_fields") or len(state) != parts:
        raise ValueError(
            f"chain: the state must be a tuple of {parts}, one for each part, got "
            f"{_outline(state)}; use the state of the same chain, or make a new one"
        )


def number_of(name: str, value: Any, options: Sequence[int]) -> None:
    if value not in options:
        raise value_error(f"{name} must be {' or '.join(map(str, options))}, got {value!r}")


def seed(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise value_error(f"seed must be an integer from 0 to 2**32 - 1, got {value!r}")


def parameters_given(params: PyTree) -> None:
    if params is None:
        raise value_error(
            "needs the parameters, which it rounds; call update(gradients, state, params)"
        )


def no_wider_than_float32(path: KeyPath, x: PyTree) -> None:
    """What is kept below a parameter makes it float32: there is nothing to keep below a float64."""
    dtype = getattr(x, "dtype", None)
    if dtype in (jnp.float64, jnp.complex128):
        raise value_error(
            f"{_at('the parameter', path)} is {dtype}, and masters are float32; keep it "
            f"out, e.g. with optax.partition, or make it bfloat16 or float32"
        )


def rest(path: KeyPath, p: PyTree, rest: PyTree, dtype: PyTree) -> None:
    """What is kept below a parameter must be what init made for it."""
    if dtype is None or p is None:
        return
    narrow = getattr(p, "dtype", None) == jnp.bfloat16
    wanted = np.shape(p) if narrow else (1,) * np.ndim(p)
    if rest is None or rest.shape != wanted or rest.dtype != dtype:
        got = "nothing" if rest is None else f"{rest.dtype}{list(rest.shape)}"
        raise value_error(
            f"below {_at('the parameter', path)}, which is {jnp.result_type(p)}, the "
            f"state keeps {got} where {jnp.dtype(dtype)}{list(wanted)} belongs; its dtype, or "
            f"bits=, was another when init was called: make the state anew"
        )


def as_many(parameters: Sequence[PyTree], rests: Sequence[PyTree]) -> None:
    if len(parameters) != len(rests):
        raise value_error(
            f"{len(parameters)} parameters were given, and the state keeps the bits below "
            f"{len(rests)}; pass the parameters that belong to the state"
        )


def nothing_after(exact: Iterable[optax.GradientTransformation]) -> None:
    """Transformations whose updates are exact must be the last to touch them."""
    for tx in exact:
        raise value_error(
            f"{tx!r} computes updates that land exactly, and nothing may change them; "
            f"put it outermost, e.g. master_weights(chain(clip, adamw))"
        )


def on_explicit_mesh(mesh: PyTree, tree: PyTree) -> None:
    """Under jit, arrays must be on a mesh with explicit axes before they can be resharded."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return
    if not jax.sharding.get_abstract_mesh().empty:
        return
    for path, x in leaves_with_path(tree):
        if isinstance(x, Tracer) and jax.typeof(x).sharding.mesh.empty:
            raise value_error(
                f"{_at('the gradient of', path)} must be on the mesh, whose axes are "
                f"explicit, got an array on one device; put the parameters on the mesh, e.g. "
                f"jax.device_put(params, NamedSharding(mesh, PartitionSpec())), or step inside "
                f"jax.set_mesh(mesh)"
            )


def no_mesh(caller: str) -> ValueError:
    return ValueError(
        f"{caller}: the parameters have no shardings; pass arrays or ShapeDtypeStructs that have "
        f"NamedShardings, or PartitionSpecs and their mesh: {caller}(tx, params, specs, mesh)"
    )


def mesh_axis(caller: str, mesh: PyTree, axis: str) -> None:
    if not isinstance(getattr(mesh, "shape", None), Mapping):
        raise TypeError(
            f"{caller}: mesh must be a jax.sharding.Mesh, got {_shown(mesh)}; make one, e.g. "
            f"jax.make_mesh((jax.device_count(),), ({axis!r},))"
        )
    if axis not in mesh.shape:
        raise ValueError(
            f"{caller}: axis must be one of the mesh's, {', '.join(map(repr, mesh.shape))}, "
            f"got {axis!r}"
        )


@contextlib.contextmanager
def needing_extra(what: str) -> Generator[None, None, None]:
    """A missing package is called by its name, with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs {error.name}: pip install "adam_jax[demo]"', name=error.name
        ) from None

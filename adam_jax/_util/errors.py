"""What may be given, and the wording of errors: who, what, the value, what is allowed, the fix."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_jax._util.numerics import Decay
from adam_jax._util.paths import leaves_with_path, path_string

if TYPE_CHECKING:
    from adam_jax._util.declare import Moment, Rule


_caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="adam_jax")


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors inside carry this name, unless an outer one was set: that is what the user called."""
    token = _caller.set(name) if _caller.get() == "adam_jax" else None
    try:
        yield
    finally:
        if token:
            _caller.reset(token)


def who() -> str:
    """The name that the errors of the moment carry."""
    return _caller.get()


class Range(NamedTuple):
    """The values that a hyperparameter may take."""

    text: str
    low: float
    high: float = math.inf

    def holds(self, x: float) -> bool:
        return self.low <= x < self.high


UNIT = Range("in [0, 1)", 0.0, 1.0)
UP_TO_ONE = Range("in [0, 1]", 0.0, math.nextafter(1, 2))  # a sum is a momentum, too
FROM_ZERO = Range(">= 0 and finite", 0.0)
FROM_FOUR = Range(">= 4 and finite", 4.0)  # RAdam's rectification has no real value below

DECAY_RATE = re.compile(r"b\d+|decay|momentum")


def is_decay_rate(name: str) -> bool:
    """Whether a hyperparameter is a decay rate, which its name says."""
    return DECAY_RATE.fullmatch(name) is not None


def allowed(name: str) -> Range | None:
    """The range of an argument of our constructors, from its name; None where anything goes."""
    if name == "threshold":
        return FROM_FOUR
    if name in ("momentum_decay", "alpha", "gamma", "a", "b"):
        return FROM_ZERO
    return _allowed_everywhere(name)


def _allowed_everywhere(name: str) -> Range | None:
    """The range that a name has in everybody's rules."""
    if name in ("decay", "momentum"):
        return UP_TO_ONE
    if is_decay_rate(name):
        return UNIT
    named = ("learning_rate", "weight_decay", "eps", "eps_root", "initial_scale")
    return FROM_ZERO if name in (*named, "initial_accumulator_value") else None


def argument(name: str, value: Any) -> None:
    """An argument of one of our constructors must be in its range, where it is a number."""
    _in_range(name, value, allowed(name))
    hyperparam(name, value)


def _in_range(name: str, value: Any, span: Range | None) -> None:
    if span and isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{who()}: {name} must be a number {span.text}, got {value}; pass a float")
    if span and isinstance(value, NUMBERS) and not span.holds(float(value)):
        raise ValueError(f"{who()}: {name} must be {span.text}, got {value}")


def hyperparam(name: str, value: Any) -> None:
    """Numbers must be in range; arrays, tracers and schedules can't be looked at."""
    if value is inspect.Parameter.empty:
        raise TypeError(f"{who()}: the hyperparameter {name!r} has no default; give {name}=")
    if isinstance(value, NUMBERS):
        _in_range(name, value, _allowed_everywhere(name))
    elif _is_schedule(value):
        schedule(name, value)
    elif isinstance(value, Decay):
        return
    elif not _is_real_array(value):
        raise TypeError(
            f"{who()}: {name} must be a number, a scalar array or a schedule, got {value!r}"
        )
    elif value.ndim != 0:
        raise ValueError(
            f"{who()}: {name} must be a scalar, got an array of shape {value.shape}; "
            f"for a value per leaf use optax.partition, for a population jax.vmap"
        )


def schedule(name: str, value: Any) -> None:
    """A schedule must take one argument, the step count."""
    if not _takes(value, 1):
        raise TypeError(
            f"{who()}: {name} must be a number, a scalar array or a schedule, which is a function "
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
    raise TypeError(f"{who()}: the schedule of {name} must return a scalar, got {got}")


def storage_function(function: Any) -> None:
    """A function given for `storage` must take a path and a leaf."""
    if not _takes(function, 2):
        raise TypeError(
            f"{who()}: storage must be a format or a function of two arguments, (path, leaf), got "
            f"{_shown(function)}, which cannot be called with two; write lambda path, leaf: ..."
        )


def no_schedule(caller: str, function: Any) -> Any:
    """Return the storage function, which raises our error if it is called like a schedule."""

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
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
    raise TypeError(f"{who()}: {name} must be an Optax transformation, got {got}; {fix}")


def maker(value: Any, usage: str) -> None:
    """A constructor must be given as the function that it is, not called."""
    if not callable(value):
        got = "a transformation" if is_transformation(value) else _shown(value)
        raise TypeError(
            f"{who()}: constructor must be a function that makes a transformation, got {got}; "
            f"pass the function and its arguments apart, {usage}"
        )


def mapping(name: str, value: Any, usage: str) -> None:
    if not isinstance(value, Mapping):
        got = repr(value) if isinstance(value, (list, tuple, str)) else _shown(value)
        raise TypeError(f"{who()}: {name} must be a mapping, got {got}; write {usage}")


def torch_state(value: Any) -> None:
    """A PyTorch optimizer's state dict has these two keys; a model's has not."""
    if not (isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()):
        raise TypeError(
            f"{who()}: state_dict must be a mapping with 'state' and 'param_groups', got "
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
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call by their names."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{who()}: {error}; its arguments are {', '.join(signature.parameters)}"
        ) from None


def a_rule(caller: str, rule: Any, kind: type[Any]) -> None:
    if not isinstance(rule, kind):
        raise TypeError(
            f"{caller}: needs a rule, got {rule!r}; declare one with @adam_jax.rule, or take one "
            f"of adam_jax.rules"
        )


def choice(name: str, value: Any, options: Iterable[str]) -> None:
    options = list(options)
    if not isinstance(value, str) or value not in options:
        listed = ", ".join(repr(o) for o in options)
        raise ValueError(f"{who()}: {name} must be one of {listed}, got {value!r}")


def known_hyperparams(given: Iterable[str], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(
                f"{who()}: there is no hyperparameter {name!r}; it has {', '.join(known) or 'none'}"
            )


def leaf(what: str, path: tuple[Any, ...], x: Any) -> None:
    """A parameter or gradient must be a floating-point or complex array, or a Python number."""
    dtype = getattr(x, "dtype", None)
    if isinstance(x, (int, float, complex)) and not isinstance(x, bool):
        return
    if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
        return
    kind = "a PRNG key" if _is_key(dtype) else f"of type {dtype or type(x).__name__}"
    raise TypeError(
        f"{who()}: {_at(what, path)} is {kind}, which has no gradient to follow; keep it "
        f"out of the optimizer, e.g. with optax.masked or optax.partition, or make it a float"
    )


def _is_key(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _at(what: str, path: tuple[Any, ...]) -> str:
    """'the gradient of' with the leaf's path, which a tree of one leaf has not."""
    return f"{what} {path_string(path)!r}" if path else what.removesuffix(" of")


def _equal_shapes(path: tuple[Any, ...], gradient: Any, what: str, other: Any) -> None:
    if not isinstance(other, (*NUMBERS, complex)) and not hasattr(other, "shape"):
        raise ValueError(
            f"{who()}: {_at('the gradient of', path)} is one array, its {what} is a "
            f"{type(other).__name__}; pass the tree that init was given"
        )
    if np.shape(gradient) != np.shape(other):
        raise ValueError(
            f"{who()}: {_at('the gradient of', path)} has shape {np.shape(gradient)}, its "
            f"{what} {np.shape(other)}; they must be equal (nothing is broadcast)"
        )


def moment(path: tuple[Any, ...], gradient: Any, name: str, declared: Moment, stored: Any) -> None:
    """A stored moment must fit the gradient of its leaf."""
    if stored is None:
        raise ValueError(
            f"{who()}: {_at('the parameter', path)} has a gradient but no {name} in the state; "
            f"it was None when init was called: make the state anew"
        )
    _equal_shapes(path, gradient, name, stored)
    if declared.signed and jnp.iscomplexobj(gradient) and not jnp.iscomplexobj(stored):
        raise ValueError(
            f"{who()}: {_at(f'{name} of the complex leaf', path)} is stored as {stored.dtype} "
            f"and would lose its imaginary part; choose a complex dtype, or none"
        )


def scales(path: tuple[Any, ...], name: str, codes: Any, scales: Any, block: int) -> None:
    """The scales of a coded moment must be those of its format's blocks."""
    wanted = (*codes.shape[:-1], -(-codes.shape[-1] // block))
    if scales.shape != wanted:
        raise ValueError(
            f"{who()}: {_at(f'{name} of', path)} has codes of shape {codes.shape} and scales of "
            f"shape {scales.shape}; blocks of {block} need {wanted}: the state was coded with "
            f"another block size; make it anew, or restore it with the version that wrote it"
        )


def parameter(
    path: tuple[Any, ...], gradient: Any, p: Any, rules: Sequence[Rule], applied: bool
) -> None:
    """Parameters have the gradients' shapes; rules that use them and applied updates need them."""
    if p is None and not rules and not applied:
        return
    if p is None:
        needy = "apply" if applied else rules[0].name
        if rules and "weight_decay" in rules[0].hyperparams:
            needy = "weight_decay"
        raise ValueError(
            f"{who()}: {needy} needs the parameters, and {_at('the gradient of', path)} came "
            f"without one; call update(gradients, state, params)"
        )
    _equal_shapes(path, gradient, "parameter", p)


def returned(rule: Rule, out: Any) -> None:
    """A rule with moments must return a tuple of its direction and them."""
    wanted = ("direction", *rule.moments)
    if not isinstance(out, tuple) or len(out) != len(wanted):
        got = "one array" if hasattr(out, "dtype") else f"a {type(out).__name__}"
        got = f"{len(out)} values" if isinstance(out, tuple) else got
        raise ValueError(
            f"rule {rule.name}: must return the tuple ({', '.join(wanted)}), returned {got}"
        )


def averaged(rule: Rule, direction: Any) -> None:
    """A rule with a factor must return what it averages beside its direction."""
    wanted = rule.averages
    if not isinstance(direction, tuple) or len(direction) != 1 + wanted:
        raise ValueError(
            f"rule {rule.name}: with a factor of {wanted} arguments the direction must be a tuple "
            f"(direction, {', '.join(['x'] * wanted)}), got a {type(direction).__name__}"
        )


def outputs(rule: Rule, u: Any, old: Sequence[Any], direction: Any, new: Sequence[Any]) -> None:
    """A rule must return a direction and its moments, shaped and typed as they came."""
    named = zip(("direction", *rule.moments), (u, *old), (direction, *new), strict=True)
    for name, before, after in named:
        want = f"shape {before.shape} and dtype {before.dtype}"
        if not hasattr(after, "dtype") or not hasattr(after, "shape"):
            raise ValueError(f"rule {rule.name}: the {name} must have {want}, got {after!r}")
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(
                f"rule {rule.name}: the {name} must have {want}, "
                f"got {after.shape} and {after.dtype}"
            )


def structure(what: str, gradients: Any, tree: Any) -> ValueError:
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
    return ValueError(
        f"{who()}: the gradients and the {what} have different structures "
        f"({'; '.join(f for f in found if f)}); pass the tree that init was given"
    )


def _paths(tree: Any) -> set[str]:
    return {path_string(path) or "one array" for path, _ in leaves_with_path(tree)}


def states(state: Any, expected: Sequence[type[Any]], masked: Sequence[bool], bare: bool) -> None:
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
    raise ValueError(
        f"{who()}: this state is not of its making: got {_outline(state)}, init makes "
        f"{made if bare else f'({made})'}; use the state of the same optimizer, or make a new one"
    )


def _outline(state: Any) -> str:
    if type(state) is tuple:
        return f"({', '.join(map(_outline, state))})"
    if isinstance(state, optax.MaskedState):
        return f"MaskedState({_outline(state.inner_state)})"
    return type(state).__name__


def mask(given: Any, gradients: Any, kind: type[Exception] = ValueError) -> Exception:
    """The error for a mask that is not a tree of bools that the gradients' tree begins with."""
    return kind(
        f"{who()}: the mask of weight_decay, {given!r}, must be a tree of bools with the "
        f"gradients' structure or a prefix of it, or a function that returns one, such as "
        f"adam_jax.not_matching('bias'); the gradients have {jax.tree.structure(gradients)}"
    )


def no_step_count(name: str, state: type[Any]) -> None:
    raise ValueError(
        f"{who()}: {name} cannot be a schedule, because {state.__name__} has no step count; "
        f"wrap the constructor in optax.inject_hyperparams"
    )


def one_mask(mask: Any, weight_decay_mask: Any) -> Any:
    if mask is not None and weight_decay_mask is not None:
        raise ValueError(f"{who()}: mask and weight_decay_mask are one argument; give one of them")
    return weight_decay_mask if mask is None else mask


def only_eps(eps_root: Any, nesterov: bool) -> None:
    # an array may be the 0 that inject_hyperparams made of the default
    if nesterov or callable(eps_root) or (isinstance(eps_root, NUMBERS) and eps_root != 0):
        raise ValueError(
            f"{who()}: eps_hat=True has neither eps_root nor nesterov, got eps_root={eps_root}, "
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


def mask_without_decay(weight_decay: Any, mask: Any) -> None:
    if weight_decay is None and mask is not None:
        raise ValueError(
            f"{who()}: weight_decay_mask is given, but weight_decay is None; give weight_decay="
        )


def above_zero(name: str, value: Any) -> None:
    if isinstance(value, NUMBERS) and not value > 0:
        raise ValueError(f"{who()}: {name} must be > 0, got {value}")


def at_least(low: int, name: str, value: Any) -> None:
    if isinstance(value, NUMBERS) and not value >= low:
        raise ValueError(f"{who()}: {name} must be >= {low}, or None for none, got {value}")


def not_a_schedule(name: str, value: Any, because: str = " here") -> None:
    if callable(value):
        raise ValueError(f"{who()}: {name} cannot be a schedule{because}; give a number")


def no_derivative(because: str) -> TypeError:
    """The error for a gradient through an update that has none."""
    return TypeError(
        f"adam_jax: a gradient through the update, whose state {because}, which has no "
        f"derivative; use storage='float32' and implementation='xla' for what is differentiated"
    )


def not_convertible(moments: Iterable[Sequence[str]], why: str) -> None:
    named = "; ".join(", ".join(names) for names in moments)
    raise ValueError(
        f"{who()}: the moments {named}, {why}; convert between states of one variant and of the "
        f"same parameters, or start anew with tx.init(params)"
    )


def chained(state: Any, parts: int) -> None:
    """The state of a chain must have one for each of its parts."""
    if not isinstance(state, (tuple, list)) or hasattr(state, "_fields") or len(state) != parts:
        raise ValueError(
            f"chain: the state must be a tuple of {parts}, one for each part, got "
            f"{_outline(state)}; use the state of the same chain, or make a new one"
        )


def number_of(name: str, value: Any, options: Sequence[int]) -> None:
    if value not in options:
        raise ValueError(f"{who()}: {name} must be {' or '.join(map(str, options))}, got {value!r}")


def seed(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ValueError(f"{who()}: seed must be an integer from 0 to 2**32 - 1, got {value!r}")


def parameters_given(params: Any) -> None:
    if params is None:
        raise ValueError(
            f"{who()}: needs the parameters, which it rounds; call update(gradients, state, params)"
        )


def no_wider_than_float32(path: tuple[Any, ...], x: Any) -> None:
    """What is kept below a parameter makes it float32: there is nothing to keep below a float64."""
    dtype = getattr(x, "dtype", None)
    if dtype in (jnp.float64, jnp.complex128):
        raise ValueError(
            f"{who()}: {_at('the parameter', path)} is {dtype}, and masters are float32; keep it "
            f"out, e.g. with optax.partition, or make it bfloat16 or float32"
        )


def rest(path: tuple[Any, ...], p: Any, rest: Any, dtype: Any) -> None:
    """What is kept below a parameter must be what init made for it."""
    if dtype is None or p is None:
        return
    narrow = getattr(p, "dtype", None) == jnp.bfloat16
    wanted = np.shape(p) if narrow else (1,) * np.ndim(p)
    if rest is None or rest.shape != wanted or rest.dtype != dtype:
        got = "nothing" if rest is None else f"{rest.dtype}{list(rest.shape)}"
        raise ValueError(
            f"{who()}: below {_at('the parameter', path)}, which is {jnp.result_type(p)}, the "
            f"state keeps {got} where {jnp.dtype(dtype)}{list(wanted)} belongs; its dtype, or "
            f"bits=, was another when init was called: make the state anew"
        )


def as_many(parameters: Sequence[Any], rests: Sequence[Any]) -> None:
    if len(parameters) != len(rests):
        raise ValueError(
            f"{who()}: {len(parameters)} parameters were given, and the state keeps the bits below "
            f"{len(rests)}; pass the parameters that belong to the state"
        )


def nothing_after(exact: Iterable[Any]) -> None:
    """Transformations whose updates are exact must be the last to touch them."""
    for tx in exact:
        raise ValueError(
            f"{who()}: {tx!r} computes updates that land exactly, and nothing may change them; "
            f"put it outermost, e.g. master_weights(chain(clip, adamw))"
        )


def on_explicit_mesh(mesh: Any, tree: Any) -> None:
    """Under jit, arrays must be on a mesh with explicit axes before they can be resharded."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return
    if not jax.sharding.get_abstract_mesh().empty:
        return
    for path, x in leaves_with_path(tree):
        if isinstance(x, Tracer) and jax.typeof(x).sharding.mesh.empty:
            raise ValueError(
                f"{who()}: {_at('the gradient of', path)} must be on the mesh, whose axes are "
                f"explicit, got an array on one device; put the parameters on the mesh, e.g. "
                f"jax.device_put(params, NamedSharding(mesh, PartitionSpec())), or step inside "
                f"jax.set_mesh(mesh)"
            )


def no_mesh(caller: str) -> ValueError:
    return ValueError(
        f"{caller}: the parameters have no shardings; pass arrays or ShapeDtypeStructs that have "
        f"NamedShardings, or PartitionSpecs and their mesh: {caller}(tx, params, specs, mesh)"
    )


def mesh_axis(caller: str, mesh: Any, axis: str) -> None:
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
def needing_extra(what: str) -> Iterator[None]:
    """A missing package is called by its name, with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs {error.name}: pip install "adam_jax[demo]"', name=error.name
        ) from None

"""Checks of arguments, leaves, and states, and the errors that they raise.

A message reads `<function>: <argument or leaf> must be <allowed>, got <value>; <what to do>`.
"""

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
    """Start error messages with this function name; the outermost name wins.

    Works as a decorator and in a `with` statement.
    """
    token = _function.set(name) if _function.get() == "adam_jax" else None
    try:
        yield
    finally:
        if token:
            _function.reset(token)


def value_error(message: str) -> ValueError:
    """Return a ValueError that starts with the name of the function that the user called."""
    return ValueError(f"{_function.get()}: {message}")


def type_error(message: str) -> TypeError:
    """Return a TypeError that starts with the name of the function that the user called."""
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
    """Whether a hyperparameter is a decay rate, judged by its name."""
    return DECAY_RATE.fullmatch(name) is not None


def range_of(name: str) -> Range | None:
    """Return the range of a rule's hyperparameter, judged by its name; None if it has none."""
    return _RANGES.get(name, UNIT if is_decay_rate(name) else None)


def in_range(name: str, value: Any, allowed: Range | None) -> None:
    """Check the range of a Python or NumPy number; other values pass unchecked."""
    if allowed and isinstance(value, (bool, np.bool_)):
        raise type_error(f"{name} must be a number {allowed.text}, got {value}; pass a float")
    if allowed and isinstance(value, NUMBERS) and not allowed.low <= value < allowed.high:
        raise value_error(f"{name} must be {allowed.text}, got {value}")


def hyperparam(name: str, value: Any) -> None:
    """Check the type of a hyperparameter, and its range if it is a number."""
    if value is inspect.Parameter.empty:
        raise type_error(f"{name!r} must be given, got no value; pass {name}=...")
    in_range(name, value, range_of(name))
    if isinstance(value, (*NUMBERS, Decay)):
        return
    if _is_schedule(value):
        schedule(name, value)
    elif not _is_real_array(value):
        raise type_error(f"{name} must be a number, a scalar array, or a schedule, got {value!r}")
    elif value.ndim != 0:
        raise value_error(
            f"{name} must be a scalar, got an array of shape {value.shape}; "
            f"for a value per leaf use adam_jax.groups, for a population jax.vmap"
        )


def schedule(name: str, value: Any) -> None:
    """Check that a schedule takes one argument, the step count."""
    if not _takes(value, 1):
        raise type_error(
            f"{name} must be a number, a scalar array, or a function of the step count, got "
            f"{_shown(value)}, which cannot be called with one argument; "
            f"write lambda count: ..., or call the function that makes the schedule, e.g. "
            f"optax.cosine_decay_schedule(1e-3, 10_000)"
        )


def scheduled(name: str, value: Any) -> None:
    """Check that a schedule returned a scalar."""
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
    """Check that a function given as `storage` takes two arguments, a path and a leaf."""
    if not _takes(function, 2):
        raise type_error(
            f"storage must be a format or a function of two arguments, (path, leaf), got "
            f"{_shown(function)}, which cannot be called with two; write lambda path, leaf: ..."
        )


def mask_function(function: Any) -> None:
    """Check that a function given as a mask takes one argument, a tree."""
    if not _takes(function, 1):
        raise type_error(
            f"the mask must be a tree of bools or a function of one argument, the tree, got "
            f"{_shown(function)}, which cannot be called with one; use e.g. "
            f"adam_jax.not_matching('bias')"
        )


def no_schedule(caller: str, function: Any) -> PyTree:
    """Wrap a storage function: if called like a schedule, it raises our error."""

    @functools.wraps(function)
    def checked(*args: PyTree) -> PyTree:
        if len(args) == 1:
            raise TypeError(
                f"{caller}: storage must be called with a path and a leaf, got a step count: "
                f"optax.inject_hyperparams treats functions as schedules; name it in static_args, "
                f"optax.inject_hyperparams({caller}, static_args=('storage',))"
            )
        return function(*args)

    return checked


def _takes(function: Any, number: int) -> bool:
    """Whether a function takes this many positional arguments; True if unknown."""
    signature = _signature(function, follow_wrapped=False)
    if signature is None:
        return True
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True


def _signature(function: Any, *, follow_wrapped: bool = True) -> inspect.Signature | None:
    """Return a function's signature; None if it has none, as some built-in functions."""
    try:
        return inspect.signature(function, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return None


def _shown(value: Any) -> str:
    """Return a short text for a value: its repr, its name, or its type."""
    if value is None or isinstance(value, (*NUMBERS, str)):
        return repr(value)
    if callable(value) and hasattr(value, "__name__"):
        return f"the {'class' if isinstance(value, type) else 'function'} {name_of(value)}"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def name_of(function: Any) -> str:
    """Return a function's name, or its type's name if it has none (functools.partial)."""
    return getattr(function, "__name__", type(function).__name__)


def is_transformation(value: Any) -> bool:
    """Whether a value has `init` and `update`, like an Optax transformation of any class."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def transformation(name: str, value: Any, usage: str) -> None:
    """Check that a wrapper was given a transformation; `usage` is the correct call."""
    if is_transformation(value):
        return
    got, fix = _shown(value), f"call {usage}"
    if isinstance(value, (list, tuple)) and any(map(is_transformation, value)):
        fix = "pass its elements as separate arguments, e.g. adam_jax.chain(clip, adamw)"
    elif hasattr(value, "__name__"):  # models are callable, but have no __name__
        signature = _signature(value)
        first = next(iter(signature.parameters), "") if signature else ""
        arguments = "1e-3" if first == "learning_rate" else "..."
        fix = f"call it first, e.g. {name_of(value)}({arguments})"
    raise type_error(f"{name} must be an Optax transformation, got {got}; {fix}")


def constructor(value: Any, usage: str) -> None:
    """Check that a constructor was given, not the transformation that it returns."""
    if not callable(value):
        got = "a transformation" if is_transformation(value) else _shown(value)
        raise type_error(
            f"constructor must be a function that makes a transformation, got {got}; "
            f"pass the function and its arguments separately, {usage}"
        )


def mapping(name: str, value: Any, usage: str) -> None:
    if not isinstance(value, Mapping):
        got = repr(value) if isinstance(value, (list, tuple, str)) else _shown(value)
        raise type_error(f"{name} must be a mapping, got {got}; write {usage}")


def torch_state(value: Any) -> None:
    """Check for the two keys of a PyTorch optimizer's state dict, which a model's lacks."""
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
    """Bind the arguments of a call to their names."""
    try:
        signature.bind_partial(*args, **kwargs)  # names an unknown argument before a missing one
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise type_error(f"{error}; its arguments are {', '.join(signature.parameters)}") from None


def a_rule(caller: str, rule: Any, kind: type) -> None:
    if not isinstance(rule, kind):
        raise TypeError(
            f"{caller}: rule must be a declared rule, got {rule!r}; declare one with "
            f"@adam_jax.rule, or use one from adam_jax.rules"
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
                f"hyperparameters must be among {', '.join(known) or 'none'}, got {name!r}"
            )


def leaf(what: str, path: KeyPath, x: PyTree) -> None:
    """Check that a leaf is a floating-point or complex array, or a Python number."""
    dtype = getattr(x, "dtype", None)
    if isinstance(x, (int, float, complex)) and not isinstance(x, bool):
        return
    if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
        return
    kind = "a PRNG key" if _is_key(dtype) else f"type {dtype or type(x).__name__}"
    raise type_error(
        f"{_at(what, path)} must be floating point or complex, got {kind}; exclude it "
        f"from the optimizer, e.g. with optax.masked or optax.partition, or make it a float"
    )


def _is_key(dtype: PyTree) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _at(what: str, path: KeyPath) -> str:
    """Return e.g. "the gradient of 'l1/kernel'"; a tree of one leaf has no path to name."""
    return f"{what} {path_string(path)!r}" if path else what.removesuffix(" of")


def _equal_shapes(path: KeyPath, gradient: PyTree, what: str, other: PyTree) -> None:
    if not isinstance(other, (*NUMBERS, complex)) and not hasattr(other, "shape"):
        raise value_error(
            f"{_at('the gradient of', path)} is one array, but its {what} is a "
            f"{type(other).__name__}; pass the tree that init was given"
        )
    if np.shape(gradient) != np.shape(other):
        raise value_error(
            f"{_at('the gradient of', path)} must have the shape of its {what}, {np.shape(other)}, "
            f"got {np.shape(gradient)}; nothing is broadcast"
        )


def _leading_shape(path: KeyPath, gradient: PyTree, name: str, stored: PyTree) -> None:
    shape = np.shape(stored)
    if shape != np.shape(gradient)[: len(shape)]:
        raise value_error(
            f"{_at(f'{name} of', path)} must be one number, or one for each entry of the leaf's "
            f"first axes, got shape {shape} for a gradient of shape {np.shape(gradient)}; pass the "
            f"state that init returned"
        )


def moment(path: KeyPath, gradient: PyTree, name: str, declared: Moment, stored: PyTree) -> None:
    """Check that a stored moment fits the gradient of its leaf."""
    if stored is None:
        raise value_error(
            f"{_at('the parameter', path)} has a gradient but no {name} in the state: "
            f"it was None when init was called; call init again"
        )
    if declared.one_per_leaf:
        _leading_shape(path, gradient, name, stored)
        return
    _equal_shapes(path, gradient, name, stored)
    if declared.signed and jnp.iscomplexobj(gradient) and not jnp.iscomplexobj(stored):
        raise value_error(
            f"{_at(f'{name} of the complex leaf', path)} must have a complex dtype, got "
            f"{stored.dtype}, which drops the imaginary part; don't set its dtype"
        )


def scales(path: KeyPath, name: str, codes: PyTree, scales: PyTree, block: int) -> None:
    """Check that a quantized moment has one scale per block of its format."""
    wanted = (*codes.shape[:-1], -(-codes.shape[-1] // block))
    if scales.shape != wanted:
        raise value_error(
            f"{_at(f'{name} of', path)} must have scales of shape {wanted} for codes of shape "
            f"{codes.shape} in blocks of {block}, got {scales.shape}: the state was written with "
            f"another block size; call init again, or restore it with the version that wrote it"
        )


def parameter(
    path: KeyPath, gradient: PyTree, p: PyTree, rules: Sequence[Rule], applied: bool
) -> None:
    """Check that a parameter has its gradient's shape, and is given if it is needed."""
    if p is None and not rules and not applied:
        return
    if p is None:
        needed_by = "apply" if applied else rules[0].name
        if rules and "weight_decay" in rules[0].hyperparams:
            needed_by = "weight_decay"
        call = "apply(tx, grads, state, params)" if applied else "update(gradients, state, params)"
        raise value_error(
            f"{needed_by} needs the parameters, got none for {_at('the gradient of', path)}; "
            f"call {call}"
        )
    _equal_shapes(path, gradient, "parameter", p)


def returned(rule: Rule, out: PyTree) -> None:
    """Check that a rule returned a tuple: its direction, its moments, and a dict of its totals."""
    totals = ("{" + ", ".join(rule.totals) + "}",) if rule.totals else ()
    wanted = ("direction", *rule.moments, *totals)
    if not isinstance(out, tuple) or len(out) != len(wanted):
        got = "one array" if hasattr(out, "dtype") else f"a {type(out).__name__}"
        got = f"{len(out)} values" if isinstance(out, tuple) else got
        raise ValueError(
            f"rule {rule.name}: must return the tuple ({', '.join(wanted)}), got {got}"
        )
    if rule.totals and not (isinstance(out[-1], dict) and out[-1].keys() == set(rule.totals)):
        raise ValueError(
            f"rule {rule.name}: the last value must be a dict of arrays with the keys "
            f"{', '.join(rule.totals)}, got {out[-1]!r}"
        )


def start(name: str, leaf: PyTree, x: PyTree) -> None:
    """Check the shape of a moment's start, if it is a function of the parameter."""
    if jnp.shape(x) != jnp.shape(leaf):
        raise value_error(
            f"{name}: the start must have the parameter's shape {jnp.shape(leaf)}, got "
            f"{jnp.shape(x)}; return an array like the parameter, or declare .per_leaf()"
        )


def scalars(rule: Rule, new: PyTree) -> None:
    """Check what a rule's `update_scalars` returned: a dict with a scalar for each name."""
    named = isinstance(new, dict) and new.keys() == rule.scalars.keys()
    if not named or any(x is None or jnp.shape(x) != () for x in new.values()):
        raise value_error(
            f"rule {rule.name}: update_scalars must return a dict of scalars with the keys "
            f"{', '.join(rule.scalars)}, got {new!r}"
        )


def outputs(rule: Rule, u: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array]) -> None:
    """Check the shapes and dtypes of a rule's direction, moments, and arrays to sum."""
    named = list(zip(("direction", *rule.moments), (u, *old), new, strict=False))
    named += [(name, jnp.real(u), new[-1][name]) for name in rule.totals]
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
    """Return the error for gradients whose tree structure doesn't match `what`."""
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
    """Check that a state has the fields of the state that this optimizer's init returns."""
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
        f"the state must be {made if bare else f'({made})'}, as init returns it, got "
        f"{_outline(state)}; pass the state of this optimizer; restore a checkpoint into the init "
        f"of the optimizer that wrote it, and convert a state of other settings with "
        f"convert_state(state, tx, params)"
    )


def made_by_init(state: PyTree, expected: type) -> None:
    """Check that a wrapper was given the state that its init returns."""
    if getattr(state, "_fields", None) != getattr(expected, "_fields", ()):
        raise value_error(
            f"the state must be {expected.__name__}, as init returns it, got {_outline(state)}; "
            f"pass the state of this optimizer; restore a checkpoint into its init, and convert "
            f"another optimizer's state with convert_state(state, tx, params)"
        )


def _outline(state: PyTree) -> str:
    if type(state) is tuple:
        return f"({', '.join(map(_outline, state))})"
    if isinstance(state, optax.MaskedState):
        return f"MaskedState({_outline(state.inner_state)})"
    return type(state).__name__


def mask(given: PyTree, gradients: PyTree, *, no_tree: bool = False) -> Exception:
    """Return the error for a mask that isn't a tree of bools or a prefix of the gradients."""
    error = type_error if no_tree else value_error
    has_arrays = any(hasattr(x, "shape") for x in jax.tree.leaves(given))
    got = jax.tree.structure(given) if has_arrays else repr(given)
    return error(
        f"the mask must be a tree of bools with the gradients' structure "
        f"{jax.tree.structure(gradients)}, a prefix of it, or a function that returns one, got "
        f"{got} as the tree or the function's result; use e.g. adam_jax.not_matching('bias')"
    )


def no_step_count(name: str, state: type) -> None:
    raise value_error(
        f"{name} cannot be a schedule, because {state.__name__} has no step count; "
        f"give a number, or wrap the constructor in optax.inject_hyperparams"
    )


def one_mask(mask: PyTree, weight_decay_mask: PyTree) -> PyTree:
    if mask is not None and weight_decay_mask is not None:
        raise value_error(
            "mask and weight_decay_mask are two names of one argument; give one of them"
        )
    return weight_decay_mask if mask is None else mask


def only_eps(eps_root: PyTree, nesterov: bool) -> None:
    # Arrays pass: inject_hyperparams makes the default 0 an array.
    if nesterov or callable(eps_root) or (isinstance(eps_root, NUMBERS) and eps_root != 0):
        raise value_error(
            f"eps_hat=True takes neither eps_root nor nesterov, got eps_root={eps_root}, "
            f"nesterov={nesterov}; leave out eps_hat or the others"
        )


def not_a_direction(wrapper: str, text: str) -> None:
    name = "tx"
    fix = f"optax.chain({wrapper}(adam_jax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))"
    if wrapper == "cautious":
        fix += ", or give the constructor cautious=True"
    if wrapper == "hyperball":
        name, fix = "direction", "hyperball(adam_jax.scale_by_adam(), 1e-3)"
    raise ValueError(
        f"{wrapper}: the updates of {name} must point along the gradient, got an optimizer, "
        f"{text}, whose updates point against it; wrap the direction instead: {fix}"
    )


def not_one(caller: str, what: str, found: int) -> None:
    raise ValueError(
        f"{caller}: state must have one {what}, got {found}; pass the state of one optimizer"
    )


def mask_without_decay(weight_decay: PyTree, mask: PyTree) -> None:
    if weight_decay is None and mask is not None:
        raise value_error("weight_decay_mask needs weight_decay, which is None; give weight_decay=")


def above_zero(name: str, value: Any) -> None:
    if isinstance(value, NUMBERS) and not value > 0:
        raise value_error(f"{name} must be > 0, got {value}")


def at_least(low: int, name: str, value: Any) -> None:
    if isinstance(value, NUMBERS) and not value >= low:
        raise value_error(f"{name} must be >= {low}, got {value}")


def integer_at_least(low: int, name: str, value: Any) -> None:
    if not _is_integer(value) or value < low:
        raise value_error(f"{name} must be an integer >= {low}, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def not_a_schedule(name: str, value: Any, because: str = " here") -> None:
    if callable(value):
        raise value_error(f"{name} cannot be a schedule{because}; give a number")


def no_derivative(because: str) -> TypeError:
    """Return the error for differentiating an update that has no derivative."""
    return TypeError(
        f"adam_jax: the update has no derivative, because its state {because}; to "
        f"differentiate it, use storage='float32' and implementation='xla'"
    )


def not_convertible(moments: Iterable[Sequence[str]], why: str) -> None:
    named = "; ".join(", ".join(names) for names in moments)
    raise value_error(
        f"cannot convert the moments {named}, {why}; both states must belong to one variant and to "
        f"the same parameters; restore a checkpoint into the init of the optimizer that wrote it, "
        f"or use tx.init(params)"
    )


def chained(state: PyTree, parts: int) -> None:
    """Check that the state of a chain is a tuple with one state per part."""
    if not isinstance(state, (tuple, list)) or hasattr(state, "_fields") or len(state) != parts:
        raise ValueError(
            f"chain: the state must be a tuple of {parts}, one per part, got {_outline(state)}; "
            f"pass the state of this chain, or call init again"
        )


def number_of(name: str, value: Any, options: Sequence[int]) -> None:
    if value not in options:
        raise value_error(f"{name} must be {' or '.join(map(str, options))}, got {value!r}")


def seed(value: Any) -> None:
    if not _is_integer(value) or not 0 <= value < 2**32:
        raise value_error(f"seed must be an integer from 0 to 2**32 - 1, got {value!r}")


def both_given(grads: PyTree, params: PyTree) -> None:
    """Check that neither tree is missing. If params are one leaf, it may have no gradient."""
    missing = "params" if params is None and grads is not None else None
    if grads is None and params is not None and not jax.tree_util.all_leaves([params]):
        missing = "grads"
    if missing:
        raise value_error(
            f"{missing} must be given, got None; call apply(tx, grads, state, params)"
        )


def parameters_given(params: PyTree) -> None:
    if params is None:
        raise value_error(
            "params must be given, because they are rounded; call update(gradients, state, params)"
        )


def no_wider_than_float32(path: KeyPath, x: PyTree) -> None:
    """Check that a parameter is no wider than its float32 master."""
    dtype = getattr(x, "dtype", None)
    if dtype in (jnp.float64, jnp.complex128):
        raise value_error(
            f"{_at('the parameter', path)} must be no wider than its float32 master, got {dtype}; "
            f"exclude it, e.g. with optax.partition, or make it bfloat16 or float32"
        )


def residual(path: KeyPath, p: PyTree, rest: PyTree, dtype: PyTree) -> None:
    """Check that a residual has the shape and dtype that init gave it."""
    if dtype is None or p is None:
        return
    narrow = getattr(p, "dtype", None) == jnp.bfloat16
    wanted = np.shape(p) if narrow else (1,) * np.ndim(p)
    if rest is None or rest.shape != wanted or rest.dtype != dtype:
        got = "nothing" if rest is None else f"{rest.dtype}{list(rest.shape)}"
        raise value_error(
            f"the residual of {_at('the parameter', path)}, which is {jnp.result_type(p)}, must be "
            f"{jnp.dtype(dtype)}{list(wanted)}, got {got}: the parameter's shape or dtype, or "
            f"bits=, has changed since init; call init again, and add updates by "
            f"optax.apply_updates or adam_jax.apply, which keep dtypes"
        )


def as_many(parameters: Sequence[PyTree], rests: Sequence[PyTree]) -> None:
    if len(parameters) != len(rests):
        raise value_error(
            f"params must have {len(rests)} leaves, one per residual in the state, got "
            f"{len(parameters)}; pass the parameters that belong to the state"
        )


def nothing_after(exact: Iterable[optax.GradientTransformation]) -> None:
    """Raise for transformations whose exact updates a later part would change."""
    for tx in exact:
        raise value_error(
            f"{tx!r} computes exact updates, which no later part may change; put it outermost, "
            f"e.g. master_weights(chain(clip, adamw))"
        )


def on_explicit_mesh(mesh: PyTree, tree: PyTree) -> None:
    """Check that traced arrays are on the mesh if its axes are explicit: JAX can't move them."""
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
        f"{caller}: params must have NamedShardings, got none; pass sharded arrays or "
        f"ShapeDtypeStructs, or PartitionSpecs and their mesh: {caller}(tx, params, specs, mesh)"
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
    """Name a missing package and the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs {error.name}: pip install "adam_jax[demo]"', name=error.name
        ) from None


def requires(function: Any, number: int) -> bool:
    """Whether a function has *args, or at least `number` positional parameters without defaults."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) >= number


def layers_of_state(count: int, leaves: Iterable[PyTree]) -> None:
    """Check that the layers' state has as many layers as the parameters."""
    for x in leaves:
        if np.shape(x)[:1] != (count,):
            raise value_error(
                f"the state must have as many layers as params, {count}, got a leaf of shape "
                f"{np.shape(x)}; call step.init(params)"
            )


def layered(params: Any) -> None:
    """Check that parameters have an outer part, and layers that are stacked along axis 0."""
    form = '{"outer": ..., "layers": leaves stacked along axis 0}'
    if not isinstance(params, dict) or params.keys() != {"outer", "layers"}:
        got = f"the keys {list(params)}" if isinstance(params, dict) else _shown(params)
        raise value_error(f"params must be {form}, got {got}")
    for part in ("outer", "layers"):
        leaves = leaves_with_path({part: params[part]})
        if not leaves:
            raise value_error(f"params[{part!r}] must have a leaf, got none; params must be {form}")
        for path, x in leaves:
            if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
                raise value_error(
                    f"{_at('the parameter', path)} must be floating-point or complex, got "
                    f"{jnp.result_type(x)}; pass other arrays as shared="
                )
    sizes = {np.shape(x)[:1]: path for path, x in leaves_with_path({"layers": params["layers"]})}
    if len(sizes) > 1 or () in sizes:
        listed = ", ".join(f"{path_string(path)}: {list(n)}" for n, path in sizes.items())
        raise value_error(
            f"the leaves of params['layers'] must have the same size along axis 0, the number of "
            f"layers, got {listed}; move other leaves to params['outer']"
        )


def floating(what: str, tree: PyTree) -> None:
    """Check that all leaves of a tree are floating-point, so that they have gradients."""
    for path, x in leaves_with_path(tree):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise value_error(
                f"{what} must be floating-point, got {x.dtype} at {path_string(path)!r}; pass "
                f"other arrays as shared="
            )


def loss(x: Any) -> None:
    """Check that a loss is a floating-point scalar."""
    if not hasattr(x, "dtype") or x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        got = f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else _shown(x)
        raise value_error(
            f"the result of last must be a floating-point scalar, got {got}; for further results, "
            f"pass has_aux=True and return (loss, aux)"
        )


def with_auxiliary_loss(out: Any, h: PyTree) -> None:
    """Check that the result of a layer is a pair (h, auxiliary loss)."""
    pair = isinstance(out, tuple) and len(out) == 2
    if not pair or jax.tree.structure(out[0]) != jax.tree.structure(h) or np.shape(out[1]):
        raise value_error(
            f"the result of layer must be h, with the structure {jax.tree.structure(h)}, or (h, "
            f"auxiliary loss), got {jax.tree.structure(out)}"
        )


def same_types(what: str, new: PyTree, old: PyTree) -> None:
    """Check that the leaves of two trees have equal shapes and dtypes."""
    for (path, x), y in zip(leaves_with_path(new), jax.tree.leaves(old), strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise value_error(
                f"{what} must have the shape and dtype of its input h, {y.dtype}{list(y.shape)}, "
                f"got {x.dtype}{list(x.shape)} at {path_string(path)!r}; cast it"
            )


def microbatches(k: int, h: PyTree) -> None:
    """Check that axis 0 of all leaves divides into k microbatches."""
    for path, x in leaves_with_path(h):
        if x.ndim == 0 or x.shape[0] % k:
            raise value_error(
                f"microbatches must divide axis 0 of h, got microbatches={k} and the shape "
                f"{list(x.shape)} at {path_string(path)!r}; choose a divisor"
            )

"""Running states from elsewhere: another optimizer's, another storage format's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import storage
from adam_jax._engine import split_params
from adam_jax._engine.state import moment_fields, moments, named_tuples, state_class
from adam_jax._engine.transformation import parts
from adam_jax._util import errors
from adam_jax._util.numerics import abs_sq, arithmetic_dtype
from adam_jax._util.paths import leaves_with_path, path_string

TORCH_FIELDS = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "exp_inf": "nu",
    "max_exp_avg_sq": "nu_max",
    "square_avg": "nu",
    "grad_avg": "mu",
    "momentum_buffer": "trace",
}
"""PyTorch's names for moments, and ours."""

COUNTS = ("count", "t", "step_count")


def from_torch(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: optax.Params,
    mapping: Sequence[str] | Callable[[Any, np.ndarray], tuple[str, np.ndarray]] | None = None,
) -> chex.ArrayTree:
    """The state of a PyTorch optimizer, as `tx` keeps it: to go on in JAX where PyTorch stopped.

    The same variant and hyperparameters continue the run: torch.optim.Adam's is `adam`, AdamW's
    `adamw`, Adam's with amsgrad=True `amsgrad(max_of="raw")`, Adamax's `adamax`, RAdam's `radam`
    (PyTorch's ε stands elsewhere), NAdam's `nadam(momentum_decay=0.004)`, SGD's `sgd(momentum=)`.
    PyTorch itself is not needed: a state dict is a mapping of arrays.

    Args:
      state_dict: `optimizer.state_dict()`.
      tx: the optimizer to go on with.
      params: the parameters in JAX.
      mapping: where each of PyTorch's parameters is: their paths in PyTorch's order, such as
        ["dense/kernel", "dense/bias"]; or a function from a parameter's name (its number, where the
        dict has no names) and its moment to its path and the moment as JAX has it, such as
        `flax_names(params)`. None: the names in the dict, with / for each dot.

    Returns:
      a state for `tx`.

    Raises:
      ValueError: a parameter has no counterpart or another shape, in either direction, the moments
        are not those of tx, or parameters have made different numbers of steps.

    >>> import adam_jax, jax.numpy as jnp, numpy as np
    >>> moments = {"step": 3, "exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
    >>> state_dict = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
    >>> state = from_torch(state_dict, adam_jax.adamw(1e-3), {"w": jnp.ones(2)}, ["w"])
    >>> int(adam_jax.step_count(state))
    3
    """
    with errors.naming("from_torch"):
        errors.torch_state(state_dict)
        errors.transformation("tx", tx, "from_torch(state_dict, tx, params)")
    shapes = {path_string(p): jnp.shape(x) for p, x in leaves_with_path(params)}
    order = [i for group in state_dict["param_groups"] for i in group["params"]]
    names = [n for group in state_dict["param_groups"] for n in group.get("param_names", ())]
    names = names or order
    if mapping is None and names is order:
        raise ValueError(
            "from_torch: the state dict has no param_names; give mapping=, the paths in PyTorch's "
            f"order, out of {', '.join(shapes)}"
        )
    if isinstance(mapping, Sequence) and len(mapping) != len(order):
        raise ValueError(
            f"from_torch: mapping has {len(mapping)} paths for {len(order)} parameters in PyTorch"
        )
    found: dict[str, dict[str, Any]] = {}
    steps = set()
    for k, (index, name) in enumerate(zip(order, names, strict=True)):
        entry = state_dict["state"].get(index, {})
        steps.update(int(_array(entry["step"])) for _ in range("step" in entry))
        for field, moment in TORCH_FIELDS.items():
            if entry.get(field) is None:
                continue
            x = _array(entry[field])
            if callable(mapping):
                path, x = mapping(name, x)
            else:
                path = mapping[k] if mapping is not None else str(name).replace(".", "/")
            if shapes.get(path) != x.shape:
                raise ValueError(
                    f"from_torch: {field} of PyTorch's {name!r} has shape {x.shape}, and {path!r} "
                    + (f"has {shapes[path]}" if path in shapes else f"is not in {list(shapes)}")
                    + "; give a mapping that names and transposes it, e.g. flax_names(params)"
                )
            found.setdefault(moment, {})[path] = jnp.asarray(x)
    if len(steps) > 1:
        raise ValueError(f"from_torch: parameters have made different numbers of steps: {steps}")
    count = jnp.int32(max(steps, default=0))
    given = state_class(tuple(found), True)(count=count, **found)
    with errors.naming("from_torch"):
        fresh = tx.init(params)
        given = _recentered(given, {_kind(s) for _, s in named_tuples(fresh)})
        donors: dict[Any, list[Any]] = {_kind(given): [given]}
        converted = _convert(fresh, donors, count, _maxima(tx))
        if found and donors[_kind(given)]:
            errors.not_convertible([sorted(found)], "which tx does not keep")
        return converted


def flax_names(params: optax.Params) -> Callable[[str, np.ndarray], tuple[str, np.ndarray]]:
    """A `mapping` for `from_torch`: PyTorch's names and layouts to those of Flax.

    "layers.0.weight" becomes "layers/0/kernel", "/embedding" or "/scale", whichever is among the
    parameters; Linear's and Conv's kernels are transposed to Flax's (inputs before outputs).

    Args:
      params: the parameters in JAX, Linen's or NNX's.
    """
    paths = {path_string(p) for p, _ in leaves_with_path(params)}

    def mapping(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
        path = str(name).replace(".", "/")
        stem = path.removesuffix("/weight")
        if stem + "/kernel" in paths:
            return stem + "/kernel", np.transpose(x, (*range(2, x.ndim), 1, 0))
        known = [stem + end for end in ("/embedding", "/scale") if stem + end in paths]
        return (known[0] if known else path), x

    return mapping


def _array(x: Any) -> np.ndarray:
    """A tensor or number as a NumPy array; PyTorch's bfloat16 as float32."""
    for name in ("detach", "cpu", "float"):
        x = getattr(x, name)() if hasattr(x, name) else x
    return np.asarray(x)


def convert_state(
    state: chex.ArrayTree, tx: optax.GradientTransformation, params: optax.Params
) -> chex.ArrayTree:
    """A running state in the formats and the layout of `tx`: to go on with it from there.

    From float32 to int8 or back, out of another chain or `optax.inject_hyperparams`, from Optax's
    optimizer to ours of the same variant: moments are found by their names, decoded, and encoded as
    `tx` keeps them, to the nearest. Step counts are taken over; what `tx` has beside them and the
    state has too (Schedule-Free's z, a chain's other states) is copied, and the rest starts anew.

    Args:
      state: the state of a running optimizer, Optax's or ours, or `nnx.Optimizer.opt_state`.
      tx: the optimizer to go on with.
      params: the parameters, or anything of their structure, shapes and dtypes.

    Returns:
      a state for `tx`.

    Raises:
      ValueError: the moments are not those of `tx`, or have other shapes; says which.

    >>> import adam_jax, jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones((64, 128))}
    >>> running = optax.adamw(1e-3).init(params)
    >>> tx = adam_jax.adamw(1e-3, storage="int8")
    >>> convert_state(running, tx, params)[0].mu.codes["w"].dtype
    dtype('int8')
    """
    with errors.naming("convert_state"):
        errors.transformation("tx", tx, "convert_state(state, tx, params)")
        fresh = tx.init(params)
        donors: dict[Any, list[Any]] = {}
        kinds = {_kind(s) for _, s in named_tuples(fresh)}
        for _, s in named_tuples(state):
            s = _recentered(s, kinds)
            donors.setdefault(_kind(s), []).append(s)
        converted = _convert(fresh, donors, _any_count(state), _maxima(tx))
        left = [kind for kind, unused in donors.items() if unused and isinstance(kind, frozenset)]
        if left:
            errors.not_convertible(map(sorted, left), "which tx does not keep")
        return converted


def _recentered(s: Any, wanted: set[Any]) -> Any:
    """Return centered RMSprop's moments as they are wanted: with nu, or the variance nu - mu²."""
    kind, forms = _kind(s), (frozenset({"mu", "nu"}), frozenset({"mu", "variance"}))
    if kind not in forms or kind in wanted or not wanted.intersection(forms):
        return s
    old, new, sign = ("nu", "variance", -1) if kind == forms[0] else ("variance", "nu", 1)
    values = moments(s)
    other = jax.tree.map(lambda m, v: v + sign * abs_sq(m), values["mu"], values[old])
    counted = _any_count(s)
    fields = {"mu": values["mu"], new: other} | ({} if counted is None else {"count": counted})
    return state_class(("mu", new), counted is not None)(**fields)


def _kind(s: Any) -> Any:
    """What makes two states one transformation's: the names of their moments, or their class."""
    return frozenset(moment_fields(s)) or type(s)


def _maxima(tx: Any) -> set[str]:
    """Return the names of the moments of `tx` that are no averages."""
    declared = [item for link in parts(tx) for item in link.rule.moments.items()]
    return {name for name, moment in declared if not moment.average}


def _convert(node: Any, donors: dict[Any, list[Any]], steps: Any, maxima: Collection[str]) -> Any:
    """A fresh state, or a container of some, with what the donors have in its place."""
    if not hasattr(node, "_fields"):
        if isinstance(node, (tuple, list)):
            return type(node)(_convert(x, donors, steps, maxima) for x in node)
        if isinstance(node, dict):
            return {k: _convert(x, donors, steps, maxima) for k, x in node.items()}
        return node
    kind = _kind(node)
    donor = donors[kind].pop(0) if donors.get(kind) else None
    if donor is None and isinstance(kind, frozenset):
        errors.not_convertible([sorted(kind)], "which the state does not have")
    new = {}
    for name in node._fields:
        mine = getattr(node, name)  # a tuple has a method count
        given = getattr(donor, name) if name in getattr(donor, "_fields", ()) else None
        if name in moment_fields(node):
            new[name] = _moment(name, given, mine, name not in maxima)
        elif name in COUNTS:
            given = steps if given is None else jax.tree.leaves(given)[0]
            new[name] = mine if given is None else jnp.asarray(given, mine.dtype)
        elif named_tuples(mine) or given is None:
            new[name] = _convert(mine, donors, steps, maxima)
        else:
            new[name] = _moment(name, given, mine, name not in maxima)
    return type(node)(**new)


def _moment(name: str, given: Any, mine: Any, average: bool) -> Any:
    """A moment's values, read from one state, as another keeps them."""
    theirs, ours = storage.leaves(given), storage.leaves(mine)
    if set(theirs) != set(ours):
        missing, extra = (
            [path for path, _ in sorted(a - b)[:5]]
            for a, b in ((set(ours), set(theirs)), (set(theirs), set(ours)))
        )
        errors.not_convertible(
            [[name]], f"for other parameters: without {missing}, and beside them {extra}"
        )
    new = []
    for key, old in ours.items():
        x, shape = theirs[key], jnp.shape(storage.codes_of(old))
        if jnp.shape(storage.codes_of(x)) != shape:
            got = jnp.shape(storage.codes_of(x))
            errors.not_convertible([[name]], f"of {key[0]!r} in shape {got} where tx has {shape}")
        new.append(_recode(name, average, x, old))
    return storage.with_leaves(mine, new)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _recode(name: str, average: bool, x: Any, like: Any) -> Any:
    kept_in = getattr(like, "dtype", jnp.float32)
    if name == "rest" and jnp.issubdtype(kept_in, jnp.integer):  # below master weights' parameters
        return split_params.rest_as(x, like.dtype)
    dtype = arithmetic_dtype(*storage.dtypes((x, like)))
    return storage.encode(storage.decode(x, dtype), like, None, average=average)


def _any_count(state: Any) -> Any:
    """The first step count in a state; None where there is none."""
    for _, s in named_tuples(state):
        for name in COUNTS:
            if name in getattr(s, "_fields", ()):
                return jax.tree.leaves(getattr(s, name))[0]
    return None

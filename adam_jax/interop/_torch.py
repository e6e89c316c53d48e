"""Conversion of the states of PyTorch optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._engine.state import state_class
from adam_jax._util import errors
from adam_jax._util.paths import leaves_with_path, path_string
from adam_jax._util.typing import PyTree
from adam_jax.interop._convert import convert_state

TORCH_FIELDS = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "exp_inf": "nu",
    "max_exp_avg_sq": "nu_max",
    "square_avg": "nu",
    "grad_avg": "mu",
    "momentum_buffer": "trace",
}
"""PyTorch's moment names, mapped to ours."""


def from_torch(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: optax.Params,
    mapping: Sequence[str] | Callable[[Any, np.ndarray], tuple[str, np.ndarray]] | None = None,
) -> PyTree:
    """Convert a PyTorch optimizer's state to a state of `tx`, to continue its run in JAX.

    Use the same variant and hyperparameters: `adam` for torch.optim.Adam, `adamw` for AdamW,
    `amsgrad(max_of="raw")` for Adam with amsgrad=True, `adamax` for Adamax, `radam` for RAdam
    (PyTorch adds its ε elsewhere), `nadam(momentum_decay=0.004)` for NAdam, `sgd(momentum=)` for
    SGD. PyTorch need not be installed: a state dict is a mapping of arrays.

    Args:
      state_dict: `optimizer.state_dict()`.
      tx: the optimizer that continues the run.
      params: the parameters in JAX.
      mapping: the JAX path of each PyTorch parameter, in PyTorch's order, e.g.
        ["dense/kernel", "dense/bias"]. Or a function that takes a parameter's name (its number if
        the dict has no names) and a moment, and returns the path and the moment in JAX's layout,
        e.g. `flax_names(params)`. None uses the dict's names, with dots replaced by /.

    Returns:
      a state for `tx`.

    Raises:
      ValueError: parameters differ in path, shape, or number of steps, or `tx` has other moments.

    >>> import adam_jax, jax.numpy as jnp, numpy as np
    >>> moments = {"step": 3, "exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
    >>> state_dict = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
    >>> state = from_torch(state_dict, adam_jax.adamw(1e-3), {"w": jnp.ones(2)}, ["w"])
    >>> int(adam_jax.step_count(state))
    3
    """
    with errors.error_context("from_torch"):
        errors.torch_state(state_dict)
        errors.transformation("tx", tx, "from_torch(state_dict, tx, params)")
    shapes = {path_string(p): jnp.shape(x) for p, x in leaves_with_path(params)}
    groups = state_dict["param_groups"]
    order = [index for group in groups for index in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    if mapping is None and not names:
        raise ValueError(
            "from_torch: mapping must be given if the state dict has no param_names; pass paths "
            f"in PyTorch's order as mapping=, from {', '.join(shapes)}"
        )
    is_list = isinstance(mapping, Sequence) and not isinstance(mapping, str)
    if not (mapping is None or callable(mapping) or is_list):
        raise TypeError(
            f"from_torch: mapping must be a list of paths or a function, got {mapping!r}; pass "
            f"paths in PyTorch's order, from {', '.join(shapes)}"
        )
    fix = "pass a mapping that renames and transposes it, e.g. flax_names(params)"
    if callable(mapping) and not names:
        fix = (
            "the state dict has no param_names: pass paths in PyTorch's order as mapping=, or make "
            "PyTorch's optimizer from model.named_parameters()"
        )
    names = names or order
    paths = [str(name).replace(".", "/") for name in names]
    if isinstance(mapping, Sequence):
        paths = mapping
        if len(paths) != len(order):
            raise ValueError(
                f"from_torch: mapping has {len(paths)} paths, but PyTorch has {len(order)} "
                f"parameters; give one path for each"
            )
    moments: dict[str, dict[str, jax.Array]] = {}
    steps: set[int] = set()
    for index, name, path in zip(order, names, paths, strict=True):
        entry = state_dict["state"].get(index, {})
        if "step" in entry:
            steps.add(int(_to_numpy(entry["step"])))
        for field, moment in TORCH_FIELDS.items():
            if entry.get(field) is None:
                continue
            x = _to_numpy(entry[field])
            if callable(mapping):
                path, x = mapping(name, x)
            if shapes.get(path) != x.shape:
                if is_list and path not in shapes:
                    fix = "correct the path in mapping"
                raise ValueError(
                    f"from_torch: {field} of PyTorch's {name!r} has shape {x.shape}, but {path!r} "
                    + (f"has {shapes[path]}" if path in shapes else f"is not in {list(shapes)}")
                    + f"; {fix}"
                )
            moments.setdefault(moment, {})[path] = jnp.asarray(x)
    if len(steps) > 1:
        raise ValueError(
            f"from_torch: parameters must have made equal numbers of steps, got {steps}"
        )
    count = jnp.int32(max(steps, default=0))
    state = state_class(tuple(moments), counted=True)(count=count, **moments)
    with errors.error_context("from_torch"):
        return convert_state(state, tx, params)


def flax_names(params: optax.Params) -> Callable[[str, np.ndarray], tuple[str, np.ndarray]]:
    """Return a `mapping` for `from_torch` from PyTorch's names and layouts to Flax's.

    "layers.0.weight" becomes "layers/0/kernel", "/embedding", or "/scale", whichever `params` has.
    Linear and Conv kernels are transposed to Flax's layout (inputs before outputs).

    Args:
      params: the JAX parameters, from Linen or NNX.
    """
    paths = {path_string(p) for p, _ in leaves_with_path(params)}

    def mapping(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
        path = str(name).replace(".", "/")
        stem = path.removesuffix("/weight")
        for suffix in ("/kernel", "/embedding", "/scale"):
            if stem + suffix in paths:
                axes = (*range(2, x.ndim), 1, 0) if suffix == "/kernel" else None
                return stem + suffix, x.transpose(axes) if axes else x
        return path, x

    return mapping


def _to_numpy(x: Any) -> np.ndarray:
    """Convert a tensor (to float32) or a number to NumPy."""
    for name in ("detach", "cpu", "float"):
        x = getattr(x, name)() if hasattr(x, name) else x
    return np.asarray(x)

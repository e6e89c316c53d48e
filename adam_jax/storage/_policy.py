"""The choice of a format for each leaf of a moment, made once, in `init`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._util import errors
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.paths import path_string
from adam_jax._util.typing import DType, KeyPath, PyTree
from adam_jax.storage import _dense
from adam_jax.storage._formats import FORMATS, Format, floating, is_format, names

MIN_SIZE = 4096
"""Leaves with fewer elements aren't quantized, unless a storage function requests it."""


Storage: TypeAlias = Any
"""A format's name, a dtype, {moment: either}, a function (path, leaf) → these, or None: default."""


def format_of(storage: Storage, name: str, path: KeyPath, leaf: PyTree, *, signed: bool) -> PyTree:
    """Return the format of the moment `name` of one leaf: a dtype, or a `Format`.

    A signed moment of a complex leaf stays complex even if `storage` names a real format. But as in
    Optax, a dtype set by `with_dtype`, such as mu_dtype, is used unchanged.
    """
    by_leaf = is_function(storage)
    if by_leaf:
        storage = storage(path_string(path), leaf)
    if isinstance(storage, Mapping):
        storage = storage.get(name)
    default = _dense.default(jnp.result_type(float if isinstance(leaf, int) else leaf))
    if storage is None:
        return default
    kept = check_format(storage)
    if isinstance(kept, Format):
        quantize = _can_quantize(leaf) and (by_leaf or np.size(leaf) >= MIN_SIZE)
        return kept if quantize else arithmetic_dtype(default)
    lossy = signed and jnp.iscomplexobj(leaf) and not jnp.issubdtype(kept, jnp.complexfloating)
    return default if lossy and not isinstance(storage, np.dtype) else kept


def _can_quantize(leaf: PyTree) -> bool:
    """Whether a leaf is real, and has several elements per scale, so that codes save memory."""
    return (
        np.size(leaf) > 0
        and np.ndim(leaf) > 0
        and leaf.shape[-1] > 1
        and not jnp.iscomplexobj(leaf)
    )


def may_quantize(storage: Storage, moments: Collection[str]) -> bool:
    """Whether any of these moments may be quantized."""
    if isinstance(storage, Mapping):
        return any(is_format(storage.get(name)) for name in moments)
    return bool(moments) and (is_format(storage) or is_function(storage))


def may_round(storage: Storage, moments: Collection[str]) -> bool:
    """Whether any of these moments may be stored in fewer bits than float32."""
    formats = [storage.get(n) for n in moments] if isinstance(storage, Mapping) else [storage]
    narrow = [f is not None and not is_function(f) and floating(f) == jnp.bfloat16 for f in formats]
    return any(narrow) or may_quantize(storage, moments)


def unquantized(storage: Storage, name: str, because: str) -> Storage:
    """Return `storage` with the default replacing quantized formats of moment `name`."""
    if isinstance(storage, Mapping) and is_format(storage.get(name)):
        raise errors.value_error(
            f"storage={storage!r} must not quantize {name}, {because}; give it a dtype"
        )
    if is_function(storage):
        function: PyTree = storage
        return lambda path, leaf: unquantized(function(path, leaf), name, because)
    return None if is_format(storage) else storage


def describe_storage(storage: Storage) -> str:
    """Return `storage` as shown in a repr, e.g. int8[128] for int8 in blocks of 128."""
    if is_format(storage):
        return f"{storage}[{FORMATS[storage].signed.block}]"
    if isinstance(storage, Mapping):
        return f"{{{', '.join(f'{k}: {describe_storage(v)}' for k, v in storage.items())}}}"
    if is_function(storage):
        return getattr(storage, "__name__", "function")
    dtype = None if storage is None else floating(storage)
    return str(storage if dtype is None else dtype)


def check(storage: Storage, moments: Collection[str]) -> None:
    """Raise an error if `storage` names an unknown format or moment."""
    if is_function(storage):
        errors.storage_function(storage)
        return
    if isinstance(storage, Mapping):
        for name, format in storage.items():
            if name not in moments:
                raise errors.value_error(
                    f"storage must name existing moments, got {name!r}; choose from "
                    f"{', '.join(moments) or 'none'}"
                )
            if format is not None:
                check_format(format)
    elif storage is not None:
        check_format(storage)


def check_format(storage: Storage) -> PyTree:
    """Return the dtype or `Format` for a name or dtype."""
    if is_format(storage):
        return FORMATS[storage]
    dtype = _dense_dtype(storage)
    if dtype is None:
        listed = ", ".join(map(repr, names()))
        raise errors.value_error(
            f"storage must be one of {listed}, 'float64', or a complex dtype, a mapping from "
            f"moments to these, or a function (path, leaf) that returns these, got {storage!r}"
            f"{_underflow_advice(storage)}"
        )
    return jax.dtypes.canonicalize_dtype(dtype)


DENSE = tuple(
    map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64, jnp.complex64, jnp.complex128))
)
"""The dtypes of unquantized moments. In narrower ones, squares of gradients underflow."""


def _dense_dtype(x: PyTree) -> PyTree:
    """Return x as a dtype in `DENSE`, or None if it isn't one."""
    dtype = floating(x)
    return dtype if dtype in DENSE else None


def _underflow_advice(x: PyTree) -> str:
    """Return the advice for a floating-point dtype that isn't in `DENSE`."""
    dtype = floating(x)
    if dtype is None:
        return ""
    return f"; squares of gradients underflow in {dtype}: use 'bfloat16' or 'int8'"


def with_dtype(storage: Storage, moment: str, argument: str, dtype: DType) -> Storage:
    """Return `storage` with Optax's mu_dtype (or accumulator_dtype) merged in."""
    if dtype is None:
        return storage
    requested, dtype = dtype, _dense_dtype(dtype)
    if dtype is None:
        raise errors.value_error(
            f"{argument} must be float32, bfloat16, float64, or a complex dtype, "
            f"got {requested!r}; for other formats use storage= ({', '.join(names())})"
        )
    given = storage.get(moment) if isinstance(storage, Mapping) else storage
    if given is not None and (is_function(given) or check_format(given) != dtype):
        raise errors.value_error(
            f"{argument}={dtype} conflicts with storage={storage!r}; "
            f"drop {argument}, and write storage={{{moment!r}: {str(dtype)!r}, ...}}"
        )
    rest = storage if isinstance(storage, Mapping) else {}
    return storage if given is not None else {**rest, moment: dtype}


def renamed(storage: Storage, name: str, new: str) -> Storage:
    """Return `storage` with the moment `name` renamed to `new`."""
    if isinstance(storage, Mapping):
        return {new if k == name else k: f for k, f in storage.items()}
    if is_function(storage):
        function: PyTree = storage
        return lambda path, leaf: renamed(function(path, leaf), name, new)
    return storage


def split(storage: Storage, *groups: Collection[str]) -> list[Storage]:
    """Split `storage` by groups of moments, for an optimizer of several rules with moments."""
    if not isinstance(storage, Mapping):
        return [storage] * len(groups)
    check(storage, [name for group in groups for name in group])
    return [{name: f for name, f in storage.items() if name in group} for group in groups]


def _is_dtype(x: PyTree) -> bool:
    return isinstance(x, type) or hasattr(x, "dtype")


def is_function(x: PyTree) -> bool:
    return callable(x) and not _is_dtype(x)

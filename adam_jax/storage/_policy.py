"""Which format a moment of a leaf gets: read once, when the state is made."""

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
"""Leaves with fewer elements stay unquantized, unless a function of the leaf asks for a code."""


Storage: TypeAlias = Any
"""A format's name, a dtype, {moment: either}, a function (path, leaf) of these; None: default."""


def format_of(storage: Storage, name: str, path: KeyPath, leaf: PyTree, *, signed: bool) -> PyTree:
    """Return what the moment `name` of one leaf is kept in: a dtype, or a `Format`.

    A signed moment of a complex leaf is complex, whatever real format is asked for; a dtype that
    `with_dtype` put there, such as Optax's mu_dtype, is taken as it is, as in Optax.
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
        coded = _codable(leaf) and (by_leaf or np.size(leaf) >= MIN_SIZE)
        return kept if coded else arithmetic_dtype(default)
    loses = signed and jnp.iscomplexobj(leaf) and not jnp.issubdtype(kept, jnp.complexfloating)
    return default if loses and not isinstance(storage, np.dtype) else kept


def _codable(leaf: PyTree) -> bool:
    """Codes are of real numbers, and a scale beside each element would save nothing."""
    return (
        np.size(leaf) > 0
        and np.ndim(leaf) > 0
        and leaf.shape[-1] > 1
        and not jnp.iscomplexobj(leaf)
    )


def may_quantize(storage: Storage, moments: Collection[str]) -> bool:
    """Whether any of these moments may come to be coded."""
    if isinstance(storage, Mapping):
        return any(is_format(storage.get(name)) for name in moments)
    return bool(moments) and (is_format(storage) or is_function(storage))


def may_round(storage: Storage, moments: Collection[str]) -> bool:
    """Whether any of these moments is asked for in fewer bits than float32."""
    formats = [storage.get(n) for n in moments] if isinstance(storage, Mapping) else [storage]
    narrow = [f is not None and not is_function(f) and floating(f) == jnp.bfloat16 for f in formats]
    return any(narrow) or may_quantize(storage, moments)


def unquantized(storage: Storage, name: str, because: str) -> Storage:
    """`storage` with the default in the place of codes, for what cannot be coded."""
    if isinstance(storage, Mapping) and is_format(storage.get(name)):
        raise errors.value_error(f"storage={storage!r} codes {name}, {because}; give it a dtype")
    if is_function(storage):
        function: PyTree = storage
        return lambda path, leaf: unquantized(function(path, leaf), name, because)
    return None if is_format(storage) else storage


def describe_storage(storage: Storage) -> str:
    """`storage` as a repr shows it: int8[128] for codes in blocks of 128."""
    if is_format(storage):
        return f"{storage}[{FORMATS[storage].signed.block}]"
    if isinstance(storage, Mapping):
        return f"{{{', '.join(f'{k}: {describe_storage(v)}' for k, v in storage.items())}}}"
    if is_function(storage):
        return getattr(storage, "__name__", "function")
    dtype = None if storage is None else floating(storage)
    return str(storage if dtype is None else dtype)


def check(storage: Storage, moments: Collection[str]) -> None:
    """Raises where `storage` names a format or a moment that there is not."""
    if is_function(storage):
        errors.storage_function(storage)
        return
    if isinstance(storage, Mapping):
        for name, format in storage.items():
            if name not in moments:
                raise errors.value_error(
                    f"storage names the moment {name!r}; it has {', '.join(moments) or 'none'}"
                )
            if format is not None:
                check_format(format)
    elif storage is not None:
        check_format(storage)


def check_format(storage: Storage) -> PyTree:
    """A format given by name or dtype: a dtype, or a `Format`."""
    if is_format(storage):
        return FORMATS[storage]
    dtype = _dense_dtype(storage)
    if dtype is None:
        listed = ", ".join(map(repr, names()))
        raise errors.value_error(
            f"storage must be one of {listed}, 'float64' or a complex dtype, a "
            f"mapping from moments to these or a function (path, leaf) of these, got {storage!r}"
            f"{_narrow(storage)}"
        )
    return jax.dtypes.canonicalize_dtype(dtype)


DENSE = tuple(
    map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64, jnp.complex64, jnp.complex128))
)
"""The dtypes that moments are kept in. Squares of gradients underflow in narrower ones."""


def _dense_dtype(x: PyTree) -> PyTree:
    """x as a dtype that moments are kept in; None if it is none."""
    dtype = floating(x)
    return dtype if dtype in DENSE else None


def _narrow(x: PyTree) -> str:
    """Return the advice for a floating-point dtype that moments are not kept in."""
    dtype = floating(x)
    if dtype is None:
        return ""
    return f"; squares of gradients underflow in {dtype}: use 'bfloat16' or 'int8'"


def with_dtype(storage: Storage, moment: str, argument: str, dtype: DType) -> Storage:
    """`storage` with Optax's mu_dtype (or accumulator_dtype) merged in."""
    if dtype is None:
        return storage
    asked, dtype = dtype, _dense_dtype(dtype)
    if dtype is None:
        raise errors.value_error(
            f"{argument} must be float32, bfloat16, float64 or a complex dtype, "
            f"got {asked!r}; for other formats use storage= ({', '.join(names())})"
        )
    given = storage.get(moment) if isinstance(storage, Mapping) else storage
    if given is not None and (is_function(given) or check_format(given) != dtype):
        raise errors.value_error(
            f"{argument}={dtype} conflicts with storage={storage!r}; "
            f"drop {argument} and write storage={{{moment!r}: {str(dtype)!r}, ...}}"
        )
    rest = storage if isinstance(storage, Mapping) else {}
    return storage if given is not None else {**rest, moment: dtype}


def renamed(storage: Storage, name: str, new: str) -> Storage:
    """Return `storage` with another name for a moment."""
    if isinstance(storage, Mapping):
        return {new if k == name else k: f for k, f in storage.items()}
    if is_function(storage):
        function: PyTree = storage
        return lambda path, leaf: renamed(function(path, leaf), name, new)
    return storage


def split(storage: Storage, *groups: Collection[str]) -> list[Storage]:
    """`storage` for each group of moments, where an optimizer has several rules with moments."""
    if not isinstance(storage, Mapping):
        return [storage] * len(groups)
    check(storage, [name for group in groups for name in group])
    return [{name: f for name, f in storage.items() if name in group} for group in groups]


def _is_dtype(x: PyTree) -> bool:
    return isinstance(x, type) or hasattr(x, "dtype")


def is_function(x: PyTree) -> bool:
    return callable(x) and not _is_dtype(x)

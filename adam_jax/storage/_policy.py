"""The choice of a format for each leaf of a moment, made once, in `init`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._util import errors
from adam_jax._util.declare import Moment
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.paths import path_string
from adam_jax._util.typing import DType, KeyPath, PyTree
from adam_jax.storage import _dense
from adam_jax.storage._formats import FORMATS, Format, floating, is_format, names
from adam_jax.storage._reduced import FACTORED, Reduction

MIN_SIZE = 4096
"""Leaves with fewer elements aren't quantized or reduced, unless a storage function requests it."""

MAX_REDUCED_BYTES = 0.5
"""Leaves whose row and column means take more bytes per element are quantized to int8 instead."""

COMPACT = "compact"
"""The name of int8 storage, with averages factored if that can't make a step large."""


Storage: TypeAlias = Any
"""A format name, a dtype, a `mean`, {moment or kind: format}, a function (path, leaf) → format, or
None (default)."""

KINDS = ("signed", "positive")
"""The kinds of moments that a mapping may name; the name of a moment takes precedence."""


def format_of(storage: Storage, name: str, declared: Moment, path: KeyPath, leaf: PyTree) -> PyTree:
    """Return the format of the moment `name` of one leaf: a dtype, a `Code`, or a `Reduction`.

    A signed moment of a complex leaf stays complex even if `storage` names a real format. But as in
    Optax, a dtype set by `with_dtype`, such as mu_dtype, is used unchanged.
    """
    by_leaf = is_function(storage)
    if by_leaf:
        storage = storage(path_string(path), leaf)
    storage = choose(storage, name, declared)
    default = _dense.default(jnp.result_type(float if isinstance(leaf, int) else leaf))
    if storage is None:
        return default
    kept = check_format(storage)
    large = by_leaf or np.size(leaf) >= MIN_SIZE
    if isinstance(kept, Reduction):
        if not (large and kept.fits(leaf)):
            return default
        if len(kept.axes) == 1 or kept.bytes_per_element(np.shape(leaf)) <= MAX_REDUCED_BYTES:
            return kept
        kept = FORMATS["int8"]
    if isinstance(kept, Format):
        quantized = kept.signed if declared.signed else kept.positive
        return quantized if large and _can_quantize(leaf) else arithmetic_dtype(default)
    real = not jnp.issubdtype(kept, jnp.complexfloating)
    lossy = declared.signed and jnp.iscomplexobj(leaf) and real
    return default if lossy and not isinstance(storage, np.dtype) else kept


def choose(storage: Storage, name: str, declared: Moment) -> Storage:
    """Return the format that `storage`, which isn't a function, gives to a moment.

    Only non-negative averages can be stored as means. Other moments keep the default, or raise an
    error if `storage` names them. "compact" factors an average if its lower bound limits the
    step. One number per leaf is never quantized or reduced.
    """
    if declared.one_per_leaf:
        return None
    explicitly = False
    if declared.exact:
        storage = storage.get(name) if isinstance(storage, Mapping) else None
        if _is_lossy(storage):
            raise errors.value_error(
                f"storage must keep {name} exactly, got {describe_storage(storage)}; "
                f"give it a dtype"
            )
        return storage
    if isinstance(storage, Mapping):
        explicitly = name in storage or (declared.signed and "signed" in storage)
        storage = storage.get(name, storage.get("signed" if declared.signed else "positive"))
    if is_name(storage, COMPACT):
        return FACTORED.name if declared.bounds_step else "int8"
    if not is_reduction(storage) or (declared.average and not declared.signed):
        return storage
    if explicitly:
        why = "is signed: its mean doesn't approximate its elements"
        if not declared.signed:
            why = "isn't an average: a step can't update its mean from means"
        raise errors.value_error(
            f"storage must not reduce {name} to {describe_storage(storage)}, because it {why}; "
            f"use 'int8' for {name}, or storage='compact'"
        )
    return None


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
        return any(_may_quantize(storage.get(name)) for name in (*moments, *KINDS))
    return bool(moments) and (_may_quantize(storage) or is_function(storage))


def _may_quantize(storage: Storage) -> bool:
    """Whether a format quantizes leaves; "factored" does if the means would be too large."""
    return is_format(storage) or is_name(storage, COMPACT) or is_name(storage, FACTORED.name)


def may_round(storage: Storage, moments: Collection[str]) -> bool:
    """Whether any of these moments may be stored in fewer bits than float32."""
    mapping = isinstance(storage, Mapping)
    formats = [storage.get(n) for n in (*moments, *KINDS)] if mapping else [storage]
    narrow = [f is not None and not is_function(f) and floating(f) == jnp.bfloat16 for f in formats]
    return any(narrow) or any(map(is_reduction, formats)) or may_quantize(storage, moments)


def unquantized(storage: Storage, name: str, because: str) -> Storage:
    """Return `storage` with the default instead of lossy formats for the moment `name`."""
    if isinstance(storage, Mapping) and _is_lossy(storage.get(name)):
        raise errors.value_error(
            f"storage={describe_storage(storage)} must store {name} exactly, {because}; give it a "
            f"dtype"
        )
    if is_function(storage):
        function: PyTree = storage
        return lambda path, leaf: unquantized(function(path, leaf), name, because)
    if isinstance(storage, Mapping):
        return {name: None, **storage}
    return None if _is_lossy(storage) else storage


def _is_lossy(storage: Storage) -> bool:
    return is_format(storage) or is_name(storage, COMPACT) or is_reduction(storage)


def describe_storage(storage: Storage) -> str:
    """Return `storage` as shown in a repr, e.g. int8[128] for int8 in blocks of 128."""
    if is_format(storage):
        return f"{storage}[{FORMATS[storage].signed.block}]"
    if isinstance(storage, Mapping):
        return f"{{{', '.join(f'{k}: {describe_storage(v)}' for k, v in storage.items())}}}"
    if is_function(storage):
        return getattr(storage, "__name__", "function")
    if isinstance(storage, Reduction):
        return storage.name
    dtype = None if storage is None else floating(storage)
    return str(storage if dtype is None else dtype)


def check(storage: Storage, moments: Mapping[str, Moment]) -> None:
    """Raise an error if `storage` names an unknown format or moment, or can't be used for it."""
    if is_function(storage):
        errors.storage_function(storage)
        return
    if isinstance(storage, Mapping):
        for name, format in storage.items():
            if name not in moments and name not in KINDS:
                raise errors.value_error(
                    f"storage must name existing moments, got {name!r}; choose from "
                    f"{', '.join((*moments, *KINDS))}, or pass a function of (path, leaf)"
                )
            if format is not None and not is_name(format, COMPACT):
                check_format(format)
    elif storage is not None and not is_name(storage, COMPACT):
        check_format(storage)
    chosen = [choose(storage, name, declared) for name, declared in moments.items()]
    if moments and is_reduction(storage) and not any(map(is_reduction, chosen)):
        raise errors.value_error(
            f"storage={describe_storage(storage)} must be used for a non-negative average, got "
            f"{', '.join(moments)}; use storage='compact'"
        )


def check_format(storage: Storage) -> PyTree:
    """Return the dtype, `Format`, or `Reduction` for a name or dtype."""
    if is_format(storage):
        return FORMATS[storage]
    if is_reduction(storage):
        return storage if isinstance(storage, Reduction) else FACTORED
    dtype = _dense_dtype(storage)
    if dtype is None:
        listed = ", ".join(map(repr, names()))
        raise errors.value_error(
            f"storage must be one of {listed}, 'float64', a complex dtype, or storage.mean(axis), "
            f"a mapping from moments, 'signed', or 'positive' to these, or a function "
            f"(path, leaf) that returns these, got {storage!r}"
            f"{_underflow_advice(storage)}"
        )
    return jax.dtypes.canonicalize_dtype(dtype)


DENSE = tuple(
    map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64, jnp.complex64, jnp.complex128))
)
"""The dtypes of unquantized moments. In others, e.g. float16, squares of gradients underflow."""


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
    if is_reduction(storage):
        return {"positive": storage, moment: dtype}
    given = storage.get(moment, storage.get("signed")) if isinstance(storage, Mapping) else storage
    agrees = given is None or (not _is_choice(given) and check_format(given) == dtype)
    if not agrees:
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
        errors.storage_function(storage)
        function: PyTree = storage
        return lambda path, leaf: renamed(function(path, leaf), name, new)
    return storage


def split(storage: Storage, *groups: Collection[str]) -> list[Storage]:
    """Split `storage` by groups of moments, for an optimizer whose rules have separate moments."""
    if not isinstance(storage, Mapping):
        return [storage] * len(groups)
    known = {name for group in groups for name in (*group, *KINDS)}
    unknown = {name: f for name, f in storage.items() if name not in known}  # kept for `check`
    return [
        {name: f for name, f in storage.items() if name in (*group, *KINDS, *unknown)}
        for group in groups
    ]


def _is_choice(storage: Storage) -> bool:
    """Whether `storage` chooses a format by leaf or by moment."""
    return is_function(storage) or is_name(storage, COMPACT)


def is_name(storage: Storage, name: str) -> bool:
    """Whether `storage` is this name; unlike ==, it never raises for a dtype."""
    return isinstance(storage, str) and storage == name


def is_reduction(storage: Storage) -> bool:
    """Whether `storage` names a format that stores means."""
    return isinstance(storage, Reduction) or is_name(storage, FACTORED.name)


def _is_dtype(x: PyTree) -> bool:
    return isinstance(x, type) or hasattr(x, "dtype")


def is_function(x: PyTree) -> bool:
    """Whether `storage` is a function of a path and a leaf."""
    return callable(x) and not _is_dtype(x)

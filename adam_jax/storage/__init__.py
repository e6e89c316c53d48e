"""How a moment lies in memory.

A format is chosen per leaf when the state is made; afterwards the state describes itself: what is
stored determines how it is read and written, so update never sees the policy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from adam_jax import checks
from adam_jax.paths import path_string
from adam_jax.storage import dense

FORMATS = ("float32", "bfloat16")
"""The formats with a name. Any floating-point dtype works too."""

Storage = Any
"""A format's name, a dtype, {moment: either}, a function (path, leaf) of these; None: default."""

decode = dense.decode
encode = dense.encode


def format_of(
    storage: Storage, name: str, path: tuple[Any, ...], leaf: Any
) -> jax.typing.DTypeLike:
    """The dtype in which the moment `name` of one leaf is kept."""
    if callable(storage) and not _is_dtype(storage):
        storage = storage(path_string(path), leaf)
    if isinstance(storage, Mapping):
        storage = storage.get(name)
    if storage is None:
        return dense.default(jnp.result_type(float if isinstance(leaf, int) else leaf))
    return check_format(storage)


def start(dtype: jax.typing.DTypeLike, leaf: Any, value: chex.Numeric) -> jax.Array:
    """A moment before the first step."""
    return jnp.full_like(leaf, jnp.asarray(value).astype(dtype), dtype=dtype)


def draws(stored: Any) -> bool:
    """Whether writing any of these moments takes random bits."""
    return any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(stored))


def check(storage: Storage, moments: Collection[str]) -> None:
    """Raises where `storage` names a format or a moment that there is not."""
    if callable(storage) and not _is_dtype(storage):
        return
    if isinstance(storage, Mapping):
        for name, format in storage.items():
            if name not in moments:
                raise ValueError(
                    f"{checks.who()}: storage names the moment {name!r}; "
                    f"it has {', '.join(moments) or 'none'}"
                )
            if format is not None:
                check_format(format)
    elif storage is not None:
        check_format(storage)


def check_format(storage: Any) -> jax.typing.DTypeLike:
    """The dtype of a format given by name or dtype."""
    dtype = _floating(storage)
    if dtype is None:
        listed = ", ".join(repr(f) for f in FORMATS)
        raise ValueError(
            f"{checks.who()}: storage must be one of {listed}, a floating-point dtype, a mapping "
            f"from moments to these or a function (path, leaf) of these, got {storage!r}"
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def _floating(x: Any) -> Any:
    """x as a floating-point or complex dtype; None where it is none."""
    try:
        dtype = jnp.dtype(x)
    except (TypeError, ValueError):
        return None
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else None


def with_dtype(storage: Storage, moment: str, argument: str, dtype: Any) -> Storage:
    """`storage` with Optax's mu_dtype (or accumulator_dtype) merged in."""
    if dtype is None:
        return storage
    asked, dtype = dtype, _floating(dtype)
    if dtype is None:
        raise ValueError(
            f"{checks.who()}: {argument} must be a floating-point dtype, got {asked!r}; "
            f"for other formats use storage= ({', '.join(FORMATS)})"
        )
    given = storage.get(moment) if isinstance(storage, Mapping) else storage
    if given is not None and (_is_function(given) or check_format(given) != dtype):
        raise ValueError(
            f"{checks.who()}: {argument}={dtype} conflicts with storage={storage!r}; "
            f"drop {argument} and write storage={{{moment!r}: {dtype.name!r}, ...}}"
        )
    rest = storage if isinstance(storage, Mapping) else {}
    return storage if given is not None else {**rest, moment: dtype}


def split(storage: Storage, *groups: Collection[str]) -> list[Storage]:
    """`storage` for each group of moments, where an optimizer has several rules with moments."""
    if not isinstance(storage, Mapping):
        return [storage] * len(groups)
    check(storage, [name for group in groups for name in group])
    return [{name: f for name, f in storage.items() if name in group} for group in groups]


def _is_dtype(x: Any) -> bool:
    return isinstance(x, type) or hasattr(x, "dtype")


def _is_function(x: Any) -> bool:
    return callable(x) and not _is_dtype(x)

"""The coded formats by name, and a door for one of a user's own."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from adam_jax._util.typing import DType, PyTree
from adam_jax.storage import _int8
from adam_jax.storage._blockwise import Code


class Format(NamedTuple):
    """A coded format: the code of signed moments, and that of non-negative ones."""

    signed: Code
    positive: Code


FORMATS = {"int8": Format(_int8.SIGNED, _int8.POSITIVE)}
"""The coded formats by name. Beside them every floating-point dtype is a format."""


@functools.cache  # until `register` adds a format
def code_of(dtype: DType) -> Code | None:
    """Return the code whose codes have this dtype, which says how a state is read."""
    codes = (code for each in FORMATS.values() for code in each)
    return next((code for code in codes if jnp.dtype(code.dtype) == dtype), None)


def register(name: str, signed: Code, positive: Code) -> None:
    """Makes a format of one's own a name that `storage=` takes, with everything that int8 has.

    Args:
      name: what `storage=` will be given.
      signed: the code of signed moments.
      positive: the code of moments that are never negative; it may be the same. It should give
        nothing above zero the code of zero: where nu is 0 and mu is not, a step is mu/ε.

    Raises:
      ValueError: the name or a dtype is taken, a block is no power of two, or a code does not give
        back -1, 0 and 1.

    >>> import jax.numpy as jnp, adam_jax
    >>> from adam_jax.storage import Code, register
    >>> code = Code(
    ...     jnp.float8_e4m3fn,
    ...     lambda y, draw: (y * 448).astype(jnp.float8_e4m3fn),  # to the nearest
    ...     lambda codes: codes.astype(jnp.float32) / 448,
    ... )
    >>> register("float8 in blocks", code, code)
    >>> tx = adam_jax.adamw(1e-3, storage="float8 in blocks")
    """
    for code, ends in ((signed, (-1, 0, 1)), (positive, (0, 1))):
        wrong = _unfit(name, code, ends)
        if wrong:
            raise ValueError(f"register: {name!r} {wrong}")
    FORMATS[name] = Format(signed, positive)
    code_of.cache_clear()


def _unfit(name: str, code: Code, ends: tuple[int, ...]) -> str:
    """What keeps a code from being registered."""
    dtype = jnp.dtype(code.dtype)
    if name in FORMATS or floating(name) is not None:
        return f"is taken; choose a name beside {', '.join(map(repr, names()))}"
    taken = [str(jnp.dtype(c.dtype)) for f in FORMATS.values() for c in f]
    if code_of(dtype) or dtype.itemsize > 2 or dtype == jnp.bfloat16:
        return (
            f"has codes of {dtype}, which a state could not be told apart by; take another small "
            f"dtype than {', '.join(taken)}"
        )
    if code.block < 1 or code.block & (code.block - 1):
        return f"has blocks of {code.block}; take a power of two"
    y = jnp.array(ends, jnp.float32)
    codes = code.encode(y, jnp.full_like(y, 0.5))
    back = code.decode(codes)
    if codes.dtype != dtype or not np.array_equal(back, y):
        return f"gives back {np.asarray(back)} in {codes.dtype} for {ends} in {dtype}"
    return ""


def names() -> list[str]:
    """The formats that an error or a docstring lists."""
    return ["float32", "bfloat16", *FORMATS]


def is_format(storage: PyTree) -> bool:
    """Whether this is the name of a coded format."""
    return isinstance(storage, str) and storage in FORMATS


def floating(x: PyTree) -> PyTree:
    """x as a floating-point or complex dtype; None where it is none."""
    try:
        dtype = jnp.dtype(x)
    except (TypeError, ValueError):
        return None
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else None

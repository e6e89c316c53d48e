"""The quantized formats by name, and `register` for new ones."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from adam_jax._util.typing import DType, PyTree
from adam_jax.storage import _int8
from adam_jax.storage._blockwise import Code


class Format(NamedTuple):
    """A quantized format: a code for signed moments, and a code for non-negative moments."""

    signed: Code
    positive: Code


FORMATS = {"int8": Format(_int8.SIGNED, _int8.POSITIVE)}
"""The quantized formats by name. Dtypes and their names, such as "bfloat16", are formats, too."""


@functools.cache  # cleared by `register`
def code_of(dtype: DType) -> Code | None:
    """Return the `Code` of this dtype, or None if there is none."""
    codes = (code for each in FORMATS.values() for code in each)
    return next((code for code in codes if jnp.dtype(code.dtype) == dtype), None)


def register(name: str, signed: Code, positive: Code) -> None:
    """Register a format for `storage=`; it then works wherever int8 does.

    Args:
      name: the name for `storage=`.
      signed: the code of signed moments.
      positive: the code of non-negative moments; it may equal `signed`. It should encode no
        positive number as zero: where nu is 0 and mu isn't, a step is mu/ε.

    Raises:
      ValueError: if the name or a dtype is taken, two different codes have one dtype, a dtype has
        over 2 bytes, a block size isn't a power of two, or a code doesn't return -1, 0, and 1
        exactly.

    >>> import jax.numpy as jnp, adam_jax
    >>> from adam_jax.storage import Code, register
    >>> code = Code(
    ...     jnp.float8_e4m3fn,
    ...     lambda y, draw: y.astype(jnp.float8_e4m3fn),  # round to nearest
    ...     lambda codes: codes.astype(jnp.float32) / 448,
    ...     largest=448,
    ... )
    >>> register("float8 in blocks", code, code)
    >>> tx = adam_jax.adamw(1e-3, storage="float8 in blocks")
    """
    dtypes = {jnp.dtype(code.dtype) for code in (signed, positive)}
    if signed != positive and len(dtypes) == 1:
        raise ValueError(
            f"register: the codes of {name!r} must be one Code or have different dtypes, got two "
            f"codes of {dtypes.pop()}; pass one Code twice, or change the dtype of one"
        )
    for code, exact in ((signed, (-1, 0, 1)), (positive, (0, 1))):
        problem = _problem(name, code, exact)
        if problem:
            raise ValueError(f"register: {problem}")
    FORMATS[name] = Format(signed, positive)
    code_of.cache_clear()


def _problem(name: str, code: Code, exact: tuple[int, ...]) -> str:
    """Return why a code can't be registered, or an empty string."""
    dtype = jnp.dtype(code.dtype)
    if name in names() or floating(name) is not None:
        others = ", ".join(map(repr, names()))
        return f"name must not be taken, got {name!r}; choose one other than {others}"
    taken = [str(jnp.dtype(c.dtype)) for f in FORMATS.values() for c in f]
    if code_of(dtype) or dtype.itemsize > 2 or dtype == jnp.bfloat16:
        return (
            f"the dtype of {name!r} must be unused and of at most 2 bytes, got {dtype}; choose one "
            f"other than bfloat16, {', '.join(taken)}"
        )
    if code.block < 1 or code.block & (code.block - 1):
        return f"the block of {name!r} must be a power of two, got {code.block}; pass block=128"
    y = jnp.array(exact, jnp.float32)
    codes = code.encode(y * code.largest, jnp.full_like(y, 0.5))
    decoded = code.decode(codes)
    if codes.dtype != dtype or not np.array_equal(decoded, y):
        return (
            f"the code of {name!r} must encode {exact} in {dtype} and decode them exactly, got "
            f"{np.asarray(decoded)} from {codes.dtype}; correct its encode or decode"
        )
    return ""


def names() -> list[str]:
    """Return the names of formats that errors and docstrings list."""
    return ["float32", "bfloat16", *FORMATS, "factored", "compact"]


def is_format(storage: PyTree) -> bool:
    """Whether this is the name of a quantized format."""
    return isinstance(storage, str) and storage in FORMATS


def floating(x: PyTree) -> PyTree:
    """Return x as a floating-point or complex dtype, or None if it isn't one."""
    try:
        dtype = jnp.dtype(x)
    except (TypeError, ValueError):
        return None
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else None

"""The coded formats by name, and a door for one of a user's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adam_jax.storage import _int8
from adam_jax.storage._blockwise import Code


class Format(NamedTuple):
    """A coded format: the code of signed moments, and that of non-negative ones."""

    signed: Code
    positive: Code


FORMATS = {"int8": Format(_int8.SIGNED, _int8.POSITIVE)}
"""The coded formats by name. Beside them every floating-point dtype is a format."""


CODES: dict[Any, Code] = {jnp.dtype(code.dtype): code for f in FORMATS.values() for code in f}
"""The code that a dtype of codes stands for."""


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
    CODES.update({jnp.dtype(code.dtype): code for code in (signed, positive)})


def _unfit(name: str, code: Code, ends: tuple[int, ...]) -> str:
    """What keeps a code from being registered."""
    dtype = jnp.dtype(code.dtype)
    if name in FORMATS or floating(name) is not None:
        return f"is taken; choose a name beside {', '.join(map(repr, names()))}"
    if dtype in CODES or dtype.itemsize > 2 or dtype == jnp.bfloat16:
        return (
            f"has codes of {dtype}, which a state could not be told apart by; take another small "
            f"dtype than {', '.join(map(str, CODES))}"
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


def is_format(storage: Any) -> bool:
    """Whether this is the name of a coded format."""
    return isinstance(storage, str) and storage in FORMATS


def floating(x: Any) -> Any:
    """x as a floating-point or complex dtype; None where it is none."""
    try:
        dtype = jnp.dtype(x)
    except (TypeError, ValueError):
        return None
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else None

"""How a moment lies in memory.

A format is chosen per leaf when the state is made (`policy`). From then on the state describes
itself: what is stored determines how it is read and written (`moments`), and update never sees the
policy. A format is a dtype (`dense`), or codes with a scale per block (`blocks`, `int8`).
"""

from adam_jax.storage._blockwise import Blocks, Code, size
from adam_jax.storage._formats import CODES, FORMATS, Format, register
from adam_jax.storage._moments import (
    any_coded,
    block_of,
    codes_of,
    decode,
    draws,
    dtypes,
    encode,
    finite,
    in_equal_blocks,
    is_coded,
    leaves,
    marked_as,
    one_leaf,
    start,
    with_leaves,
)
from adam_jax.storage._policy import (
    MIN_SIZE,
    Storage,
    check,
    described,
    is_function,
    may_code,
    may_round,
    renamed,
    split,
    uncoded,
    with_dtype,
)

__all__ = [
    "CODES",
    "FORMATS",
    "MIN_SIZE",
    "Blocks",
    "Code",
    "Format",
    "Storage",
    "any_coded",
    "block_of",
    "check",
    "codes_of",
    "decode",
    "described",
    "draws",
    "dtypes",
    "encode",
    "finite",
    "in_equal_blocks",
    "is_coded",
    "is_function",
    "leaves",
    "marked_as",
    "may_code",
    "may_round",
    "one_leaf",
    "register",
    "renamed",
    "size",
    "split",
    "start",
    "uncoded",
    "with_dtype",
    "with_leaves",
]

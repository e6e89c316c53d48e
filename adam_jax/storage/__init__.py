"""Storage formats for moments.

`init` chooses a format for each leaf (`_policy`). From then on, the dtypes and shapes of the state
determine how to read and write it (`_moments`); updates don't use the policy. A format is either a
dtype (`_dense`), or codes with a scale per block (`_blockwise`, `_int8`).
"""

from adam_jax.storage._blockwise import Code, Quantized
from adam_jax.storage._formats import FORMATS, Format, register
from adam_jax.storage._policy import MIN_SIZE, Storage

__all__ = ["FORMATS", "MIN_SIZE", "Code", "Format", "Quantized", "Storage", "register"]

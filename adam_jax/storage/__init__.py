"""Storage formats for moments.

`init` chooses a format for each leaf (`_policy`). From then on, the dtypes and shapes of the state
determine how to read and write it (`_moments`); updates don't use the policy. A format is a dtype
(`_dense`), codes with a scale per block (`_blockwise`, `_int8`), or means over axes (`_reduced`).
"""

from adam_jax.storage._blockwise import Code, Quantized
from adam_jax.storage._formats import FORMATS, Format, register
from adam_jax.storage._policy import MIN_SIZE, Storage
from adam_jax.storage._reduced import Factored, Mean, mean

__all__ = [
    "FORMATS",
    "MIN_SIZE",
    "Code",
    "Factored",
    "Format",
    "Mean",
    "Quantized",
    "Storage",
    "mean",
    "register",
]

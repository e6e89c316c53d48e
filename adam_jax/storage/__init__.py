"""How a moment is stored.

A format is chosen per leaf when the state is made (`_policy`). From then on the state describes
itself: its dtypes and shapes say how to read and write it (`_moments`), and an update never sees
the policy. A format is a dtype (`_dense`), or codes with a scale per block (`_blockwise`, `_int8`).
"""

from adam_jax.storage._blockwise import Code, Quantized
from adam_jax.storage._formats import FORMATS, Format, register
from adam_jax.storage._policy import MIN_SIZE, Storage

__all__ = ["FORMATS", "MIN_SIZE", "Code", "Format", "Quantized", "Storage", "register"]

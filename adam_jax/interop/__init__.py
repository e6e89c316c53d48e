"""Conversion of states from other optimizers, PyTorch, and other storage formats."""

from adam_jax.interop._convert import convert_state
from adam_jax.interop._torch import flax_names, from_torch

__all__ = ["convert_state", "flax_names", "from_torch"]

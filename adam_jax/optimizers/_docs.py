"""Shared parts of the constructors' docstrings."""

from __future__ import annotations

import inspect
import re

ARGUMENTS = {
    "learning_rate": "η ≥ 0, or a schedule of the step count; None leaves the direction unscaled.",
    "b1": "decay rate of the average gradient, in [0, 1).",
    "b2": "decay rate of the average squared gradient, in [0, 1).",
    "eps": "≥ 0, added to the square root.",
    "eps_root": "≥ 0, added inside the square root.",
    "mu_dtype": 'the dtype of mu; equivalent to storage={"mu": dtype}.',
    "weight_decay": "λ ≥ 0, a schedule, or None (off).",
    "mask": "Optax's name for weight_decay_mask.",
    "weight_decay_mask": "the leaves to decay: a tree of bools, or e.g. `not_matching('bias')`.",
    "weight_decay_form": "how weight decay is applied, 'decoupled' by default; see `from_rule`.",
    "cautious": "whether to mask the direction as `adam_jax.cautious` does.",
    "storage": 'the format of the moments, such as "int8"; see `scale_by_rule`.',
    "implementation": 'how a step is executed, "auto" by default; see `scale_by_rule`.',
}

ENDING = """Returns:
  an `optax.GradientTransformationExtraArgs`. Most numbers may be schedules; errors name the rest.

Raises:
  ValueError: a number or name is invalid; at update, gradients don't match the parameters.
  TypeError: a leaf is neither floating point nor complex."""


def complete(text: str, signature: inspect.Signature) -> str:
    """Add the shared arguments and the ending to a docstring, before its example."""
    about, mark, example = text.partition(">>>")
    about, _, own = about.partition("\nArgs:\n")
    described = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", own, re.MULTILINE))
    lines = [
        f"  {name}: {described.get(name) or ARGUMENTS[name]}"
        for name in signature.parameters
        if name in described or name in ARGUMENTS
    ]
    sections = [about.rstrip(), "Args:\n" + "\n".join(lines), ENDING, mark + example]
    return "\n\n".join(section for section in sections if section)

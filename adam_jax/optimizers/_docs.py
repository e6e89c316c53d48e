"""What the docstrings of all constructors have in common, written once."""

from __future__ import annotations

import inspect

ARGUMENTS = {
    "weight_decay": "λ ≥ 0, or a schedule of the step count; None for none.",
    "weight_decay_mask": """a tree of bools, a prefix of one, or a function of the parameters that
    gives one, such as `not_matching('bias')`: which leaves are decayed.""",
    "weight_decay_form": """"decoupled": η·λ·p, as in PyTorch and Optax; "independent": λ·p, for
    any η; "cautious": only where the step, too, shrinks the weight; "proximal": p/(1 + ηλ) after
    the step; "l2": λ·p added to the gradient.""",
    "cautious": "drop what of the direction points against the gradient; see `cautious`.",
    "storage": """what the moments are kept in: "float32", "bfloat16", "int8" (2 bytes per parameter
    for two moments; leaves under 4096 elements stay float32), "float64", {moment: one of these}, or
    a function (path, leaf) of these. None: the parameter's dtype, float32 for float16.""",
    "implementation": """how a leaf's step is executed: "xla"; "stream", in tiles, in place;
    "pallas", a kernel, compiled for GPUs and TPUs and on CPUs interpreted, which is slow; "auto":
    for coded moments a kernel where one compiles and tiles elsewhere, else "xla".""",
}

ENDING = """
Any number may also be a scalar array or a schedule of the step count. Updates have the gradients'
dtypes; all arithmetic is float32, or float64 for float64 leaves.

Returns:
  an `optax.GradientTransformationExtraArgs`.

Raises:
  ValueError: a number is out of range or a name unknown; at update, gradients that do not fit.
  TypeError: a leaf is not floating point.
"""


def complete(text: str, signature: inspect.Signature) -> str:
    """A constructor's docstring with the common arguments and ending in front of its example."""
    about, found, example = text.partition(">>>")
    missing = [k for k in ARGUMENTS if k in signature.parameters and f"\n  {k}: " not in about]
    arguments = "".join(f"  {name}: {ARGUMENTS[name]}\n" for name in missing)
    head = "" if "\nArgs:\n" in about else "\nArgs:\n"
    return f"{about.rstrip()}\n{head}{arguments}{ENDING}\n{found}{example}"

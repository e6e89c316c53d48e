"""All constructors have full signatures, a readable help, and errors that list arguments."""

from __future__ import annotations

import inspect
import pydoc

import pytest

import adam_jax

CONSTRUCTORS = {entry.name: entry.constructor for entry in adam_jax.catalogue()}
DIRECTIONS = {n: getattr(adam_jax, n) for n in adam_jax.__all__ if n.startswith("scale_by_")}
del DIRECTIONS["scale_by_rule"]

OWN_DECAY = ("adamh", "novograd", "schedule_free_adamw")

every_function = pytest.mark.parametrize("name", {**CONSTRUCTORS, **DIRECTIONS})


@every_function
def test_the_signature_lists_every_argument(name):
    parameters = inspect.signature(getattr(adam_jax, name)).parameters.values()
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
    assert {"storage", "implementation"} <= {p.name for p in parameters}
    if name in CONSTRUCTORS and name not in OWN_DECAY:
        shared = {"weight_decay", "weight_decay_mask", "weight_decay_form", "cautious"}
        assert shared <= {p.name for p in parameters}


@every_function
def test_help_fits_on_a_screen(name):
    text = pydoc.plain(pydoc.render_doc(getattr(adam_jax, name)))
    assert "ForwardRef" not in text and "Union[" not in text and "Unpack" not in text
    assert len(text.splitlines()) <= 64
    for argument in inspect.signature(getattr(adam_jax, name)).parameters:
        assert name in DIRECTIONS or f"  {argument}: " in text, argument


def test_a_misspelled_keyword_lists_the_arguments():
    with pytest.raises(TypeError, match=r"adamw: .*'weight_deacy'.*weight_decay_mask, "):
        adam_jax.adamw(1e-3, weight_deacy=0.1)

"""Whether a transformation can step one part of the parameters without the other parts.

The check traces one update and follows which results depend on which operands, so that it holds for
any transformation, ours or not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from adam_jax._engine import parts
from adam_jax._engine.state import named_tuples
from adam_jax._engine.transformation import describe
from adam_jax._util import errors
from adam_jax._util.typing import PyTree
from adam_jax.transforms.layered import LAYERS, OUTER, SHARED, Layout

CHOICES = (
    "clip each layer by itself, e.g. with optax.adaptive_grad_clip; use adam_jax.stable_adamw, "
    "which needs no clipping; clip by the gradient norm of the previous step, with "
    "adam_jax.clip_to_previous_norm; or pass two_pass=True, which runs the backward pass twice"
)


def check(tx: optax.GradientTransformation, params: PyTree, *, two_pass: bool) -> None:
    """Raise if the step of one part depends on the other parts.

    With `two_pass`, it may depend on their gradients. `params` has the shapes of one layer.
    """
    state = jax.eval_shape(tx.init, params)
    if any(isinstance(s, optax.MultiStepsState) for _, s in named_tuples(state)):
        raise errors.value_error(
            "tx must not accumulate gradients, got optax.MultiSteps, which holds the gradient of "
            "all layers; pass gradient_release(..., microbatches=k)"
        )
    needs_gradient, needs_rest = _dependence(tx, params, state)
    if needs_rest:
        raise errors.value_error(
            f"tx must step each layer by itself, got {describe(tx)}, whose step depends on the "
            f"parameters or the state of other layers; use adam_jax.apply without gradient_release"
        )
    if needs_gradient and not two_pass:
        raise errors.value_error(
            f"tx must not need the gradient of all parameters at once, got {describe(tx)}; "
            f"{CHOICES}"
        )


def _dependence(
    tx: optax.GradientTransformation, params: PyTree, state: PyTree
) -> tuple[bool, bool]:
    """Return whether a part's results depend on other parts' gradients, and on anything else.

    Shared results must depend on no part, except through `parts.total`.
    """
    update = optax.with_extra_args_support(tx).update

    def zero_total(sums: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, sums)

    with parts.stepping(parts.Part(total=zero_total)):
        closed, out = jax.make_jaxpr(update, return_shape=True)(params, state, params)
    of_params, of_state = (Layout.of(tree, params) for tree in (params, state))
    gradients, moments = of_params.parts_of_arrays(params), of_state.parts_of_arrays(state)
    operands = [*gradients, *moments, *gradients]
    results = [*of_params.parts_of_arrays(out[0]), *of_state.parts_of_arrays(out[1])]
    gradient = rest = False
    for part in (OUTER, LAYERS, SHARED):
        wanted = [result == part for result in results]
        _, used, *_ = partial_eval.dce_jaxpr(closed.jaxpr, wanted)
        others = [u and o not in (part, SHARED) for u, o in zip(used, operands, strict=True)]
        gradient = gradient or any(others[: len(gradients)])
        rest = rest or any(others[len(gradients) :])
    return gradient, rest

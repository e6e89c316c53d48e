"""An optimizer from any declared rule."""

from __future__ import annotations

from adam_jax._engine.chain import Chain, link
from adam_jax._engine.transformation import Transformation
from adam_jax._util import errors
from adam_jax._util.declare import Option, Rule
from adam_jax._util.typing import Mask, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import Form, call_text
from adam_jax.storage import Storage

__all__ = ["from_rule", "scale_by_rule"]


def scale_by_rule(
    rule: Rule,
    *,
    storage: Storage = None,
    implementation: str = "auto",
    **hyperparams: ScalarOrSchedule | Option,
) -> Transformation:
    """Transform gradients into a rule's direction, without weight decay or a learning rate.

    Args:
      rule: a declared variant; see `rule`.
      storage: the format of the moments: "float32", "bfloat16", "int8", "float64", "factored" or
        `storage.mean(axis)` (for non-negative averages), or "compact" (int8, with averages
        factored if that can't make a step large). Or a mapping to formats, keyed by moment or by
        the kinds "signed" and "positive", or a function (path, leaf) that returns a format. By
        default, a moment has its parameter's dtype (float32 for float16 parameters). int8 and, if
        the state has a step count, bfloat16 are rounded stochastically. Only a function can
        quantize or reduce leaves under 4096 elements.
      implementation: how a leaf's step is executed. "xla" leaves it to XLA; "stream" runs it in
        tiles, in place; "pallas" runs it in a kernel, compiled on GPUs and TPUs and interpreted on
        CPUs, which is slow; "auto" uses a kernel (tiles on CPUs) mainly for quantized or reduced
        moments, and "xla" otherwise.
      **hyperparams: the rule's hyperparameters: numbers, scalar arrays, or schedules of the step
        count; required unless they have defaults.

    Returns:
      an Optax transformation whose updates are the direction, in the gradients' dtype.

    Raises:
      TypeError: a hyperparameter is unknown or missing.
      ValueError: a value is out of range, or storage or implementation is unknown.

    >>> import adam_jax
    >>> tx = scale_by_rule(adam_jax.rules.adam, b1=0.9, b2=0.95, eps=1e-8, eps_root=0.0)
    """
    errors.a_rule("scale_by_rule", rule, Rule)
    with errors.error_context(rule.name):
        links = (link(rule, hyperparams, storage=storage),)
        return Chain(rule.name, links, implementation, bare=True).transformation()


def from_rule(
    rule: Rule,
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: Form = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
    **hyperparams: ScalarOrSchedule | Option,
) -> Transformation:
    """Make an optimizer from a declared rule, with every option of the built-in ones.

    Args:
      rule: a declared variant; see `rule`.
      learning_rate: η ≥ 0, or a schedule of the step count.
      weight_decay: λ ≥ 0, or a schedule of the step count; None for none.
      weight_decay_mask: the leaves to decay: a tree of bools, a prefix of one, or a function of
        the parameters that returns one, such as `not_matching('bias')`.
      weight_decay_form: "decoupled": -η·λ·p, as in PyTorch and Optax; "independent": -λ·p;
        "cautious": -η·λ·p where the step also shrinks p; "proximal": division by 1 + ηλ after the
        step; "l2": λ·p added to the gradient.
      cautious: whether to mask the direction as `adam_jax.cautious` does.
      storage: the format of the moments; see `scale_by_rule`.
      implementation: how a leaf's step is executed; see `scale_by_rule`.
      **hyperparams: the rule's hyperparameters, required unless they have defaults.

    Returns:
      an Optax transformation. Updates have the gradients' dtypes; all arithmetic is float32, or
      float64 for float64 leaves.

    Raises:
      ValueError: a number or name is invalid; at update, gradients don't match the parameters.
      TypeError: a leaf is neither floating point nor complex.

    >>> import adam_jax, jax.numpy as jnp
    >>> @adam_jax.rule(mu=adam_jax.signed)
    ... def sign_momentum(g, mu, *, b1=0.9):
    ...     mu = adam_jax.ema(b1, mu, g)
    ...     return jnp.sign(mu), mu
    >>> from_rule(sign_momentum, 1e-3, b1=0.95)
    sign_momentum(learning_rate=0.001, b1=0.95)
    """
    errors.a_rule("from_rule", rule, Rule)
    shown = {"weight_decay": weight_decay, "storage": storage, "cautious": cautious or None}
    shown = {k: v for k, v in shown.items() if v is not None}
    text = call_text(rule.name, {"learning_rate": learning_rate, **hyperparams, **shown})
    with errors.error_context(rule.name):
        chain = descend(
            link(rule, hyperparams, storage=storage),
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            weight_decay_form=weight_decay_form,
            cautious=cautious,
            implementation=implementation,
        )
        return chain.transformation(text)

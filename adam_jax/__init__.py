"""The Adam family for JAX: Optax transformations, each written once, as its paper has it."""

from adam_jax import rules
from adam_jax.arithmetic import abs_sq, debias, ema, sqrt
from adam_jax.declare import positive, rule, signed
from adam_jax.optimizers import (
    adam,
    adamax,
    adamaxw,
    adamw,
    amsgrad,
    from_rule,
    nadam,
    nadamw,
    radam,
    rmsprop,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_nadam,
    scale_by_radam,
    scale_by_rms,
    scale_by_rule,
    scale_by_stddev,
    sgd,
    trace,
)
from adam_jax.paths import matching, not_matching
from adam_jax.states import moments, step_count
from adam_jax.transformation import chain

__version__ = "0.1.0"

__all__ = [
    "abs_sq",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "amsgrad",
    "chain",
    "debias",
    "ema",
    "from_rule",
    "matching",
    "moments",
    "nadam",
    "nadamw",
    "not_matching",
    "positive",
    "radam",
    "rmsprop",
    "rule",
    "rules",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_nadam",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rule",
    "scale_by_stddev",
    "sgd",
    "signed",
    "sqrt",
    "step_count",
    "trace",
]

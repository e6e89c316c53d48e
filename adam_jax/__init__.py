"""The Adam family for JAX: Optax transformations, each written once, as in its paper."""

from adam_jax import diagnostics, interop, optimizers, rules, schedules, storage
from adam_jax._engine.apply import apply
from adam_jax._engine.state import moments, reset_step_count, step_count
from adam_jax._util.declare import initial_param, positive, rule, running_max, scalar, signed
from adam_jax._util.numerics import abs_sq, debias, ema, sqrt
from adam_jax._util.paths import matching, not_matching
from adam_jax.analysis.catalogue import catalogue
from adam_jax.analysis.compare import compare
from adam_jax.analysis.memory import memory_report
from adam_jax.interop import convert_state
from adam_jax.optimizers import *  # noqa: F403  # adam, adamw, scale_by_adam, …
from adam_jax.transforms.chain import chain
from adam_jax.transforms.clip import clip_by_global_norm
from adam_jax.transforms.gradient_release import gradient_release
from adam_jax.transforms.groups import groups
from adam_jax.transforms.master_weights import (
    get_master_weights,
    master_weights,
    stochastic_rounding,
)
from adam_jax.transforms.previous_norm import clip_to_previous_norm
from adam_jax.transforms.tunable import get_hyperparams, set_hyperparams, tunable
from adam_jax.transforms.wrappers import cautious, grams, mars
from adam_jax.transforms.zero import state_sharding, zero1

__version__ = "0.1.0"

__all__ = [
    "abs_sq",
    "apply",
    "catalogue",
    "cautious",
    "chain",
    "clip_by_global_norm",
    "clip_to_previous_norm",
    "compare",
    "convert_state",
    "debias",
    "diagnostics",
    "ema",
    "get_hyperparams",
    "get_master_weights",
    "gradient_release",
    "grams",
    "groups",
    "initial_param",
    "interop",
    "mars",
    "master_weights",
    "matching",
    "memory_report",
    "moments",
    "not_matching",
    "positive",
    "reset_step_count",
    "rule",
    "rules",
    "running_max",
    "scalar",
    "schedules",
    "set_hyperparams",
    "signed",
    "sqrt",
    "state_sharding",
    "step_count",
    "stochastic_rounding",
    "storage",
    "tunable",
    "zero1",
]
__all__ += optimizers.__all__

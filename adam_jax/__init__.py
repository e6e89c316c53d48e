"""The Adam family for JAX: Optax transformations, each written once, as its paper has it."""

from adam_jax import interop, rules, schedules, storage
from adam_jax._engine.apply import apply
from adam_jax._engine.state import moments, step_count
from adam_jax._util.declare import positive, rule, running_max, signed
from adam_jax._util.numerics import abs_sq, debias, ema, sqrt
from adam_jax._util.paths import matching, not_matching
from adam_jax.analysis import diagnostics
from adam_jax.analysis.compare import compare
from adam_jax.analysis.memory import memory_report
from adam_jax.interop import convert_state
from adam_jax.optimizers._catalogue import catalogue
from adam_jax.optimizers._constructors import (
    adabelief,
    adam,
    adam_atan2,
    adamax,
    adamaxw,
    adamw,
    adan,
    ademamix,
    adopt,
    amsgrad,
    from_rule,
    lamb,
    laprop,
    lion,
    nadam,
    nadamw,
    radam,
    rmsprop,
    sgd,
    simplified_ademamix,
    stable_adamw,
    yogi,
)
from adam_jax.optimizers._directions import (
    scale_by_adam,
    scale_by_adam_atan2,
    scale_by_adamax,
    scale_by_adan,
    scale_by_ademamix,
    scale_by_adopt,
    scale_by_amsgrad,
    scale_by_belief,
    scale_by_laprop,
    scale_by_lion,
    scale_by_nadam,
    scale_by_radam,
    scale_by_rms,
    scale_by_rule,
    scale_by_simplified_ademamix,
    scale_by_stable_adamw,
    scale_by_stddev,
    scale_by_yogi,
    trace,
)
from adam_jax.optimizers.schedule_free_adamw import schedule_free_adamw, schedule_free_eval_params
from adam_jax.transforms.chain import chain
from adam_jax.transforms.groups import groups
from adam_jax.transforms.master_weights import (
    get_master_weights,
    master_weights,
    stochastic_rounding,
)
from adam_jax.transforms.tunable import get_hyperparams, set_hyperparams, tunable
from adam_jax.transforms.wrappers import cautious, grams, mars
from adam_jax.transforms.zero import state_sharding, zero1

__version__ = "0.1.0"

__all__ = [
    "abs_sq",
    "adabelief",
    "adam",
    "adam_atan2",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "apply",
    "catalogue",
    "cautious",
    "chain",
    "compare",
    "convert_state",
    "debias",
    "diagnostics",
    "ema",
    "from_rule",
    "get_hyperparams",
    "get_master_weights",
    "grams",
    "groups",
    "interop",
    "lamb",
    "laprop",
    "lion",
    "mars",
    "master_weights",
    "matching",
    "memory_report",
    "moments",
    "nadam",
    "nadamw",
    "not_matching",
    "positive",
    "radam",
    "rmsprop",
    "rule",
    "rules",
    "running_max",
    "scale_by_adam",
    "scale_by_adam_atan2",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_laprop",
    "scale_by_lion",
    "scale_by_nadam",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rule",
    "scale_by_simplified_ademamix",
    "scale_by_stable_adamw",
    "scale_by_stddev",
    "scale_by_yogi",
    "schedule_free_adamw",
    "schedule_free_eval_params",
    "schedules",
    "set_hyperparams",
    "sgd",
    "signed",
    "simplified_ademamix",
    "sqrt",
    "stable_adamw",
    "state_sharding",
    "step_count",
    "stochastic_rounding",
    "storage",
    "trace",
    "tunable",
    "yogi",
    "zero1",
]

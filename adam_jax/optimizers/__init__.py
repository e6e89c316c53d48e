"""The optimizers, one file per variant."""

# Written by tools/exports.py, so that type checkers see every name.
from adam_jax.optimizers.adabelief import adabelief, scale_by_belief
from adam_jax.optimizers.adam import adam, adamw, scale_by_adam
from adam_jax.optimizers.adam_atan2 import adam_atan2, scale_by_adam_atan2
from adam_jax.optimizers.adam_s import adam_s, scale_by_adam_s
from adam_jax.optimizers.adamax import adamax, adamaxw, scale_by_adamax
from adam_jax.optimizers.adamh import adamh
from adam_jax.optimizers.adan import adan, scale_by_adan
from adam_jax.optimizers.ademamix import ademamix, scale_by_ademamix
from adam_jax.optimizers.adopt import adopt, scale_by_adopt
from adam_jax.optimizers.amsgrad import amsgrad, scale_by_amsgrad
from adam_jax.optimizers.from_rule import from_rule, scale_by_rule
from adam_jax.optimizers.lamb import lamb
from adam_jax.optimizers.laprop import laprop, scale_by_laprop
from adam_jax.optimizers.lion import lion, scale_by_lion
from adam_jax.optimizers.nadam import nadam, nadamw, scale_by_nadam
from adam_jax.optimizers.novograd import novograd, scale_by_novograd
from adam_jax.optimizers.prodigy import prodigy
from adam_jax.optimizers.radam import radam, scale_by_radam
from adam_jax.optimizers.rmsprop import rmsprop, scale_by_rms, scale_by_stddev
from adam_jax.optimizers.schedule_free_adamw import schedule_free_adamw, schedule_free_eval_params
from adam_jax.optimizers.sgd import sgd, trace
from adam_jax.optimizers.simplified_ademamix import (
    scale_by_simplified_ademamix,
    simplified_ademamix,
)
from adam_jax.optimizers.stable_adamw import scale_by_stable_adamw, stable_adamw
from adam_jax.optimizers.yogi import scale_by_yogi, yogi

__all__ = [
    "adabelief",
    "adam",
    "adam_atan2",
    "adam_s",
    "adamax",
    "adamaxw",
    "adamh",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "from_rule",
    "lamb",
    "laprop",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "prodigy",
    "radam",
    "rmsprop",
    "scale_by_adam",
    "scale_by_adam_atan2",
    "scale_by_adam_s",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_laprop",
    "scale_by_lion",
    "scale_by_nadam",
    "scale_by_novograd",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rule",
    "scale_by_simplified_ademamix",
    "scale_by_stable_adamw",
    "scale_by_stddev",
    "scale_by_yogi",
    "schedule_free_adamw",
    "schedule_free_eval_params",
    "sgd",
    "simplified_ademamix",
    "stable_adamw",
    "trace",
    "yogi",
]

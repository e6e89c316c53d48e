"""NAdam and NAdamW."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, Unpack, get_args

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util import errors
from adam_jax._util.typing import DecayRate, DType, Mask, NonNegative, PyTree, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import (
    DecayOptions,
    MaskOptions,
    Options,
    direction,
    link_of,
    optimizer,
)
from adam_jax.optimizers.adam import scale_by_adam
from adam_jax.storage import Storage
from adam_jax.storage._policy import with_dtype

__all__ = ["nadam", "nadamw", "scale_by_nadam"]

Correction: TypeAlias = Literal["optax", "algoperf"]


@direction
def scale_by_nadam(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    *,
    momentum_decay: NonNegative | None = None,
    correction: Correction = "optax",
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `nadam`.

    >>> scale_by_nadam(momentum_decay=0.004)
    scale_by_nadam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, momentum_decay=0.004)
    """
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    errors.choice("correction", correction, get_args(Correction))
    given: dict[str, PyTree] = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    if momentum_decay is None:
        return link(rules.nadam, {**given, "correction": correction}, storage=storage)
    if correction != "optax":
        raise errors.value_error(
            f"correction must be 'optax' with momentum_decay={momentum_decay}, got {correction!r}, "
            f"which has a constant momentum; omit one of them"
        )
    return link(rules.nadam_scheduled, {**given, "momentum_decay": momentum_decay}, storage=storage)


@optimizer(
    paper="Dozat, ICLR workshop",
    year=2016,
    formula="(β₁·m̂₊ + (1−β₁)·ĝ) / (√v̂ + ε)",
    purpose="Adam with Nesterov momentum",
    learning_rate="1",
)
def nadam(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    *,
    nesterov: bool = True,
    momentum_decay: NonNegative | None = None,
    correction: Correction = "optax",
    **options: Unpack[DecayOptions],
) -> Chain:
    """NAdam: Adam with Nesterov's look-ahead.

    An estimate of the next step's momentum replaces the numerator of `adam`.
    Source: Dozat (2016), Incorporating Nesterov Momentum into Adam.

    Args:
      nesterov: False gives `adam`, as in Optax.
      momentum_decay: None for a constant momentum, as in Optax, or d ≥ 0 (0.004 in
        PyTorch, 1.0 in Keras) for b1·(1 - ½·0.96^(t·d)).
      correction: the bias correction of the look-ahead momentum; see `nadamw`.

    >>> nadam(1e-3, momentum_decay=0.004)  # torch.optim.NAdam
    nadam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, \
momentum_decay=0.004)
    """
    along = _along(
        nesterov,
        (b1, b2, eps, eps_root, mu_dtype),
        momentum_decay=momentum_decay,
        correction=correction,
        storage=options.get("storage"),
    )
    return descend(along, learning_rate, **options)


@optimizer(
    paper="Dozat, ICLR workshop",
    year=2016,
    formula="(β₁·m̂₊ + (1−β₁)·ĝ) / (√v̂ + ε) + λ·p",
    purpose="AdamW with Nesterov momentum",
    learning_rate="1",
)
def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = True,
    momentum_decay: NonNegative | None = None,
    correction: Correction = "optax",
    **options: Unpack[MaskOptions],
) -> Chain:
    """NAdamW: `nadam` with decoupled weight decay.

    Source: Dozat (2016) and Loshchilov & Hutter (2019).

    Args:
      nesterov: False gives `adamw`, as in Optax.
      momentum_decay: None for a constant momentum, as in Optax, or d ≥ 0 (0.004 in
        PyTorch, 1.0 in Keras) for b1·(1 - ½·0.96^(t·d)).
      correction: the bias correction of b1·mu + (1 - b1)·g, the look-ahead momentum. "optax"
        divides mu by 1 - b1^(t+1), and g by 1 - b1^t. "algoperf" divides both by 1 - b1^t, like
        AlgoPerf's NAdamW (Choi et al. 2019, Table 1).

    >>> tx = nadamw(1e-3, weight_decay=0.05)
    """
    along = _along(
        nesterov,
        (b1, b2, eps, eps_root, mu_dtype),
        momentum_decay=momentum_decay,
        correction=correction,
        storage=options.get("storage"),
    )
    return descend(along, learning_rate, weight_decay=weight_decay, mask=mask, **options)


def _along(
    nesterov: bool,
    arguments: tuple[Any, ...],
    *,
    momentum_decay: NonNegative | None,
    correction: Correction,
    storage: Storage,
) -> Link:
    """Return the direction of NAdam, or of Adam if not `nesterov`."""
    if not nesterov:
        return link_of(scale_by_adam)(*arguments, storage=storage)
    return link_of(scale_by_nadam)(
        *arguments, momentum_decay=momentum_decay, correction=correction, storage=storage
    )

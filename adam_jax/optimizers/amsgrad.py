"""AMSGrad."""

from __future__ import annotations

from typing import Literal, Unpack

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link
from adam_jax._util import errors
from adam_jax._util.typing import DecayRate, DType, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import descend
from adam_jax.optimizers._constructor import DecayOptions, Options, direction, link_of, optimizer
from adam_jax.storage._policy import with_dtype

__all__ = ["amsgrad", "scale_by_amsgrad"]


@direction
def scale_by_amsgrad(
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_of: Literal["corrected", "raw"] = "corrected",
    **options: Unpack[Options],
) -> Link:
    """Return the direction of `amsgrad`.

    >>> tx = scale_by_amsgrad(max_of="raw")
    """
    errors.choice("max_of", max_of, ("corrected", "raw"))
    storage = with_dtype(options.get("storage"), "mu", "mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given |= {"bias_correction_mu": bias_correction_mu, "bias_correction_nu": bias_correction_nu}
    rule = rules.amsgrad if max_of == "corrected" else rules.amsgrad_raw
    return link(rule, given, storage=storage)


@optimizer(
    paper="Reddi et al., arXiv:1904.09237",
    year=2018,
    formula="m̂ / (√(max v̂) + ε)",
    purpose="converges where Adam may not",
    learning_rate="1–2",
)
def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DType = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_of: Literal["corrected", "raw"] = "corrected",
    **options: Unpack[DecayOptions],
) -> Chain:
    """AMSGrad: Adam whose second moment never decreases; it converges where Adam may not.

    Source: Reddi, Kale & Kumar (2018), On the Convergence of Adam and Beyond, Algorithm 2.

    Args:
      bias_correction_mu: whether to bias-correct mu.
      bias_correction_nu: whether to bias-correct nu.
      max_of: "corrected": the maximum of the bias-corrected nu (Optax); "raw": the maximum of nu,
        corrected afterwards (PyTorch, Keras; without corrections, the paper).

    >>> tx = amsgrad(1e-3, max_of="raw")  # torch.optim.Adam(amsgrad=True)
    """
    along = link_of(scale_by_amsgrad)(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        bias_correction_mu,
        bias_correction_nu,
        max_of=max_of,
        storage=options.get("storage"),
    )
    return descend(along, learning_rate, **options)

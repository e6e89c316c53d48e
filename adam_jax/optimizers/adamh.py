"""AdamH: Adam at constant norms of the weights."""

from __future__ import annotations

from typing import Unpack

from adam_jax._engine.chain import Chain
from adam_jax._util.typing import DecayRate, Mask, NonNegative, ScalarOrSchedule
from adam_jax.optimizers._common import step_on_sphere
from adam_jax.optimizers._constructor import Options, link_of, optimizer
from adam_jax.optimizers.adam import scale_by_adam

__all__ = ["adamh"]


@optimizer(
    paper="Wen et al., arXiv:2606.16899",
    year=2026,
    formula="R·u/‖u‖, then ‖p‖ := R = ‖p₀‖; u = m̂ / (√v̂ + ε)",
    purpose="constant norms in place of weight decay",
    learning_rate="2",
)
def adamh(
    learning_rate: ScalarOrSchedule,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.95,
    eps: NonNegative = 1e-8,
    mask: Mask = None,
    *,
    batch_axes: int | None = None,
    **options: Unpack[Options],
) -> Chain:
    """AdamH: Adam that keeps the initial Frobenius norm of each matrix.

    W ← R·n(W - η·R·n(u)), with Adam's direction u, n(x) = x/‖x‖, and R = ‖W‖ at init. η is the
    relative change of a matrix; start with √(ηλ) of a good AdamW run. There is no weight decay.
    Other leaves, and leaves of norm 0, take Adam's step -η·u; to give them another learning rate,
    use `groups`.
    Source: Wen et al. (2026), Hyperball Optimization, and Levanter's AdamH.

    Args:
      learning_rate: η ≥ 0, or a schedule of the step count.
      mask: the leaves that keep their norm: a tree of bools, or e.g. `not_matching('embed')`; by
        default, those with at least two axes besides `batch_axes`.
      batch_axes: the number of leading axes that stack matrices, such as scanned layers; each
        matrix keeps its own norm; None for 0.

    >>> tx = adamh(0.01)
    """
    along = link_of(scale_by_adam)(b1, b2, eps, storage=options.get("storage"))
    links = along, *step_on_sphere(learning_rate, mask, batch_axes or 0)
    return Chain("adamh", links, options.get("implementation", "auto"))

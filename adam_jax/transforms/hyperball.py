"""Steps at a constant norm of the weights, along any direction."""

from __future__ import annotations

import optax

from adam_jax._engine.chain import Chain
from adam_jax._engine.transformation import Transformation, describe, source_of, with_repr
from adam_jax._util import errors
from adam_jax._util.typing import FROM_ZERO, Mask, ScalarOrSchedule
from adam_jax.optimizers._common import step_on_sphere
from adam_jax.optimizers._constructor import call_text
from adam_jax.transforms.chain import chain
from adam_jax.transforms.wrappers import refuse_finished


def hyperball(
    direction: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    *,
    mask: Mask = None,
    batch_axes: int = 0,
) -> Transformation:
    """Step along any direction, and keep the initial Frobenius norm of each matrix.

    W ← R·n(W - η·R·n(u)), with the direction u, n(x) = x/‖x‖, and R = ‖W‖ at init, which the state
    keeps. η is the relative change of a matrix. There is no weight decay. Other leaves, and
    leaves of norm 0, take the step -η·u; to give them another learning rate, use
    `optax.partition`.

    `gradient_release` steps each layer by itself, so batch_axes=0 gives each layer its own norm.
    With batch_axes > 0, a leaf is stepped in XLA, whatever the implementation.
    Source: Wen et al. (2026), Hyperball Optimization, arXiv:2606.16899.

    Args:
      direction: a direction, ours or Optax's, such as `scale_by_adam()`. If it is ours, it runs in
        the same pass as the step.
      learning_rate: η ≥ 0, or a schedule of the step count.
      mask: the leaves that keep their norm: a tree of bools, a prefix of one, or a function of the
        parameters, such as `not_matching("embed")`; by default, those with at least two axes
        besides `batch_axes`.
      batch_axes: the number of leading axes that stack matrices, such as scanned layers; each
        matrix keeps its own norm.

    Returns:
      a finished optimizer. Its update needs the parameters.

    Raises:
      TypeError: direction isn't a transformation.
      ValueError: direction is a finished optimizer; a number is out of range.

    >>> import adam_jax
    >>> hyperball(adam_jax.scale_by_lion(), 0.01)
    hyperball(direction=scale_by_lion(b1=0.9, b2=0.99, smooth_beta=1.0), learning_rate=0.01)
    """
    with errors.error_context("hyperball"):
        errors.transformation("direction", direction, "hyperball(direction, learning_rate)")
        refuse_finished("hyperball", direction)
        errors.in_range("learning_rate", learning_rate, FROM_ZERO)
        links = step_on_sphere(learning_rate, mask, batch_axes)
    shown = {"direction": describe(direction), "learning_rate": learning_rate}
    shown |= {} if mask is None else {"mask": mask}
    shown |= {"batch_axes": batch_axes} if batch_axes else {}
    text = call_text("hyperball", shown)
    source = source_of(direction)
    if isinstance(source, Chain):
        together = (*source.links, *links)
        return Chain("hyperball", together, source.implementation).transformation(text)
    return with_repr(chain(direction, Chain("hyperball", links, "auto").transformation()), text)

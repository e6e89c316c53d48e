"""The chain that optimizers build around a direction."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Link, link, mask_tree
from adam_jax._engine.hyperparams import Computed, is_schedule
from adam_jax._engine.state import WeightDecaySchedule
from adam_jax._util import errors
from adam_jax._util.numerics import norm
from adam_jax._util.typing import Mask, PyTree, ScalarOrSchedule
from adam_jax.storage import Storage

DECAYS = {
    "decoupled": rules.decay_decoupled,
    "independent": rules.decay_independent,
    "cautious": rules.decay_cautious,
    "proximal": rules.decay_proximal,
    "l2": rules.decay_decoupled,
}


def descend(
    direction: Link,
    learning_rate: ScalarOrSchedule | Computed | None,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Mask = None,
    weight_decay_mask: Mask = None,
    weight_decay_form: str = "decoupled",
    cautious: bool = False,
    storage: Storage = None,
    implementation: str = "auto",
    scale: Sequence[Link] = (),
    momentum: Sequence[Link] = (),
) -> Chain:
    """Return the chain of a direction, weight decay, and a learning rate.

    `scale` comes after weight decay. `momentum` comes last. But with weight decay or `cautious`, it
    comes right after the direction, so that it averages only the direction.
    """
    del storage  # already used by `direction`
    mask = errors.one_mask(mask, weight_decay_mask)
    errors.choice("weight_decay_form", weight_decay_form, DECAYS)
    errors.mask_without_decay(weight_decay, mask)
    decay = ()
    if weight_decay is not None:
        decay = (_decay(weight_decay, learning_rate, mask, weight_decay_form),)
    before, after = ((*momentum,), ()) if decay or cautious else ((), momentum)
    links = (
        *(decay if weight_decay_form == "l2" else ()),
        direction,
        *before,
        *([link(rules.cautious, {})] if cautious else ()),
        *(decay if weight_decay_form in ("decoupled", "cautious", "proximal") else ()),
        *scale,
        _descend(learning_rate),
        *(decay if weight_decay_form == "independent" else ()),
        *after,
    )
    return Chain(direction.rule.name, links, implementation, bare=False)


def _decay(
    weight_decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule | Computed | None,
    mask: Mask,
    form: str,
) -> Link:
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return link(rules.identity, {}, mask=mask)  # requires no parameters
    given: dict[str, ScalarOrSchedule | Computed | None] = {"weight_decay": weight_decay}
    if form == "proximal":
        given["learning_rate"] = learning_rate
    state = WeightDecaySchedule if any(map(is_schedule, given.values())) else None
    return link(DECAYS[form], given, state=state, mask=mask)


def step_on_sphere(
    learning_rate: ScalarOrSchedule, mask: Mask, batch_axes: int
) -> tuple[Link, Link]:
    """Return the links that step selected leaves at a constant norm, and others by -η·u.

    By default, `mask` selects leaves with at least two axes besides `batch_axes`.
    """
    errors.integer_at_least(0, "batch_axes", batch_axes)

    def matrices(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: np.ndim(x) - batch_axes >= 2, tree)

    chosen: PyTree = matrices if mask is None else mask

    def others(tree: PyTree) -> PyTree:
        return jax.tree.map(operator.not_, mask_tree(chosen, tree), is_leaf=lambda x: x is None)

    plain = dataclasses.replace(_descend(learning_rate), mask=others)
    given = {"learning_rate": learning_rate}
    sphere = link(rules.hyperball, given, state=HyperballState, mask=chosen)
    start = functools.partial(norm, batch_axes=batch_axes)
    return plain, dataclasses.replace(sphere, starts={"radius": start})


class HyperballState(NamedTuple):
    """The state of the step at a constant norm."""

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name
    radius: PyTree
    """The norm of each leaf, or of each entry of its first axes."""


def _descend(learning_rate: ScalarOrSchedule | Computed | None) -> Link:
    if learning_rate is None:
        return link(rules.identity, {})
    state = optax.ScaleByScheduleState if is_schedule(learning_rate) else None
    return link(rules.descend, {"learning_rate": learning_rate}, state=state)

"""The chain that optimizers build around a direction."""

from __future__ import annotations

from collections.abc import Sequence

import optax

from adam_jax import rules
from adam_jax._engine.chain import Chain, Computed, Link, is_schedule, link
from adam_jax._engine.state import WeightDecaySchedule
from adam_jax._util import errors
from adam_jax._util.typing import Mask, ScalarOrSchedule
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

    `scale` comes after weight decay; `momentum` comes after the learning rate. With weight decay or
    `cautious`, `momentum` comes right after the direction, so it averages only that.
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


def _descend(learning_rate: ScalarOrSchedule | Computed | None) -> Link:
    if learning_rate is None:
        return link(rules.identity, {})
    state = optax.ScaleByScheduleState if is_schedule(learning_rate) else None
    return link(rules.descend, {"learning_rate": learning_rate}, state=state)

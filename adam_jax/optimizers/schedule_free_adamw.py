"""Schedule-Free AdamW: no learning-rate schedule, an average of the iterates in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from adam_jax import rules
from adam_jax._engine.apply import step
from adam_jax._engine.chain import Chain, link
from adam_jax._engine.state import RmsCounted, named_tuples
from adam_jax._engine.transformation import Transformation, transformation_of
from adam_jax._util import errors
from adam_jax._util.numerics import arithmetic_dtype
from adam_jax._util.typing import DecayRate, DType, NonNegative, Numeric, PyTree, ScalarOrSchedule
from adam_jax.optimizers._constructor import Options, optimizer
from adam_jax.storage import Quantized
from adam_jax.storage._policy import unquantized, with_dtype

__all__ = ["schedule_free_adamw", "schedule_free_eval_params"]


class _Iterate(NamedTuple):
    """The state of the link that moves z; with a count, so that bfloat16 rounds without bias."""

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name
    z: optax.Params


@optimizer(
    paper="Defazio et al., arXiv:2405.15682",
    year=2024,
    formula="g / (√v̂ + ε) + λ·y moves z; y between z and its mean x",
    purpose="no schedule needed; evaluate at x",
    learning_rate="1–10",
)
def schedule_free_adamw(
    learning_rate: ScalarOrSchedule = 0.0025,
    warmup_steps: int | None = None,
    b1: DecayRate = 0.9,
    b2: DecayRate = 0.999,
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.0,
    weight_lr_power: Numeric = 2.0,
    state_dtype: DType = None,
    **options: Unpack[Options],
) -> Transformation:
    """Schedule-Free AdamW: gradients are taken at y, between the fast z and its average x.

    z ← z - η_t·(g/(√v̂ + ε) + λ·y); x averages z, weighted by the largest η so far to the power
    weight_lr_power; y = (1 - b1)·z + b1·x is what is trained. Evaluate at x, which
    `schedule_free_eval_params` gives. There is nothing to schedule but a warmup.
    Source: Defazio et al. (2024), The Road Less Scheduled, and the authors' code. The state is
    Optax's. Optax's warmup is one step late in the step, not in the average's weight.

    Args:
      learning_rate: η ≥ 0, after the warmup; or a schedule of the count of steps made.
      warmup_steps: over how many steps η rises linearly; None for no warmup.
      b1: how far y is from z towards x, in (0, 1).
      weight_decay: λ ≥ 0, at y.
      weight_lr_power: ≥ 0, how much more a step of a larger η weighs in the average.
      state_dtype: the dtype of z; the same as storage={"z": dtype}. Codes are for nu alone.

    >>> import jax.numpy as jnp, optax
    >>> tx = schedule_free_adamw(0.0025, warmup_steps=100)
    >>> params = {"w": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones(2)}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> evaluated = schedule_free_eval_params(state, params)
    """
    errors.above_zero("b1", b1)
    formats = with_dtype(options.get("storage"), "z", "state_dtype", state_dtype)
    of_z = unquantized(formats, "z", "which holds parameters: each rounding would move them")

    scheduled = warmup_steps is not None or callable(learning_rate)
    rate_state = optax.ScaleByScheduleState if scheduled else None

    def chain(rate: ScalarOrSchedule, share: Numeric) -> Transformation:
        squares = {"decay": b2, "eps": eps, "eps_in_sqrt": False, "bias_correction": True}
        iterate = {"b1": b1, "share": share}
        links = (
            link(rules.rms, squares, storage=formats, state=RmsCounted),
            link(rules.decay_decoupled, {"weight_decay": weight_decay}),
            link(rules.descend, {"learning_rate": rate}, state=rate_state),
            link(rules.schedule_free, iterate, storage=of_z, state=_Iterate),
        )
        implementation = options.get("implementation", "auto")
        return Chain("schedule_free_adamw", links, implementation).transformation()

    errors.not_a_schedule("b1", b1)
    errors.at_least(0, "warmup_steps", warmup_steps)

    def warmed_up(count: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        rise = 1.0
        if warmup_steps is not None:
            rise = jnp.minimum((count + 1).astype(dtype) / max(warmup_steps, 1), 1)
        return jnp.asarray(rate, dtype) * rise

    # so that bad arguments raise here, and the learning rate can be found
    rate: PyTree = warmed_up if scheduled else learning_rate
    checked = chain(rate, 0.0)

    def init(params: optax.Params) -> PyTree:
        states: PyTree = chain(0.0, 0.0).init(params)
        *base, iterate = states
        without_leaves = isinstance(iterate.z, Quantized)  # z is never quantized
        z = iterate.z.codes if without_leaves else iterate.z
        z = jax.tree.map(lambda z, p: jnp.array(p, z.dtype), z, params)
        dtype = arithmetic_dtype(*(x.dtype for x in jax.tree.leaves(z))).type(0).real.dtype
        return optax.contrib.ScheduleFreeState(
            b1=jnp.asarray(b1, dtype),
            weight_sum=jnp.zeros([], dtype),
            step_count=jnp.ones([], jnp.int32),
            max_lr=jnp.zeros([], dtype),
            base_optimizer_state=tuple(base),
            z=z,
        )

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None,
        extra: Mapping[str, PyTree],
        *,
        emit_params: bool,
    ) -> tuple[PyTree, PyTree]:
        dtype = arithmetic_dtype(state.weight_sum.dtype)
        rate = warmed_up(state.step_count - 1, dtype)
        max_lr = jnp.maximum(state.max_lr.astype(dtype), rate)
        weight = jnp.asarray(max_lr**weight_lr_power)
        weight_sum = state.weight_sum.astype(dtype) + weight
        share = jnp.where(weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1), 0)
        inner = (*state.base_optimizer_state, _Iterate(state.step_count - 1, state.z))
        states: PyTree
        tx = chain(rate, share)
        updates, states = step(tx, updates, inner, params, extra, emit_params=emit_params)
        *base, iterate = states
        return updates, state._replace(
            weight_sum=weight_sum.astype(state.weight_sum.dtype),
            step_count=optax.safe_increment(state.step_count),
            max_lr=max_lr.astype(state.max_lr.dtype),
            base_optimizer_state=tuple(base),
            z=iterate.z,
        )

    return transformation_of((checked,), init, update, emits_params=True)


def schedule_free_eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The averaged parameters x of Schedule-Free, to evaluate and to keep: (y - (1 - b1)·z) / b1.

    Args:
      state: the optimizer's state, also inside a chain; Optax's or ours.
      params: the parameters y that are trained.

    Returns:
      x, with the parameters' structure and dtypes.

    Raises:
      ValueError: there is no Schedule-Free state, or more than one.
    """
    found: list[PyTree] = [
        s for _, s in named_tuples(state) if isinstance(s, optax.contrib.ScheduleFreeState)
    ]
    if len(found) != 1:
        errors.not_one("schedule_free_eval_params", "Schedule-Free states", len(found))
    b1 = found[0].b1

    def average(y: PyTree, z: jax.Array) -> jax.Array:
        y = jnp.asarray(y)
        dtype = arithmetic_dtype(y.dtype, z.dtype)
        b = b1.astype(dtype)
        return ((y.astype(dtype) - (1 - b) * z.astype(dtype)) / b).astype(y.dtype)

    return jax.tree.map(average, params, found[0].z)

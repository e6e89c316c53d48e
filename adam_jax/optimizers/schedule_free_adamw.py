"""Schedule-Free AdamW: an average of the iterates in place of a learning-rate schedule."""

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
from adam_jax._util.numerics import arithmetic_dtype, real_dtype
from adam_jax._util.typing import DecayRate, DType, NonNegative, Numeric, PyTree, ScalarOrSchedule
from adam_jax.optimizers._constructor import Options, optimizer
from adam_jax.storage._moments import is_in_trees
from adam_jax.storage._policy import unquantized, with_dtype

__all__ = ["schedule_free_adamw", "schedule_free_eval_params"]


class _Iterate(NamedTuple):
    """The state of the link that updates z; the count enables stochastic rounding to bfloat16."""

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name
    z: optax.Params


@optimizer(
    paper="Defazio et al., arXiv:2405.15682",
    year=2024,
    formula="g / (√v̂ + ε) + λ·y moves z; y between z and its mean x",
    purpose="no schedule needed; evaluate at x",
    learning_rate="0.9",
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
    """Schedule-Free AdamW: gradients are taken at y, between the fast iterate z and its average x.

    z ← z - η_t·(g/(√v̂ + ε) + λ·y). x averages z, weighted by the largest η so far to the power
    weight_lr_power. The trained parameters are y = (1 - b1)·z + b1·x. Evaluate at x, from
    `schedule_free_eval_params`. No schedule is needed except for a warmup.
    Source: Defazio et al. (2024), The Road Less Scheduled, and the authors' code. The state is
    Optax's. In Optax, the warmup is one step late in z, but not in x's weights.

    Args:
      learning_rate: η ≥ 0 after the warmup, or a schedule of the step count.
      warmup_steps: the number of steps over which η rises linearly; None for no warmup.
      b1: the weight of x in y, in (0, 1).
      weight_decay: λ ≥ 0, applied at y.
      weight_lr_power: ≥ 0, the power of η that weights a step in the average.
      state_dtype: the dtype of z; equivalent to storage={"z": dtype}. Only nu can be quantized.

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
    z_storage = unquantized(formats, "z", "because rounding z changes the parameters")

    scheduled = warmup_steps is not None or callable(learning_rate)
    rate_state = optax.ScaleByScheduleState if scheduled else None

    def chain(rate: ScalarOrSchedule, share: Numeric) -> Transformation:
        squares = {"decay": b2, "eps": eps, "eps_in_sqrt": False, "bias_correction": True}
        iterate = {"b1": b1, "share": share}
        links = (
            link(rules.rms, squares, storage=formats, state=RmsCounted),
            link(rules.decay_decoupled, {"weight_decay": weight_decay}),
            link(rules.descend, {"learning_rate": rate}, state=rate_state),
            link(rules.schedule_free, iterate, storage=z_storage, state=_Iterate),
        )
        implementation = options.get("implementation", "auto")
        return Chain("schedule_free_adamw", links, implementation).transformation()

    errors.not_a_schedule("b1", b1)
    errors.at_least(0, "warmup_steps", warmup_steps)
    errors.not_a_schedule("warmup_steps", warmup_steps)
    errors.at_least(0, "weight_lr_power", weight_lr_power)
    errors.not_a_schedule("weight_lr_power", weight_lr_power)

    def warmed_up(count: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        rise = 1.0
        if warmup_steps is not None:
            rise = jnp.minimum((count + 1).astype(dtype) / max(warmup_steps, 1), 1)
        return jnp.asarray(rate, dtype) * rise

    # check the arguments now, and keep a chain from which `record` reads the learning rate
    rate: PyTree = warmed_up if scheduled else learning_rate
    checked = chain(rate, 0.0)

    def init(params: optax.Params) -> PyTree:
        states: PyTree = chain(0.0, 0.0).init(params)
        *base, iterate = states
        without_leaves = is_in_trees(iterate.z)  # leaves of z are never quantized
        z = iterate.z[0] if without_leaves else iterate.z
        z = jax.tree.map(lambda z, p: jnp.array(p, z.dtype), z, params)
        dtype = real_dtype(*(x.dtype for x in jax.tree.leaves(z)))
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
        errors.made_by_init(state, optax.contrib.ScheduleFreeState)
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

    named = errors.error_context("schedule_free_adamw")(update)
    return transformation_of((checked,), init, named, emits_params=True)


def schedule_free_eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """Return Schedule-Free's average x = (y - (1 - b1)·z) / b1, to evaluate and to save.

    Args:
      state: the optimizer's state, or a chain's; Optax's or ours.
      params: the trained parameters y.

    Returns:
      x, with the parameters' structure and dtypes.

    Raises:
      ValueError: there is no Schedule-Free state, or more than one.
    """
    found: list[PyTree] = [
        s for _, s in named_tuples(state) if isinstance(s, optax.contrib.ScheduleFreeState)
    ]
    if len(found) != 1:
        errors.not_one("schedule_free_eval_params", "Schedule-Free state", len(found))
    b1 = found[0].b1

    def average(y: PyTree, z: jax.Array) -> jax.Array:
        y = jnp.asarray(y)
        dtype = arithmetic_dtype(y.dtype, z.dtype)
        b = b1.astype(dtype)
        return ((y.astype(dtype) - (1 - b) * z.astype(dtype)) / b).astype(y.dtype)

    return jax.tree.map(average, params, found[0].z)

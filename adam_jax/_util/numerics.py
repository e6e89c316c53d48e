"""The few operations that every formula is made of, each accurate where the naive form is not."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._util.typing import Numeric, PyTree, Scalar

TINY = 2.0**-126
"""The least normal number of float32; XLA takes smaller ones for 0."""


def arithmetic_dtype(*dtypes: jax.typing.DTypeLike) -> np.dtype:
    """float32, or wider where a dtype is: what is computed in, whatever is stored."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Decay:
    """A decay rate b that also knows log b and 1 - b, which float32 cannot recover from b.

    It is a number in formulas: ``1 - b`` and ``b**t`` use the digits that it kept.

    >>> b = decay_rate(0.999999)
    >>> round(float(1 - b), 12)  # 1 - float32(0.999999) is 1.0132789e-06
    1e-06
    """

    value: Scalar
    log: Scalar
    complement: Scalar

    __array_ufunc__ = None  # NumPy scalars leave the arithmetic to us

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.value)

    def __add__(self, x: Scalar) -> Scalar:
        return self.value + x

    def __sub__(self, x: Scalar) -> Scalar:
        return self.value - x

    def __rsub__(self, x: Scalar) -> Scalar:
        exact = isinstance(x, (int, float)) and x == 1
        return self.complement if exact else x - self.value

    def __mul__(self, x: Scalar) -> Scalar:
        return self.value * x

    def __truediv__(self, x: Scalar) -> Scalar:
        return self.value / x

    def __rtruediv__(self, x: Scalar) -> Scalar:
        return x / self.value

    def __pow__(self, t: Scalar) -> Decay:
        log = t * self.log
        return Decay(jnp.exp(log), log, -jnp.expm1(log))

    def __rpow__(self, x: Scalar) -> Scalar:
        return x**self.value

    def __abs__(self) -> Scalar:
        return self.value

    def __neg__(self) -> Scalar:
        return 0 - self.value

    def __lt__(self, x: Scalar) -> PyTree:
        return self.value < x

    def __gt__(self, x: Scalar) -> PyTree:
        return self.value > x

    __radd__ = __add__
    __rmul__ = __mul__


def decay_rate(b: Decay | Numeric) -> Decay:
    """b with its logarithm and complement: in double on the host for a number, traced otherwise.

    A traced b that rounded up to 1 in its own dtype (0.999 does in bfloat16) becomes the largest
    value below 1: with b = 1 a moment would never move and its bias correction would divide by 0.
    """
    if isinstance(b, Decay):
        return b
    if isinstance(b, (int, float, np.floating)):
        b = float(b)
        return Decay(
            np.float64(b), np.float64(math.log(b) if b > 0 else -math.inf), np.float64(1 - b)
        )
    b = jnp.asarray(b)
    if not jnp.issubdtype(b.dtype, jnp.floating):
        b = b.astype(jnp.float32)
    b = jnp.minimum(b, jnp.asarray(1 - jnp.finfo(b.dtype).epsneg, b.dtype))
    b = b.astype(arithmetic_dtype(b.dtype))
    return Decay(b, jnp.log(b), 1 - b)


def ema(b: Decay | Numeric, m: jax.Array, x: jax.Array) -> jax.Array:
    """Exponential moving average: b·m + (1 - b)·x."""
    b = decay_rate(b)
    return jnp.asarray(b.value * m + b.complement * x)


def debias(m: Numeric, b: Decay | Numeric, t: Numeric) -> jax.Array:
    """m / (1 - b^t): the average of t values of an `ema` that started at zero."""
    return jnp.asarray(m / -jnp.expm1(t * decay_rate(b).log))


def least_square(mu: jax.Array, b1: Decay | Numeric, b2: Decay | Numeric) -> jax.Array:
    """Return the least that ema(b2, g²) can be, given mu = ema(b1, g): nu ≥ c·mu².

    By Cauchy–Schwarz c = (1 - b2)(1 - b1²/b2)/(1 - b1)², for b1² < b2. So Adam's step is at most
    1/√c, 7.3 for the defaults. There is no bound, and c is 0, for larger b1.
    """
    b1, b2 = decay_rate(b1), decay_rate(b2)
    overlap = 1 - b1.value * b1.value / jnp.maximum(b2.value, TINY)
    return jnp.maximum(overlap, 0) * b2.complement / (b1.complement * b1.complement) * (mu * mu)


def least_norm(mu: jax.Array, b1: Decay | Numeric, b2: Decay | Numeric) -> jax.Array:
    """Return the least that AdaMax's norm can be, given mu = ema(b1, g), for b1 < b2.

    The norm is at least b2^i·|g| for the gradient of i steps ago, and mu a sum of (1 - b1)·b1^i·g.
    """
    b1, b2 = decay_rate(b1), decay_rate(b2)
    overlap = 1 - b1.value / jnp.maximum(b2.value, TINY)
    return jnp.maximum(overlap, 0) / b1.complement * jnp.abs(mu)


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|², real for complex x."""
    return (x.conj() * x).real if jnp.iscomplexobj(x) else x * x


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """√x whose derivative at 0 is 0, not ∞, so that gradients through an update stay finite."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = sqrt(primals[0])
    return y, tangents[0] * jnp.where(y > 0, 0.5 / jnp.where(y > 0, y, 1), 0)


def averaging_length(b: Decay | Numeric, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RAdam's ρ_t and ρ_∞: how many values an `ema` averages after t steps, and finally.

    ρ_∞ = 2/(1-b) - 1 and ρ_t = ρ_∞ - 2t·b^t/(1-b^t) cancel to nothing as b approaches 1. With
    y = -t·log(b)/2 and L(y) = coth(y) - 1/y the same ρ_t is t·(1 - L(y)) + L(y/t), which does not.
    """
    b = decay_rate(b)
    y = -t * b.log / 2
    direct = 1 / jnp.maximum(y, 1) - 2 / jnp.expm1(2 * jnp.maximum(y, 1))
    rho = t * jnp.where(y > 1, direct, 1 - _langevin(jnp.minimum(y, 1)))
    final = jnp.asarray(2 / b.complement - 1)
    # L(y/t) = final + 2/log b; both forms are at hand, each good on its side of 1
    first = jnp.where(y > t, final + 2 / b.log, _langevin(jnp.minimum(y / t, 1)))
    return rho + first, final


def _langevin(y: jax.Array) -> jax.Array:
    """coth(y) - 1/y for 0 ≤ y ≤ 1, by Lambert's continued fraction (exact to 1e-16)."""
    fraction = jnp.full_like(y, 19.0)
    for odd in (17, 15, 13, 11, 9, 7, 5, 3):
        fraction = odd + y * y / fraction
    return y / fraction


def momentum_product(b: Decay | Numeric, momentum_decay: Numeric, t: Numeric) -> jax.Array:
    """NAdam's Π_{i≤t} μ_i with μ_i = b·(1 - ½·0.96^(i·momentum_decay)), without a state for it.

    From log(1 - x) = -Σ_k x^k/k with x = ½·r^i, summed over i first: a geometric series for each k.
    64 terms leave 2^-64.
    """
    b = decay_rate(b)
    k = jnp.arange(1, 65).astype(jnp.result_type(b.log))
    rate = k * momentum_decay * math.log(0.96)
    flat = rate == 0
    ratio = jnp.exp(rate) * jnp.expm1(t * rate) / jnp.where(flat, 1, jnp.expm1(rate))
    geometric = jnp.where(flat, t, ratio)
    return jnp.exp(t * b.log - jnp.sum(jnp.exp2(-k) / k * geometric))

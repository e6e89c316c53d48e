"""Operations that formulas share, some more accurate than their naive form."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._util.typing import Numeric, PyTree, Scalar

TINY = 2.0**-126
"""The smallest normal number of float32; XLA flushes smaller numbers to 0."""


def arithmetic_dtype(*dtypes: jax.typing.DTypeLike) -> np.dtype:
    """Return the dtype to compute in: float32, or wider if one of `dtypes` is."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def real_dtype(*dtypes: jax.typing.DTypeLike) -> np.dtype:
    """Return the real dtype to compute in, such as the dtype of sums of squares."""
    return jnp.finfo(arithmetic_dtype(*dtypes)).dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Decay:
    """A decay rate b with log b and 1 - b, which float32 cannot recover from b.

    In formulas, it acts like a number: ``1 - b`` and ``b**t`` use the stored digits.

    >>> b = decay_rate(0.999999)
    >>> round(float(1 - b), 12)  # 1 - float32(0.999999) is 1.0132789e-06
    1e-06
    """

    value: Scalar
    log: Scalar
    complement: Scalar

    __array_ufunc__ = None  # NumPy scalars defer to these operators

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
    """Return b as a `Decay`, computed in float64 on the host if b is a number.

    An array b that was rounded to 1 in its own dtype (as 0.999 in bfloat16) becomes the largest
    value below 1. With b = 1, a moment would never change, and bias correction would divide by 0.
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
    """Return the exponential moving average b·m + (1 - b)·x."""
    b = decay_rate(b)
    return jnp.asarray(b.value * m + b.complement * x)


def debias(m: Numeric, b: Decay | Numeric, t: Numeric) -> jax.Array:
    """Return m / (1 - b^t), which corrects the bias of an `ema` that started at zero."""
    return jnp.asarray(m / -jnp.expm1(t * decay_rate(b).log))


def least_square(mu: jax.Array, b1: Decay | Numeric, b2: Decay | Numeric) -> jax.Array:
    """Return c·mu², a lower bound on nu = ema(b2, g²), given mu = ema(b1, g).

    By Cauchy–Schwarz, c = (1 - b2)(1 - b1²/b2)/(1 - b1)² if b1² < b2. So Adam's direction is at
    most 1/√c, 7.3 for the defaults. For larger b1, there is no bound, and c is 0.
    """
    b1, b2 = decay_rate(b1), decay_rate(b2)
    overlap = 1 - b1.value * b1.value / jnp.maximum(b2.value, TINY)
    return jnp.maximum(overlap, 0) * b2.complement / (b1.complement * b1.complement) * (mu * mu)


def least_norm(mu: jax.Array, b1: Decay | Numeric, b2: Decay | Numeric) -> jax.Array:
    """Return a lower bound on AdaMax's norm, given mu = ema(b1, g), for b1 < b2.

    For the gradient g_i of i steps ago, the norm is at least b2^i·|g_i|; mu = Σ (1 - b1)·b1^i·g_i.
    """
    b1, b2 = decay_rate(b1), decay_rate(b2)
    overlap = 1 - b1.value / jnp.maximum(b2.value, TINY)
    return jnp.maximum(overlap, 0) / b1.complement * jnp.abs(mu)


def abs_sq(x: jax.Array) -> jax.Array:
    """Return |x|², real for complex x."""
    return (x.conj() * x).real if jnp.iscomplexobj(x) else x * x


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the real part of conj(x)·y, the terms of an inner product."""
    return (x.conj() * y).real if jnp.iscomplexobj(x) else x * y


def norm(x: jax.Array, batch_axes: int = 0) -> jax.Array:
    """Return ‖x‖, or one norm for each entry of the batch axes; 0 if x has no other axes."""
    if x.ndim < batch_axes + (batch_axes > 0):
        return jnp.zeros((), x.real.dtype)
    return jnp.sqrt(jnp.sum(abs_sq(x), axis=tuple(range(batch_axes, x.ndim))))


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """Return √x, with derivative 0 at 0, so that gradients through an update stay finite."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = sqrt(primals[0])
    return y, tangents[0] * jnp.where(y > 0, 0.5 / jnp.where(y > 0, y, 1), 0)


def averaging_length(b: Decay | Numeric, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return RAdam's ρ_t and ρ_∞: how many values an `ema` averages at step t and as t → ∞.

    By definition, ρ_∞ = 2/(1-b) - 1 and ρ_t = ρ_∞ - 2t·b^t/(1-b^t), whose terms cancel near b = 1.
    With y = -t·log(b)/2 and L(y) = coth(y) - 1/y, ρ_t is t·(1 - L(y)) + L(y/t), which is accurate.
    """
    b = decay_rate(b)
    y = -t * b.log / 2
    direct = 1 / jnp.maximum(y, 1) - 2 / jnp.expm1(2 * jnp.maximum(y, 1))
    rho = t * jnp.where(y > 1, direct, 1 - _langevin(jnp.minimum(y, 1)))
    final = jnp.asarray(2 / b.complement - 1)
    # L(y/t) = final + 2/log b, which is accurate only for y/t > 1
    first = jnp.where(y > t, final + 2 / b.log, _langevin(jnp.minimum(y / t, 1)))
    return rho + first, final


def _langevin(y: jax.Array) -> jax.Array:
    """Return coth(y) - 1/y for 0 ≤ y ≤ 1, by Lambert's continued fraction (exact to 1e-16)."""
    fraction = jnp.full_like(y, 19.0)
    for odd in (17, 15, 13, 11, 9, 7, 5, 3):
        fraction = odd + y * y / fraction
    return y / fraction


def momentum_product(b: Decay | Numeric, momentum_decay: Numeric, t: Numeric) -> jax.Array:
    """Return NAdam's Π_{i≤t} μ_i, with μ_i = b·(1 - ½·0.96^(i·momentum_decay)), statelessly.

    With r = 0.96^momentum_decay, log(1 - ½·r^i) = -Σ_k (½·r^i)^k/k. The sum over i is a geometric
    series for each k. After 64 terms, the error is 2^-64.
    """
    b = decay_rate(b)
    k = jnp.arange(1, 65).astype(jnp.result_type(b.log))
    rate = k * momentum_decay * math.log(0.96)
    flat = rate == 0
    ratio = jnp.exp(rate) * jnp.expm1(t * rate) / jnp.where(flat, 1, jnp.expm1(rate))
    geometric = jnp.where(flat, t, ratio)
    return jnp.exp(t * b.log - jnp.sum(jnp.exp2(-k) / k * geometric))


def sum_of_squares(tree: PyTree) -> jax.Array:
    """Return the sum of |x|² over all arrays of a tree, in at least float32."""
    dtype = real_dtype(*(x.dtype for x in jax.tree.leaves(tree)))
    squares = [jnp.sum(abs_sq(x.astype(arithmetic_dtype(x.dtype)))) for x in jax.tree.leaves(tree)]
    return sum((x.astype(dtype) for x in squares), jnp.zeros([], dtype))

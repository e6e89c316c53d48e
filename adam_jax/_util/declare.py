"""The declaration of a rule: its moments and scalars, with their initial values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from adam_jax._util.typing import PyTree

INPUTS = ("t", "g", "p", "mean", "size")
"""The keywords that the engine passes to a rule besides its hyperparameters."""

empty = inspect.Parameter.empty

Option: TypeAlias = bool | str | Callable[..., Any]
"""An argument of a rule that is fixed when the optimizer is made."""


Start: TypeAlias = Callable[[jax.Array], jax.Array]
"""The initial value of a moment, as a function of the parameter."""


class Moment(NamedTuple):
    """The declared properties of a moment."""

    signed: bool
    start: float | str | Start = 0.0
    average: bool = True
    """Whether it is an exponential average, so that its mean over an axis is one, too."""
    round_down: bool = False
    """Whether quantized storage rounds it down. Stochastic rounding would bias a maximum, which
    keeps every value that was rounded up."""
    bound: Callable[..., Any] | None = None
    """A function that returns a lower bound; see `at_least`."""
    bounds_step: bool = False
    """Whether the lower bound limits the step; see `at_least`."""
    exact: bool = False
    """Whether it keeps the parameter's dtype unless `storage` names it, and is never lossy."""
    one_per_leaf: bool = False
    """Whether the state has one number per leaf; see `per_leaf`."""

    def starting_at(self, start: float | str | Start) -> Moment:
        """Return the moment, starting at a number, a hyperparameter, or f(parameter).

        Args:
          start: a number, the name of a hyperparameter, or a function of the parameter.
        """
        return self._replace(start=start)

    def per_leaf(self) -> Moment:
        """Return the moment with one number per leaf, such as a norm, in at least float32.

        The rule reads and returns an array of the leaf's shape with equal elements. `storage=`
        doesn't apply to it.
        """
        return self._replace(one_per_leaf=True)

    def at_least(self, bound: Callable[..., Any], *, bounds_step: bool = False) -> Moment:
        """Return the moment, clamped to at least `bound(…)` when read from lossy storage.

        The arguments of `bound` are named after moments and hyperparameters of the rule. The bound
        must hold for exact moments. Lossy storage may break it, which makes steps larger than any
        step of the exact rule.

        Args:
          bound: a function of moments and hyperparameters.
          bounds_step: whether the clamped moment limits the step however wrong its stored value
            is. If so, storage="compact" factors the moment.
        """
        return self._replace(bound=bound, bounds_step=bounds_step)


signed: Moment = Moment(signed=True)
"""A moment of either sign, such as an average of gradients."""

positive: Moment = Moment(signed=False)
"""A moment that is never negative, such as an average of squared gradients."""

running_max: Moment = Moment(signed=False, average=False, round_down=True)
"""A running maximum, which is never negative. Quantized storage rounds it down."""

non_average: Moment = Moment(signed=False, average=False)
"""A non-negative moment that isn't an average, such as AdaMax's norm or Yogi's nu. Quantized
storage rounds it stochastically: rounding down would lower it by one code at every step."""


initial_param: Moment = Moment(signed=True, average=False, start=lambda p: p, exact=True)
"""The parameter before the first step, which a rule returns unchanged."""


class Scalar(NamedTuple):
    """The declaration of a number that all leaves share; see `rule`."""

    start: float | str = 0.0

    def starting_at(self, start: float | str) -> Scalar:
        """Return the scalar, starting at a number or at the named hyperparameter."""
        return Scalar(start)


scalar: Scalar = Scalar()
"""A number that all leaves share, such as Prodigy's estimate of the learning rate."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A formula for one array, with its declared moments and scalars; made by `rule`."""

    step: Callable[..., Any]
    moments: Mapping[str, Moment]
    scalars: Mapping[str, Scalar]
    update_scalars: Callable[..., Mapping[str, jax.Array]] | None
    totals: tuple[str, ...]
    """The names of the sums over all leaves that `update_scalars` takes."""
    inputs: tuple[str, ...]
    hyperparams: Mapping[str, PyTree]
    options: Mapping[str, Option]

    @property
    def name(self) -> str:
        return self.step.__name__

    def apply(
        self, u: jax.Array, moments: Sequence[jax.Array], values: Mapping[str, PyTree]
    ) -> PyTree:
        """Apply the formula, with its keyword arguments from `values`."""
        return call_by_name(functools.partial(self.step, u, *moments), values)

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of the state's fields other than step counts."""
        return (*self.moments, *self.scalars)

    def next_scalars(self, values: Mapping[str, PyTree]) -> Mapping[str, jax.Array]:
        """Return the scalars after a step.

        `values` has the totals, and the current scalars, hyperparameters, and `t`.
        """
        if self.update_scalars is None:
            return {}
        return call_by_name(self.update_scalars, values)

    def bounds(
        self, moments: Sequence[jax.Array], hyperparams: Mapping[str, PyTree]
    ) -> list[jax.Array | None]:
        """Return each moment's lower bound, given all moments, or None if it has no bound."""
        known = {**hyperparams, **dict(zip(self.moments, moments, strict=True))}
        return [
            m.bound(**{k: known[k] for k in _arguments(m.bound)}) if m.bound else None
            for m in self.moments.values()
        ]

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.step.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the formula to arrays."""
        return self.step(*args, **kwargs)

    def __repr__(self) -> str:
        return f"rule {self.name}({', '.join(self.fields)})"


def rule(
    *bare: Any,
    update_scalars: Callable[..., Mapping[str, jax.Array]] | None = None,
    **declared: Moment | Scalar,
) -> Callable[[Callable[..., Any]], Rule]:
    """Declare a variant of Adam: a function of one array, and its moments.

    The decorated function takes the gradient, its moments in the declared order, and any of these
    keyword arguments:

    - `t`, the step, counted from 1;
    - `p`, the parameter;
    - `g`, the gradient, for a rule whose first argument is another rule's direction;
    - `mean`: mean(x) is the mean of x over the whole leaf, and mean(x, y) computes two means in
      one pass. Don't use `jnp.mean`: the arrays may be only a part of the leaf;
    - `size`, the number of elements in the leaf;
    - the declared scalars, which all leaves share;
    - hyperparameters. Names such as b1 and b2 declare decay rates in [0, 1); eps must be ≥ 0. A
      default that is a bool, a string, or a function declares an option, fixed when the optimizer
      is made.

    It returns the direction, which is multiplied by the learning rate and then subtracted from the
    parameter, and the new moments. Arrays are float32 (float64 for float64 leaves) and have the
    leaf's shape. A rule with `update_scalars` also returns a dict of real arrays, whose sums over
    all leaves are the totals.

    Args:
      update_scalars: a function that computes the next step's scalars, once per step, and returns
        them in a dict. Its positional arguments are named after scalars and totals. Its
        keyword-only arguments are `t` and hyperparameters. Under a mask, totals include only leaves
        that the rule acts on. In your own `shard_map`, totals are sums over the local shards.
      **declared: moments and scalars, keyed by the name of the state's field. A moment is
        `signed`, `positive`, `running_max`, or `initial_param`. `.starting_at(…)` sets a start
        other than 0, `.per_leaf()` keeps one number per leaf, and `.at_least(…)` sets a lower bound
        for lossy storage. `scalar` is a number that all leaves share.

    Raises:
      TypeError: the function's arguments aren't the gradient and the declared moments in order, or
        `update_scalars` is missing for scalars.

    >>> import adam_jax
    >>> @adam_jax.rule(nu=adam_jax.positive)
    ... def rms_direction(g, nu, *, t, b2=0.99, eps=1e-8):
    ...     nu = adam_jax.ema(b2, nu, g * g)
    ...     return g / (adam_jax.debias(nu, b2, t) ** 0.5 + eps), nu
    >>> tx = adam_jax.from_rule(rms_direction, 1e-3, b2=0.95, weight_decay=0.1)
    """
    if bare:
        raise TypeError(
            "rule: the moments must be declared, got none; write "
            "@adam_jax.rule(mu=adam_jax.signed), or @adam_jax.rule() without moments"
        )

    moments = {name: m for name, m in declared.items() if not isinstance(m, Scalar)}
    scalars = {name: m for name, m in declared.items() if isinstance(m, Scalar)}

    def declare(step: Callable[..., Any]) -> Rule:
        positional, keywords = _parameters(step)
        for name, field in declared.items():
            reserved = name in ("count", *INPUTS[:1], *INPUTS[2:]) or name.startswith("_")
            if not isinstance(field, (Moment, Scalar)) or reserved:
                raise TypeError(
                    f"rule {step.__name__}: {name} must be a moment or a scalar, named other than "
                    f"count, t, p, mean, size, or _…, got {field!r}; declare it signed, positive, "
                    f"or scalar, or rename it"
                )
        if positional[1:] != list(moments):
            raise TypeError(
                f"rule {step.__name__}: the arguments after the gradient must be the declared "
                f"moments ({', '.join(moments)}) in that order, got ({', '.join(positional[1:])})"
            )
        for name, moment in moments.items():
            unknown = set(_arguments(moment.bound)) - {*moments, *keywords}
            if unknown:
                raise TypeError(
                    f"rule {step.__name__}: the bound of {name} must take moments and "
                    f"hyperparameters of the rule, got {', '.join(sorted(unknown))}"
                )
        if bool(scalars) != (update_scalars is not None):
            raise TypeError(
                f"rule {step.__name__}: update_scalars must be given if and only if scalars are "
                f"declared, got the scalars ({', '.join(scalars)}); pass a function that returns a "
                f"dict of the next step's scalars"
            )
        totals, more = _parameters(update_scalars) if update_scalars else ([], {})
        for name, default in more.items():
            if name in INPUTS[1:] or isinstance(default, (bool, str)) or _is_function(default):
                raise TypeError(
                    f"rule {step.__name__}: the keyword-only arguments of update_scalars must be t "
                    f"and numbers, got {name}; totals and scalars are positional"
                )
        keywords |= {k: v for k, v in more.items() if keywords.get(k, empty) is empty}
        named = {k: v for k, v in keywords.items() if k not in (*INPUTS, *scalars)}
        options = {k: v for k, v in named.items() if isinstance(v, (bool, str)) or _is_function(v)}
        return Rule(
            step=step,
            moments=moments,
            scalars=scalars,
            update_scalars=update_scalars,
            totals=tuple(name for name in totals if name not in scalars),
            inputs=tuple(k for k in keywords if k in INPUTS),
            hyperparams={k: v for k, v in named.items() if k not in options},
            options=options,
        )

    return declare


def _parameters(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the names of positional arguments, and the defaults of keyword-only ones."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return positional, {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def call_by_name(function: Callable[..., Any], values: Mapping[str, PyTree]) -> Any:
    """Call a function with its arguments from `values`."""
    return function(**{name: values[name] for name in inspect.signature(function).parameters})


def _arguments(function: Callable[..., Any] | None) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters) if function else ()


def _is_function(default: Any) -> bool:
    return callable(default) and default is not empty

"""How a rule is declared: the moments it carries, their sign, and where they start."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from adam_jax._util.typing import PyTree

INPUTS = ("t", "g", "p", "mean", "size")
"""The keywords that the engine passes to a rule beside its hyperparameters."""

Option: TypeAlias = bool | str | Callable[..., Any]
"""An argument of a rule that is fixed when the optimizer is made."""


class Moment(NamedTuple):
    """What storage must know about a moment."""

    signed: bool
    start: float | str = 0.0
    average: bool = True
    """Whether it is an average. Stochastic rounding is unbiased for averages; a maximum keeps what
    was rounded up by chance."""
    bound: Callable[..., Any] | None = None
    """The least that its exact value can be, from moments and hyperparameters by name."""

    def starting_at(self, start: float | str) -> Moment:
        """The same moment, starting at a number or at the hyperparameter of that name."""
        return self._replace(start=start)

    def at_least(self, bound: Callable[..., Any]) -> Moment:
        """Return the same moment, read from quantized storage as at least `bound(…)`.

        `bound` is given moments and hyperparameters of the rule by the names of its arguments. It
        must hold for the exact moments: quantized ones may break it, which makes a step larger than
        any that the exact rule takes.
        """
        return self._replace(bound=bound)


signed: Moment = Moment(signed=True)
"""A moment of either sign, such as an average of gradients."""

positive: Moment = Moment(signed=False)
"""A moment that is never negative, such as an average of squared gradients."""

running_max: Moment = Moment(signed=False, average=False)
"""A largest value so far, which is never negative. Quantized storage rounds it down."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A formula for one array with the declaration of its moments. Made by `rule`."""

    step: Callable[..., Any]
    moments: Mapping[str, Moment]
    inputs: tuple[str, ...]
    hyperparams: Mapping[str, PyTree]
    options: Mapping[str, Option]

    @property
    def name(self) -> str:
        return self.step.__name__

    def bounds(
        self, moments: Sequence[jax.Array], hyperparams: Mapping[str, PyTree]
    ) -> list[jax.Array | None]:
        """Return the least that each moment can be, given all of them; None without a bound."""
        known = {**hyperparams, **dict(zip(self.moments, moments, strict=True))}
        return [
            m.bound(**{k: known[k] for k in _arguments(m.bound)}) if m.bound else None
            for m in self.moments.values()
        ]

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.step.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The formula itself, on arrays."""
        return self.step(*args, **kwargs)

    def __repr__(self) -> str:
        return f"rule {self.name}({', '.join(self.moments)})"


def rule(*bare: Any, **moments: Moment) -> Callable[[Callable[..., Any]], Rule]:
    """Declare a variant of Adam: a function of one array, with the moments that it keeps.

    The decorated function takes the gradient, then its moments in the declared order, then by
    keyword any of these:

    - `t`, the step, counted from 1;
    - `p`, the parameter;
    - `g`, the gradient, for a rule whose first argument is another rule's direction;
    - `mean`: mean(x) is the mean of x over the whole leaf, and mean(x, y) are two means in one
      pass. An array that a rule is given may be a part of the leaf, so `jnp.mean` isn't;
    - `size`, how many elements the leaf has;
    - its hyperparameters. One named b1, b2, … is a decay rate, checked to be in [0, 1); eps must be
      ≥ 0. One whose default is a bool, a string, or a function is an option, fixed when the
      optimizer is made.

    It returns the direction (what the learning rate multiplies and the parameter loses) and the new
    moments. Everything is float32 (float64 for float64 leaves) and has the leaf's shape.

    Args:
      **moments: `signed`, `positive`, or `running_max`, by name, which become the fields of the
        optimizer's state. `.starting_at(…)` gives a start other than 0, and `.at_least(…)` a bound
        that quantized storage keeps.

    Raises:
      TypeError: the function's arguments are not the gradient and the declared moments in order.

    >>> import adam_jax
    >>> @adam_jax.rule(nu=adam_jax.positive)
    ... def rms_direction(g, nu, *, t, b2=0.99, eps=1e-8):
    ...     nu = adam_jax.ema(b2, nu, g * g)
    ...     return g / (adam_jax.debias(nu, b2, t) ** 0.5 + eps), nu
    >>> tx = adam_jax.from_rule(rms_direction, 1e-3, b2=0.95, weight_decay=0.1)
    """

    if bare:
        raise TypeError(
            "rule: declare the moments, e.g. @adam_jax.rule(mu=adam_jax.signed), or write "
            "@adam_jax.rule() for a rule without any"
        )

    def declare(step: Callable[..., Any]) -> Rule:
        parameters = inspect.signature(step).parameters.values()
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for name, moment in moments.items():
            if not isinstance(moment, Moment) or name == "count" or name.startswith("_"):
                raise TypeError(
                    f"rule {step.__name__}: {name}={moment!r} is no moment; declare it as signed "
                    f"or positive, by a name other than count (which the state has) or _name"
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
        named = {k: v for k, v in keywords.items() if k not in INPUTS}
        options = {k: v for k, v in named.items() if isinstance(v, (bool, str)) or _is_function(v)}
        return Rule(
            step=step,
            moments=moments,
            inputs=tuple(k for k in keywords if k in INPUTS),
            hyperparams={k: v for k, v in named.items() if k not in options},
            options=options,
        )

    return declare


def _arguments(function: Callable[..., Any] | None) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters) if function else ()


def _is_function(default: Any) -> bool:
    return callable(default) and default is not inspect.Parameter.empty

"""The family as data: what each optimizer computes, from which paper, what it keeps and is for."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from adam_jax._engine.transformation import Transformation
from adam_jax.optimizers import _constructors
from adam_jax.optimizers.schedule_free_adamw import schedule_free_adamw


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer of the family.

    Attributes:
      name: of the constructor, `adam_jax.<name>`.
      paper: its authors, and an arXiv number or a venue.
      year: of the paper.
      formula: what the learning rate η multiplies and the parameter p loses. g is the gradient,
        m and v the averages of g and g², a hat corrects for their start at 0, λ is weight decay.
      state: the arrays of a parameter's size that it keeps with its default arguments.
      purpose: what it is for, in a line.
      learning_rate: where to start, as a multiple of AdamW's learning rate.
    """

    name: str
    paper: str
    year: int
    formula: str
    state: tuple[str, ...]
    purpose: str
    learning_rate: str


# name: paper, year, formula, purpose, learning rate. The last is the authors' own advice or the
# quotient of the usual defaults; where neither exists the step's length decides.
_FACTS: dict[str, tuple[str, int, str, str, str]] = {
    "adam": (
        "Kingma & Ba, arXiv:1412.6980",
        2015,
        "m̂ / (√v̂ + ε)",
        "the classic, without weight decay",
        "1",
    ),
    "adamw": (
        "Loshchilov & Hutter, arXiv:1711.05101",
        2019,
        "m̂ / (√v̂ + ε) + λ·p",
        "the default; hard to beat if tuned",
        "1",
    ),
    "nadam": (
        "Dozat, ICLR workshop",
        2016,
        "(β₁·m̂₊ + (1−β₁)·ĝ) / (√v̂ + ε)",
        "Adam with Nesterov's look ahead",
        "1",
    ),
    "nadamw": (
        "Dozat, ICLR workshop",
        2016,
        "(β₁·m̂₊ + (1−β₁)·ĝ) / (√v̂ + ε) + λ·p",
        "AdamW with Nesterov's look ahead",
        "1",
    ),
    "amsgrad": (
        "Reddi et al., arXiv:1904.09237",
        2018,
        "m̂ / (√(max v̂) + ε)",
        "converges where Adam need not",
        "1",
    ),
    "adamax": (
        "Kingma & Ba, arXiv:1412.6980",
        2015,
        "m̂ / n, n = max(β₂·n, |g| + ε)",
        "bounded steps, rare large gradients",
        "2",
    ),
    "adamaxw": (
        "Kingma & Ba, arXiv:1412.6980",
        2015,
        "m̂ / n + λ·p, n as in adamax",
        "AdaMax with decoupled weight decay",
        "2",
    ),
    "radam": (
        "Liu et al., arXiv:1908.03265",
        2020,
        "r·m̂ / (√v̂ + ε), m̂ while ρ < 5",
        "training without a warmup",
        "1",
    ),
    "rmsprop": (
        "Tieleman & Hinton, lecture 6.5",
        2012,
        "g / √(v + ε)",
        "half the state; much used in RL",
        "1",
    ),
    "sgd": (
        "Polyak, USSR Comp. Math. 4(5)",
        1964,
        "g, or b = β·b + g",
        "no state; CNNs, with momentum",
        "≈ 100",
    ),
    "adabelief": (
        "Zhuang et al., arXiv:2010.07468",
        2020,
        "m̂ / (√ŝ + ε), s = ema (g − m)²",
        "long steps where g is predictable",
        "1",
    ),
    "yogi": (
        "Zaheer et al., NeurIPS",
        2018,
        "m̂ / (√v̂ + ε), v −= (1−β₂)·sign(v − g²)·g²",
        "sparse gradients; v falls slowly",
        "10",
    ),
    "adan": (
        "Xie et al., arXiv:2208.06677",
        2022,
        "(m̂ + β₂·d̂) / √(n̂ + ε), d = ema Δg",
        "large steps, for twice the state",
        "5–10",
    ),
    "laprop": (
        "Ziyin et al., arXiv:2002.04839",
        2020,
        "m̂, m = ema g / (√v̂ + ε)",
        "β₁ and β₂ chosen freely",
        "0.4–1",
    ),
    "adopt": (
        "Taniguchi et al., arXiv:2411.02853",
        2024,
        "m = ema clip(g / max(√vₜ₋₁, ε))",
        "converges with any β₂",
        "1",
    ),
    "ademamix": (
        "Pagliardini et al., arXiv:2409.03137",
        2024,
        "(m̂₁ + α·m₂) / (√v̂ + ε)",
        "runs of 10⁴ steps and more",
        "1",
    ),
    "simplified_ademamix": (
        "Morwani et al., arXiv:2502.02431",
        2025,
        "(m + α·g) / (√v̂ + ε), m = β₁·m + g",
        "AdEMAMix with Adam's state",
        "1 − β₁",
    ),
    "adam_atan2": (
        "Everett et al., arXiv:2407.05872",
        2024,
        "a·atan2(m̂, b·√v̂)",
        "no ε to tune; gradients of any scale",
        "1",
    ),
    "stable_adamw": (
        "Wortsman et al., arXiv:2304.13013",
        2023,
        "m̂ / (√v̂ + ε) / max(1, rms(g/√v̂)) + λ·p",
        "loss spikes; in place of clipping",
        "1",
    ),
    "lion": (
        "Chen et al., arXiv:2302.06675",
        2023,
        "sign(β₁·m + (1−β₁)·g) + λ·p",
        "half the state; wants 3–10 times the λ",
        "1/10–1/3",
    ),
    "lamb": (
        "You et al., arXiv:1904.00962",
        2020,
        "‖p‖/‖u‖·u, u = m̂ / (√v̂ + ε) + λ·p",
        "very large batches",
        "1–10",
    ),
    "schedule_free_adamw": (
        "Defazio et al., arXiv:2405.15682",
        2024,
        "g / (√v̂ + ε) + λ·y moves z; y between z and its mean x",
        "no schedule needed; evaluate at x",
        "1–10",
    ),
}

_HEADER = ("name", "p ← p − η·(…)", "state", "η", "for", "paper")
_WIDTHS = (19, 29, 9, 8, 20, 25)  # 120 columns with two spaces between


def constructors() -> dict[str, Callable[..., Transformation]]:
    """The family's constructors by name: what takes a learning rate first."""
    found = {
        name: make
        for name, make in vars(_constructors).items()
        if inspect.isfunction(make)
        and not name.startswith("_")
        and next(iter(inspect.signature(make).parameters), None) == "learning_rate"
    }
    return {**found, "schedule_free_adamw": schedule_free_adamw}


@functools.cache
def catalogue() -> tuple[Entry, ...]:
    """The family as data, one entry for each constructor.

    Returns:
      the entries in the order of the source; `Entry` explains their fields. Their state is read
      off the state that the constructor really makes.

    >>> import adam_jax
    >>> lion = next(entry for entry in adam_jax.catalogue() if entry.name == "lion")
    >>> lion.formula, lion.state, lion.learning_rate
    ('sign(β₁·m + (1−β₁)·g) + λ·p', ('mu',), '1/10–1/3')
    """
    return tuple(_entry(name, make) for name, make in constructors().items())


def table() -> str:
    """The catalogue as text, 120 columns wide.

    >>> print(table().splitlines()[2])  # doctest: +NORMALIZE_WHITESPACE
    adam    m̂ / (√v̂ + ε)    2: mu, nu    1    the classic, without    Kingma & Ba 2015,
    """
    rows = (_HEADER, tuple("─" * width for width in _WIDTHS), *map(_cells, catalogue()))
    return "\n".join(line for row in rows for line in _wrapped(row))


def markdown() -> str:
    """The catalogue as a Markdown table, for the README.

    >>> print(markdown().splitlines()[1])
    |---|---|---|---|---|---|
    """
    rows = [_row(_HEADER), "|---" * len(_HEADER) + "|"]
    for entry in catalogue():
        name, formula, *middle, paper = _cells(entry)
        rows.append(_row((f"`{name}`", f"`{formula}`", *middle, _linked(paper))))
    return "\n".join(rows)


def _entry(name: str, make: Callable[..., Transformation]) -> Entry:
    paper, year, formula, purpose, learning_rate = _FACTS[name]
    return Entry(name, paper, year, formula, _state(make), purpose, learning_rate)


def _state(make: Callable[..., Transformation]) -> tuple[str, ...]:
    """The fields of the state that have the parameter's shape."""
    shape = (7,)  # that of no step count
    state = jax.eval_shape(make(1.0).init, jax.ShapeDtypeStruct(shape, jnp.float32))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return tuple(path[-1].name for path, leaf in leaves if leaf.shape == shape)


def _cells(entry: Entry) -> tuple[str, ...]:
    state = f"{len(entry.state)}: {', '.join(entry.state)}" if entry.state else "none"
    authors, source = entry.paper.split(", ", maxsplit=1)
    paper = f"{authors} {entry.year}, {source}"
    return entry.name, entry.formula, state, entry.learning_rate, entry.purpose, paper


def _wrapped(cells: Sequence[str]) -> list[str]:
    """A row of the text table: as many lines as its longest cell needs."""
    columns = [_wrap(text, width) for text, width in zip(cells, _WIDTHS, strict=True)]
    lines = itertools.zip_longest(*columns, fillvalue="")
    return ["  ".join(map(_padded, line, _WIDTHS)).rstrip() for line in lines]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns (textwrap would count the hats)."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _width(longer) <= width else [*lines, word]
    return lines


def _width(text: str) -> int:
    """Columns on a screen, where a hat takes none."""
    return sum(not unicodedata.combining(character) for character in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:([\d.]+)", r"[\g<0>](https://arxiv.org/abs/\1)", paper)

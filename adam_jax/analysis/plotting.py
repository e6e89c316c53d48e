"""Figures of comparisons, recorded diagnostics, and the command line's training runs.

Matplotlib is imported when a figure is drawn. Figures have a white background in every style.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from adam_jax._util import errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from adam_jax.analysis.compare import Comparison

# Okabe and Ito's palette for color-blind readers, without yellow, which is too light on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")

MEASURES = {
    "learning_rate": "learning rate η",
    "gradient_norm": "norm of the gradient",
    "update_ratio": "‖update‖ / ‖weights‖",
}
"""The measures that are drawn as lines, with their axis labels."""


class LineStyle(TypedDict):
    """Keyword arguments of Matplotlib's `plot`."""

    color: str
    ls: str


def line_styles() -> Iterator[LineStyle]:
    """Return an endless iterator of line styles: all colors, then all colors with other dashes."""
    pairs = itertools.product(DASHES, COLORS)
    return itertools.cycle({"color": color, "ls": dashes} for dashes, color in pairs)


@contextlib.contextmanager
def _new_figure(caller: str, width: float, height: float) -> Generator[Figure, None, None]:
    with errors.needing_extra(caller):
        from matplotlib import style
        from matplotlib.figure import Figure
    with style.context("default"):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        yield figure
        figure.draw_without_rendering()  # ticks take the current style when they are created


def draw_comparison(result: Comparison) -> Figure:
    """Draw the final losses over the learning rates, and the losses at the best learning rate."""
    steps = next(iter(result.losses.values())).shape[-1]
    window = max(1, steps // 50)
    order = np.argsort(result.learning_rates)
    rates = np.array(result.learning_rates)[order]
    with _new_figure("compare: plot", 11, 4.5) as figure:
        left, right = figure.subplots(1, 2)
        for (name, losses), style in zip(result.losses.items(), line_styles(), strict=False):
            final = result.final(name)[order]
            diverged = np.asarray(np.isinf(final).any(axis=1))
            final = np.where(diverged[:, None], np.nan, final)
            _draw_mean(left, rates, final, name, style, marker="o")
            crosses = rates[diverged], np.full(diverged.sum(), 0.97)
            left.plot(*crosses, "x", color=style["color"], transform=left.get_xaxis_transform())
            best = result.best(name)
            if best is None:
                right.plot([], [], label=f"{name}: diverged", **style)
                continue
            windows = np.lib.stride_tricks.sliding_window_view(losses[best.index], window, axis=-1)
            label = f"{name}, η = {best.learning_rate:g}"
            _draw_mean(right, np.arange(window, steps + 1), windows.mean(-1).T, label, style)
        seeds = len(result.seeds)
        over = f", mean ± s.d. over {seeds} seeds" if seeds > 1 else ""
        averaged = f", running mean of {window} steps" if window > 1 else ""
        left.set(xscale="log", xlabel="learning rate η", ylabel="final training loss")
        left.set_title(f"Final loss (×: diverged){over}", fontsize=10)
        right.set(xlabel="step", ylabel="training loss")
        right.set_title(f"At the best learning rate{averaged}", fontsize=10)
        _set_scales(left, right, list(result.losses.values()))
    return figure


def _draw_mean(
    axes: Axes, x: np.ndarray, y: np.ndarray, label: str, style: LineStyle, marker: str = ""
) -> None:
    """Draw the mean over the seeds (the last axis of y), with a band of ± one s.d."""
    mean = y.mean(axis=-1)
    axes.plot(x, mean, label=label, marker=marker, ms=4, **style)
    if y.shape[-1] > 1:
        deviation = y.std(axis=-1, ddof=1)
        band = mean - deviation, mean + deviation
        axes.fill_between(x, *band, color=style["color"], alpha=0.2, lw=0)


def _set_scales(left: Axes, right: Axes, losses: list[np.ndarray]) -> None:
    # keep the log scale if a loss underflowed to 0
    positive = all(np.nanmin(x) >= 0 for x in losses)
    for axes in (left, right):
        axes.set_yscale("log" if positive else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    # a final loss far above the first losses would compress all others
    starts = np.array([x[..., 0].mean() for x in losses])
    start = float(np.max(starts, initial=-np.inf, where=np.isfinite(starts)))
    bottom, top = left.get_ylim()
    if bottom < start < top:
        left.set_ylim(bottom, start * 1.5 if positive else start + 0.5 * (start - bottom))


def draw_diagnostics(
    steps: np.ndarray, series: Mapping[str, Mapping[str, np.ndarray]], edges: np.ndarray
) -> Figure:
    """Draw measures over the steps.

    Args:
      steps: the steps that were measured.
      series: by measure, then by group, the values at these steps.
      edges: the edges of the signal-to-noise bins.
    """
    lines = [measure for measure in MEASURES if measure in series]
    ratios = series.get("signal_to_noise", {})
    size = 3.8 * max(len(lines), len(ratios)), 6.4 if ratios else 3.2
    with _new_figure("plot", *size) as figure:
        parts = figure.subfigures(2 if ratios else 1, squeeze=False)[:, 0]
        panels = parts[0].subplots(1, len(lines), squeeze=False)[0]
        for axes, measure in zip(panels, lines, strict=True):
            for (group, y), style in zip(series[measure].items(), line_styles(), strict=False):
                y = np.where((y > 0) & np.isfinite(y), y, np.nan)  # the axis is logarithmic
                axes.plot(steps, y, label=group, **style)
            axes.set(xlabel="step", ylabel=MEASURES[measure], yscale="log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        if ratios:
            _draw_histograms(parts[1], steps, ratios, edges)
    return figure


def _draw_histograms(
    part: SubFigure, steps: np.ndarray, ratios: Mapping[str, np.ndarray], edges: np.ndarray
) -> None:
    """Draw the histograms over the steps as a heat map for each group."""
    panels = part.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    # the first steps have almost all elements near 1, which would dominate the color scale
    top = max(float(np.quantile(shares.max(axis=1), 0.9)) for shares in ratios.values())
    bins = np.array([edges[0] / 2**0.5, *edges, edges[-1] * 2**0.5])
    ends = np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)
    for axes, (group, shares) in zip(panels, ratios.items(), strict=True):
        axes.pcolormesh(ends, bins, shares.T, vmin=0, vmax=top)
        axes.set(title=group, xlabel="step", yscale="log")
    panels[0].set_ylabel("|m̂| / √v̂")
    part.colorbar(panels[0].collections[0], ax=panels, label="share of elements")


def draw_training(
    losses: Mapping[str, np.ndarray], accuracies: Mapping[str, np.ndarray], rates: np.ndarray
) -> Figure:
    """Draw the losses and test accuracies of two runs, and their learning rate.

    Args:
      losses: by the name of the run, the training loss at every step.
      accuracies: by the name of the run, the test accuracy at equal intervals up to the last step.
      rates: the learning rate at every step.
    """
    steps = np.arange(1, len(rates) + 1)
    with _new_figure("plot", 8, 9) as figure:
        top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(3, 1.5, 2))
        # the second run is dashed on top of the first, so that both stay visible
        styles = dict(color=COLORS[1], lw=3, alpha=0.6), dict(color=COLORS[0], lw=1.2, ls="--")
        for name, style in zip(losses, styles, strict=True):
            interval = len(rates) // len(accuracies[name])
            top.semilogy(steps, losses[name], label=name, **style)
            bottom.plot(
                steps[interval - 1 :: interval], 100 * accuracies[name], label=name, **style
            )
        middle.plot(steps, rates, color=COLORS[2])
        top.set(title="A small classifier on digits", ylabel="training loss (nats per image)")
        middle.set(ylabel="learning rate")
        low = min(90, *bottom.get_ylim())
        bottom.set(ylabel="test accuracy (%)", xlabel="step", ylim=(low, 100))
        for axes in (top, middle, bottom):
            axes.grid(alpha=0.3)
        top.legend()
        bottom.legend()
    return figure

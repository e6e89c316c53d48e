"""Draw the docs' pictures from results: `python -m benchmarks.picture`.

memory.svg has bytes of state per parameter, ours and other packages' (results/peers.json).
family.svg has the family's losses at equal tuning (results/family.json). Each has a dark version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.report import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
THEMES = {
    "": {"text": "#1f2328", "ours": "#0072B2", "theirs": "#9aa4ae"},
    "_dark": {"text": "#e6edf3", "ours": "#56B4E9", "theirs": "#6e7781"},
}
"""Colors, by the end of the file's name."""
COLUMNS = (
    (11.5, "largest step, η", "largest step, spread 1"),
    (14.0, "nu / exact nu", "nu after its gradients fell"),
)
"""The columns of text: the position of the right edge, the heading, and the key in the results."""


def draw_memory(rows: Sequence[Mapping[str, str]], theme: Mapping[str, str]) -> Figure:
    """Return a bar chart of the state's bytes, with two measures of quality next to each bar."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot(facecolor="none")
    names = [row["optimizer"] for row in rows]
    size = [float(row["state, bytes per parameter"]) for row in rows]
    colors = [theme["ours" if "adam_jax" in name else "theirs"] for name in names]
    bars = axes.barh(names, size, color=colors)
    axes.bar_label(bars, [f"{b:.2f}" for b in size], padding=4, color=theme["text"])
    for x, heading, key in COLUMNS:
        texts = [heading, *(row[key].removesuffix(".0") for row in rows)]
        for y, text in enumerate(texts, start=-1):
            axes.text(x, y, text, ha="right", va="center", color=theme["text"])
    axes.set_xlim(0, 14)
    axes.set_title("AdamW: bytes of state per parameter", loc="left", color=theme["text"])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=theme["text"])
    axes.set_xticks([])
    return figure


def draw_family(rows: Sequence[Mapping[str, str]], theme: Mapping[str, str]) -> Figure:
    """Return a chart of each optimizer's loss on the character Transformer; a line marks AdamW."""
    figure = Figure(figsize=(8, 0.26 * len(rows) + 1), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot(facecolor="none")
    names = [row["optimizer"] for row in rows]
    pairs = [row["characters: loss"].split(" ± ") for row in rows]
    means, deviations = [float(mean) for mean, _ in pairs], [float(error) for _, error in pairs]
    axes.errorbar(means, names, xerr=deviations, fmt="o", color=theme["ours"], capsize=2)
    axes.axvline(means[names.index("adamw")], color=theme["theirs"], lw=1, zorder=0)
    title = "Final loss of a character Transformer, ± s.d. over seeds"
    axes.set_title(title, loc="left", color=theme["text"])
    axes.invert_yaxis()
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(theme["theirs"])
    axes.tick_params(length=0, colors=theme["text"])
    axes.margins(y=0.02)
    return figure


PICTURES = {"memory": (draw_memory, "peers"), "family": (draw_family, "family")}
"""The function that draws a picture, and its results."""

if __name__ == "__main__":
    for name, (draw, results) in PICTURES.items():
        rows = json.loads((RESULTS / f"{results}.json").read_text())["rows"]
        for end, theme in THEMES.items():
            with rc_context({"svg.hashsalt": "adam_jax", "font.size": 11}):
                draw(rows, theme).savefig(DOCS / f"{name}{end}.svg", metadata={"Date": None})

"""Draw bytes of state per parameter, ours and other packages: `python -m benchmarks.picture`.

It reads results/peers.json and writes docs/memory.svg and docs/memory_dark.svg.
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
    "memory.svg": {"text": "#1f2328", "ours": "#0072B2", "theirs": "#9aa4ae"},
    "memory_dark.svg": {"text": "#e6edf3", "ours": "#56B4E9", "theirs": "#6e7781"},
}
COLUMNS = (
    (11.5, "largest step, η", "largest step, spread 1"),
    (14.0, "nu / exact nu", "nu after its gradients fell"),
)
"""The columns of text: the position of the right edge, the heading, and the key in the results."""


def draw(rows: Sequence[Mapping[str, str]], theme: Mapping[str, str]) -> Figure:
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


if __name__ == "__main__":
    peers = json.loads((RESULTS / "peers.json").read_text())
    for name, theme in THEMES.items():
        with rc_context({"svg.hashsalt": "adam_jax", "font.size": 11}):
            draw(peers["rows"], theme).savefig(DOCS / name, metadata={"Date": None})

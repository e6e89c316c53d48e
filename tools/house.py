"""Draw the packages and their imports: `python tools/house.py` writes docs/house.svg.

The arrows are the imports in the source. With --check it exits with 1 if the picture is stale.
`tests/project/test_house.py` checks that imports only go down.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "house.svg"

LAYERS = (
    ("cli",),
    ("analysis", "interop"),
    ("transforms",),
    ("optimizers",),
    ("rules", "_engine"),
    ("_backends",),
    ("storage", "schedules"),
    ("_util",),
)
"""The packages from top to bottom. A package imports only from lower layers."""

WHAT = {
    "cli": "python -m adam_jax",
    "interop": "PyTorch, other states",
    "analysis": "memory, diagnostics,\ncompare, plots",
    "transforms": "chain, groups, tunable,\nmaster weights, ZeRO-1",
    "optimizers": "one file per variant",
    "rules": "every formula",
    "_engine": "from one array\nto a pytree",
    "_backends": "how a leaf's step runs:\nXLA, tiles, Pallas, shards",
    "storage": "how a moment is stored",
    "schedules": "AdEMAMix's warmups",
    "_util": "numerics, declarations,\nerrors, paths",
}


def room(path: Path) -> str:
    """Return the package or public module of a file."""
    return path.relative_to(ROOT / "adam_jax").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the packages of adam_jax that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("adam_jax"):
            continue
        inside = node.module.split(".")[1:]
        found |= {inside[0]} if inside else {alias.name for alias in node.names}
    return found & WHAT.keys()


def edges() -> list[tuple[str, str]]:
    """Return every pair (importing package, imported package)."""
    found = defaultdict(set)
    for path in (ROOT / "adam_jax").rglob("*.py"):
        if room(path) in WHAT:
            found[room(path)] |= imports(path) - {room(path)}
    return sorted((a, b) for a, targets in found.items() for b in targets)


def layer(name: str) -> int:
    """Return the number of a package's layer, counted from the top."""
    return next(k for k, names in enumerate(LAYERS) if name in names)


def described() -> str:
    """Format the edges as the picture's description."""
    return "; ".join(f"{a} -> {b}" for a, b in edges())


def draw() -> None:
    """Write the picture without arrows that longer paths imply."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "adam_jax"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 10))
    at = {
        name: ((column - (len(names) - 1) / 2) * 3, -row)
        for row, names in enumerate(LAYERS)
        for column, name in enumerate(names)
    }
    for name, (x, y) in at.items():
        internal = name.startswith("_")
        color = "#e8eef7" if internal else "#fdf1dc"
        box = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": "#555555"}
        text = f"{name}\n{WHAT[name]}"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=2)
    direct = set(edges())
    reached = {(a, d) for (a, b), (c, d) in itertools.product(direct, direct) if b == c}
    for a, b in sorted(direct - reached):
        (x0, y0), (x1, y1) = at[a], at[b]
        start, end = (x0, y0 - 0.22), (x1, y1 + 0.27)
        style = {"arrowstyle": "-|>", "color": "#555555", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, start, arrowprops=style, zorder=1)
    axes.set_xlim(-3.4, 3.4)
    axes.set_ylim(-len(LAYERS) + 0.5, 0.5)
    axes.axis("off")
    metadata = {"Date": None, "Creator": None, "Description": described()}
    figure.savefig(PICTURE, bbox_inches="tight", metadata=metadata)


def is_current() -> bool:
    """Whether the picture shows the current imports."""
    return described().replace(">", "&gt;") in PICTURE.read_text()


if __name__ == "__main__":
    if "--check" not in sys.argv:
        draw()
    elif not is_current():
        sys.exit("docs/house.svg is stale; run python tools/house.py")

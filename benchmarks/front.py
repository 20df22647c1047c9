"""The picture on the front page: agreement with the dense DINOv2 against GMACs, by method.

    python -m benchmarks.front

draws docs/assets/front_dinov2.png from results/leaderboard/dinov2.jsonl.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.agreement import of_features
from benchmarks.standings import budget, is_dense, share
from zoo.report.colors import CONTROL, INK
from zoo.results.rows import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "results" / "leaderboard" / "dinov2.jsonl"
PICTURE = ROOT / "docs" / "assets" / "front_dinov2.png"
FAINT = "#b4bcc6"
# What is named and coloured: method, sizes in the attention, what it is called, colour.
NAMED: Mapping[tuple[str, bool | None], tuple[str, str]] = {
    ("pitome", True): ("PiToMe, sizes in the attention (ours)", "#1f8f4d"),
    ("tome", True): ("ToMe", "#2563d9"),
    ("token_pooling", True): ("Token Pooling, sizes (ours)", "#0b8793"),
    ("diffrate", None): ("DiffRate", "#8b3fd6"),
    ("random", None): ("random tokens", "#d9630b"),
    ("topk", None): ("Top-K by class attention", "#c81e5b"),
    ("tome", False): ("ToMe without sizes", "#7d5222"),
}

Curve = list[tuple[float, float]]


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, bool | None], Curve]:
    """Of each method, with and without sizes: percent of the dense GMACs and of dense answers.

    The key of lower resolution is `("none", None)`.
    """
    found: dict[tuple[str, bool | None], Curve] = defaultdict(list)
    rows = of_features(rows, "fashion_mnist")
    full = max(row["gmacs"]["total"] for row in rows if is_dense(row))
    for row in rows:
        agreement = float(row["knn"]["agreement"])
        if is_dense(row):
            found["none", None].append((100 * row["gmacs"]["total"] / full, agreement))
        elif budget(row):
            sizes = (row["reducer"] or {}).get("prop_attn")
            key = row["method"], sizes if isinstance(sizes, bool) else None
            found[key].append((share(row), agreement))
    return {key: sorted(curve) for key, curve in found.items()}


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = curves(rows)
    figure = Figure(figsize=(10, 5.2), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.115, 0.555, 0.745))
    title = "How often a reduced DINOv2 answers as the dense one"
    figure.text(0.02, 0.945, title, fontsize=14, fontweight="bold", color=INK[0])
    what = "20-NN in an index that the dense tower filled, off the shelf; each line is a method"
    figure.text(0.02, 0.895, what, fontsize=10, color=CONTROL[0])
    _frame(axes)
    labels = []
    for key, curve in found.items():
        if key != ("none", None) and key not in NAMED:
            axes.plot(*_ended(curve), color=FAINT, linewidth=0.9, zorder=1)
    for key, (name, color) in NAMED.items():
        if key in found:
            x, y = _ended(found[key])
            axes.plot(x, y, color=color, linewidth=2.2, marker="o", markersize=5, zorder=3)
            labels.append((y[0], name, color))
    x, y = zip(*found["none", None], strict=True)
    axes.plot(x, y, color=INK[0], linewidth=2, linestyle=(0, (4, 2)), marker="s", zorder=4)
    labels.append((y[0], "no method: a smaller image", INK[0]))
    _label(axes, labels)
    rest = "others, unnamed: see the table"
    axes.annotate(rest, (1.03, 0.0), xycoords="axes fraction", fontsize=9, color="#8a939e")
    return figure


def _ended(curve: Curve) -> tuple[list[float], list[float]]:
    """With the dense tower, where every method starts."""
    x, y = zip(*[*curve, (100.0, 100.0)], strict=True)
    return list(x), list(y)


def _frame(axes: Axes) -> None:
    axes.set_xlim(102, 28)  # what is saved grows to the right
    axes.set_ylim(0, 103)
    axes.grid(color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("GMACs, % of the dense tower's", color=INK[0], fontsize=10)
    axes.set_ylabel("same answer as the dense tower, %", color=INK[0], fontsize=10)
    axes.tick_params(colors=CONTROL[0], labelsize=9)


def _label(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Names at the right, in the order of the curves' ends and apart from each other."""
    step, last = 5.4, 200.0
    for height, name, color in sorted(labels, reverse=True):
        last = min(height - 1.2, last - step)
        axes.annotate(
            name,
            (1.03, last / 103),
            xycoords="axes fraction",
            fontsize=9.5,
            color=color,
            va="center",
            annotation_clip=False,
        )


def main() -> int:
    """Run from the command line."""
    draw(read_rows(ROWS)).savefig(PICTURE, format="png")
    print(PICTURE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

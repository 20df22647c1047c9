"""Pictures of accuracy by the clock: what methods promise by their GMACs, and what is left.

    python -m benchmarks.clock

draws docs/assets/clock_fashion.png and clock_dinov2.png from results/leaderboard (top-1, agreement
with the dense tower) and results/speed/points.jsonl (speed on one core, float32, eager).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import modes
from benchmarks.methods_table import SMALLER_IMAGE, agreement, top1, whole_runs
from benchmarks.modes_table import machine_of, of_modes, ok
from zoo.report.colors import CONTROL, INK
from zoo.results.rows import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
ASSETS, ROWS = ROOT / "docs" / "assets", ROOT / "results" / "leaderboard"
FAINT = "#b4bcc6"
#: What is named and coloured; the colours are those of the front page.
NAMED: Mapping[str, tuple[str, str]] = {
    "mctf": ("MCTF", "#7d5222"),
    "tome": ("ToMe", "#2563d9"),
    "pitome": ("PiToMe", "#1f8f4d"),
    "atc": ("ATC", "#b58900"),
    "token_pooling": ("Token Pooling", "#0b8793"),
    "diffrate": ("DiffRate", "#8b3fd6"),
    "random": ("random tokens", "#d9630b"),
    "topk": ("Top-K", "#c81e5b"),
}
_PLAIN = ("eager", "float32")
PANELS = ("by GMACs", "by the clock, 16 images at a time", "by the clock, one image")

Row = Mapping[str, Any]


class Subject(NamedTuple):
    """What a picture is of.

    Attributes:
        model: As the suite of modes calls it.
        file: Of results/leaderboard: its accuracy.
        accuracy: From such rows and a cost to percent by method, and by control as "28 px".
        words: What the accuracy is, with the model.
        costs: In percent, in words.
        axis: Of the accuracy.
        low: Where the axis begins.
    """

    model: str
    file: str
    accuracy: Callable[[Sequence[Row], float], Mapping[str, str]]
    words: str
    costs: str
    axis: str
    low: float


SUBJECTS: Mapping[str, Subject] = {
    "clock_fashion": Subject(
        "vit_fashion", "fashion", top1, "top-1 of vit_fashion off the shelf", "75, 50, 35 and 20 %",
        "top-1, %", 55.0,
    ),
    "clock_dinov2": Subject(
        "dinov2_small", "dinov2", agreement,
        "same answer as the dense DINOv2, methods as published", "75, 50 and 35 %",
        "same answer, %", 0.0,
    ),
}  # fmt: skip
#: By method, or `SMALLER_IMAGE`: times as fast as the dense model, and top-1 in percent.
Curves = dict[str, list[tuple[float, float]]]


def curves(
    subject: Subject, speed: Sequence[Row], accuracy: Sequence[Row]
) -> tuple[Curves, Curves, Curves]:
    """One set of curves for each of `PANELS`, all of the same points.

    Args:
        subject: Of which model.
        speed: Of the suite with `--fraction`, as they were appended: of the machine that came
            last.
        accuracy: Of the leaderboard of the subject.

    Returns:
        Points that have an accuracy and both speeds.
    """
    rows = [r for r in of_modes(speed) if r["bench"].get("model") == subject.model]
    rows = [r for r in rows if (r["bench"]["kind"], r["bench"]["precision"]) == _PLAIN and ok(r)]
    whole = whole_runs(rows)
    whole = [row for row in whole if machine_of(row) == machine_of(whole[-1])]
    found: dict[tuple[str, float], dict[int, Row]] = defaultdict(dict)
    for row in whole:
        b = row["bench"]
        name = b.get("control") or row["method"]
        if name != "none" and (b.get("control") is None or name.endswith(" px")):
            found[name, b["fraction"]][row["batch"]] = row
    right = {cost: subject.accuracy(accuracy, cost) for _, cost in found}
    panels: tuple[Curves, Curves, Curves] = ({}, {}, {})
    for (name, cost), by_batch in found.items():
        if name not in right[cost] or set(by_batch) != {1, 16}:
            continue
        bench, value = by_batch[16]["bench"], float(right[cost][name])
        promised = bench["speedup"] / bench["efficiency"]
        times = (promised, bench["speedup"], by_batch[1]["bench"]["speedup"])
        line = SMALLER_IMAGE if bench.get("control") else name
        for panel, x in zip(panels, times, strict=True):
            panel.setdefault(line, []).append((x, value))
    return panels


def draw(subject: Subject, speed: Sequence[Row], accuracy: Sequence[Row]) -> Figure:
    """The picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.9), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    title = "The same models by what they should save and by what they do"
    figure.text(0.02, 0.94, title, fontsize=14, fontweight="bold", color=INK[0])
    what = (
        f"{subject.words}, against times as fast as dense; float32, eager, one core; "
        f"a line is a method at {subject.costs} of the GMACs"
    )
    figure.text(0.02, 0.885, what, fontsize=9, color=CONTROL[0])
    sizes = subject.accuracy(accuracy, 1.0)
    dense = max(float(value) for control, value in sizes.items() if control.endswith(" px"))
    for i, (name, found) in enumerate(zip(PANELS, curves(subject, speed, accuracy), strict=True)):
        axes = figure.add_axes((0.055 + 0.285 * i, 0.125, 0.255, 0.66))
        _frame(axes, name, subject, left=i == 0)
        for method in sorted(found, key=lambda m: (m in NAMED, m == SMALLER_IMAGE)):
            x, y = zip(*sorted([*found[method], (1.0, dense)], key=lambda p: -p[1]), strict=True)
            axes.plot(x, y, **_style(method))
    names = [(label, color) for key, (label, color) in NAMED.items() if key in found]
    names += [("a smaller image", INK[0]), ("others: see the table", "#8a939e")]
    for i, (label, color) in enumerate(names):
        figure.text(0.885, 0.74 - 0.058 * i, label, fontsize=9, color=color)
    return figure


def _style(method: str) -> dict[str, Any]:
    if method == SMALLER_IMAGE:
        dashes = (0, (4, 2))
        return {"color": INK[0], "linewidth": 2, "linestyle": dashes, "marker": "s", "zorder": 4}
    if method in NAMED:
        color = NAMED[method][1]
        return {"color": color, "linewidth": 2, "marker": "o", "markersize": 4, "zorder": 3}
    return {"color": FAINT, "linewidth": 0.8, "zorder": 1}


def _frame(axes: Axes, name: str, subject: Subject, left: bool) -> None:
    ticks = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5)
    axes.set_xscale("log")
    axes.set_xlim(0.42, 7.0)
    axes.set_ylim(subject.low, 93 if subject.low else 103)
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1.0, color="#9aa3ae", linewidth=1, zorder=0)
    axes.grid(color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(name, fontsize=10, color=INK[0], loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if left:
        axes.set_ylabel(subject.axis, color=INK[0], fontsize=10)
    axes.tick_params(colors=CONTROL[0], labelsize=8)


def main() -> int:
    """Run from the command line."""
    speed = read_rows(ROOT / modes.POINTS)
    for name, subject in SUBJECTS.items():
        picture = ASSETS / f"{name}.png"
        figure = draw(subject, speed, read_rows(ROWS / f"{subject.file}.jsonl"))
        figure.savefig(picture, format="png")
        print(picture.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

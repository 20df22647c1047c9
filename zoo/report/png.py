"""The picture for a README: accuracy against GMACs, by matplotlib."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.report.colors import CONTROL, FRONT, INK, Mark, method_marks
from zoo.report.controls import LONGER, RESOLUTION, SMALLER
from zoo.report.entry import Comparison, Entry, View
from zoo.report.quality import TOP1, Metric

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {RESOLUTION: "s", SMALLER: "^", LONGER: "D"}
# matplotlib's names of the shapes of methods, and the area that makes them look equally large.
_SHAPES: dict[str, tuple[Any, float]] = {
    "square": ("s", 40),
    "circle": ("o", 46),
    "triangle-up": ("^", 50),
    "triangle-down": ("v", 50),
    "star": ("*", 110),
    "cross": ("P", 66),
    "x": ("X", 66),
    "pentagon": ("p", 56),
    "hexagram": ((6, 1, 0), 78),
}
_SHELF = "#b7791f"
_NEAR = 10.0  # points of top-1 below the best that the picture shows
_MUTED, _GRID = "#6b7480", "#e6e9ee"


def best_view(comparison: Comparison) -> View | None:
    """The view with most accuracies, None where nothing has an accuracy and GMACs."""
    views = [v for v in comparison.views if not v.combined and v.front]
    return views[0] if views else None


def write_png(comparison: Comparison, path: Path, title: str) -> None:
    """Write the picture of `draw` to a file."""
    draw(comparison, title).savefig(path, format="png")


def draw(comparison: Comparison, title: str) -> Figure:
    """Draw accuracy against GMACs for the view with most accuracies.

    Only the points of the Pareto front are labelled; the legend beside the plot names the methods.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = best_view(comparison)
    metric = view.metric if view else TOP1
    entries = view.entries if view else []
    points = [e for e in entries if e.score(metric) is not None and e.gmacs is not None]
    names = sorted({entry.name for entry in points if not entry.dense})
    controls = sorted({entry.control for entry in points if entry.control})
    # Up to twenty methods fit beside the usual shape; for more the picture grows.
    height = max(5.8, 0.19 * (len(names) + len(controls) + 6) + 1.2)
    figure = Figure(figsize=(10, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.67 / height, 0.62, 1 - 1.48 / height))
    # Names and titles are not formulas, whatever dollar signs they hold.
    style: dict[str, Any] = {"family": "DejaVu Sans", "color": INK[0], "parse_math": False}
    top = 1 - 0.32 / height
    figure.text(0.026, top, _clip(title, 78), fontsize=14, fontweight="bold", **style)
    if view is None:
        axes.set_axis_off()
        text = "No run has an accuracy yet."
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=13, **style)
        return figure
    style["color"] = _MUTED
    figure.text(0.026, top - 0.26 / height, _clip(view.label, 110), fontsize=10.5, **style)
    every = {entry.name for entry in comparison.entries if not entry.dense}
    marks = method_marks(every)
    _draw(axes, view, points, marks)
    _legend(axes, points, _band(view), {name: marks[name] for name in names}, controls)
    figure.canvas.draw()  # label places need the final scale
    _label_front(axes, view, points)
    return figure


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _draw(axes: Axes, view: View, points: list[Entry], marks: dict[str, Mark]) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b9c0c9")
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.set_xlabel("GMACs per image", color=INK[0], fontsize=10)
    unit = " (%)" if view.metric.unit else ""
    words = view.metric.words[:1].upper() + view.metric.words[1:]
    axes.set_ylabel(words + unit, color=INK[0], fontsize=10)

    def height(entry: Entry) -> float:
        return entry.score(view.metric) or 0.0

    dense, ends = view.reference, _band(view)
    if dense and dense.score(view.metric) is not None:
        axes.axhline(height(dense), color=INK[0], linewidth=1, linestyle=(0, (5, 3)), zorder=1.5)
        if ends:
            axes.axhspan(*ends, color=INK[0], alpha=0.055, linewidth=0, zorder=0.5)
    if any(entry.trained for entry in points):
        axes.plot(
            [entry.gmacs or 0 for entry in view.front_untrained],
            [height(entry) for entry in view.front_untrained],
            color=_SHELF,
            linewidth=1.8,
            linestyle=(0, (5, 3)),
            zorder=1.2,
        )
    axes.plot(
        [entry.gmacs or 0 for entry in view.front],
        [height(entry) for entry in view.front],
        color=FRONT[0],
        linewidth=7,
        alpha=0.55,
        solid_capstyle="round",
        solid_joinstyle="round",
        zorder=1,
    )
    curves: dict[Any, list[Entry]] = defaultdict(list)
    for entry in points:
        curves[entry.name, entry.dense and not entry.control, entry.trained].append(entry)
    faint = 0.4 if len(curves) <= 16 else 0.22
    for (name, dense_model, trained), curve in curves.items():
        x, y = [e.gmacs or 0 for e in curve], [height(e) for e in curve]
        control = curve[0].control
        color = INK[0] if dense_model else marks[name].light
        axes.plot(
            x,
            y,
            color=color,
            linewidth=1.1,
            linestyle=":" if control else "-",
            alpha=0.9 if control else faint,
            zorder=2,
        )
        marker, size = _SHAPES["square" if dense_model else marks[name].shape]
        marker = _MARKERS.get(control or "", marker)
        axes.scatter(
            x,
            y,
            s=size,
            marker=marker,
            color="white" if control else color,
            edgecolors=color if control else "white",
            linewidths=1.5 if control else 0.9,
            zorder=3,
        )
        # Ringed and on top: the points of the front.
        best = [entry for entry in curve if entry in view.front]
        axes.scatter(
            [e.gmacs or 0 for e in best],
            [height(e) for e in best],
            s=size,
            marker=marker,
            color="white" if control else color,
            edgecolors=INK[0],
            linewidths=1.3,
            zorder=3.5,
        )
        if trained and not control:
            axes.scatter(x, y, s=7, marker="o", color="white", linewidths=0, zorder=3.6)
    axes.margins(x=0.06, y=0.09)
    _leave_out_the_worst(axes, [height(entry) for entry in points], view.metric)


def _band(view: View) -> tuple[float, float] | None:
    """The 95 % interval of the dense model."""
    if view.reference is None:
        return None
    if view.metric is TOP1:
        return view.reference.interval
    return view.reference.interval_of(view.metric)


def _leave_out_the_worst(axes: Axes, heights: list[float], metric: Metric) -> None:
    """A few bad results must not squeeze all others into one line; say how many are missing."""
    best = max(heights, default=0.0)
    far = _NEAR if metric.unit else _NEAR / 100
    near = [height for height in heights if height >= best - far]
    if len(near) == len(heights):
        return
    span = max(best - min(near), 0.01 * far)
    axes.set_ylim(min(near) - 0.07 * span, best + 0.09 * span)
    least = f"{min(heights):.{1 if metric.unit else 3}f}{metric.unit}"
    text = f"{len(heights) - len(near)} more below, down to {least}"
    at = {"xy": (0.99, 0.012), "xycoords": "axes fraction", "ha": "right", "va": "bottom"}
    axes.annotate(text, fontsize=8.5, color=_MUTED, zorder=4, **at)  # type: ignore[arg-type]


def _legend(
    axes: Axes,
    points: list[Entry],
    band: tuple[float, float] | None,
    marks: dict[str, Mark],
    controls: list[str],
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(color: str, label: str, marker: Any, size: float = 42) -> Line2D:
        look = {"linestyle": "", "markersize": size**0.5, "label": label}
        return Line2D([], [], color=color, marker=marker, **look)

    handles: list[Artist] = [
        dot(mark.light, _clip(name, 28), *_SHAPES[mark.shape]) for name, mark in marks.items()
    ]
    if any(e.dense for e in points):
        handles.insert(0, dot(INK[0], "dense model", "s"))
    for name in reversed(controls):
        hollow = dot(CONTROL[0], name, _MARKERS[name])
        hollow.set_markerfacecolor("white")
        hollow.set_markeredgewidth(1.5)
        handles.insert(1, hollow)
    front = Line2D([], [], color=FRONT[0], linewidth=6, alpha=0.6, label="Pareto front")
    handles.insert(0, front)
    if any(e.trained for e in points):
        label = "Pareto front off the shelf"
        handles.insert(1, Line2D([], [], color=_SHELF, linewidth=1.8, linestyle="--", label=label))
    if band:
        at = next(i for i, h in enumerate(handles) if h.get_label() == "dense model") + 1
        handles.insert(at, Patch(color=INK[0], alpha=0.08, lw=0, label="its 95 % interval"))
    if any(e.trained for e in points):
        ring = dot(_MUTED, "with a white dot: trained", "o")
        ring.set_markerfacecolor("white")
        ring.set_markeredgewidth(2.2)
        handles.append(ring)
    legend = axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.02),
        frameon=False,
        fontsize=9.5 if len(handles) <= 22 else 8.5,
        labelcolor=INK[0],
        handletextpad=0.6,
        handlelength=1.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label_front(axes: Axes, view: View, points: list[Entry]) -> None:
    """Label the front where a label covers neither a point, nor another label, nor the frame."""
    from matplotlib.patheffects import withStroke

    figure = axes.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    unit = figure.dpi / 72
    halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.85)]
    bottom = axes.get_ylim()[0]

    def height(entry: Entry) -> float:
        return entry.score(view.metric) or 0.0

    points = [e for e in points if height(e) >= bottom]
    shown = [e for e in view.front if e in points]
    dots = [axes.transData.transform((e.gmacs or 0, height(e))) for e in points]
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in dots]
    if (reference := view.reference) and reference.score(view.metric) is not None:
        y = axes.transData.transform((0, height(reference)))[1]
        taken.append((frame.x0, y - unit, frame.x1, y + unit))
    dense = [entry for entry in points if entry.dense and entry not in view.front]
    for entry in [*shown, *dense]:
        place = (entry.gmacs or 0, height(entry))
        for dx, dy, ha, va in _PLACES:
            text = axes.annotate(
                _clip(f"{entry.name} {entry.budget}" if entry.control else entry.title, 28),
                place,
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8.5,
                color=INK[0],
                zorder=4,
                path_effects=halo,
                parse_math=False,
            )
            box = text.get_window_extent(renderer)
            corners = (box.x0, box.y0, box.x1, box.y1)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
            if inside and box.y1 <= frame.y1 and not any(_overlap(corners, t) for t in taken):
                taken.append(corners)
                break
            text.remove()


_PLACES = (
    (-7, 6, "right", "bottom"),
    (7, 6, "left", "bottom"),
    (0, 9, "center", "bottom"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (7, -6, "left", "top"),
    (-7, -6, "right", "top"),
    (0, -9, "center", "top"),
)

Box = tuple[float, float, float, float]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

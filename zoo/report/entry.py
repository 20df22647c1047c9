"""What a report compares: one entry is one configuration, with the latest of each of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.report.quality import TOP1, Metric, Quality
from zoo.report.readings import Row, Speed


@dataclass(eq=False)
class Entry:
    """One configuration with its latest measurements.

    `top1`, `gmacs` and `fidelity` are means over `runs`, which differ in the seed alone; `row` is
    the latest of them.
    """

    id: int
    row: Row
    dense: bool
    trained: bool
    backbone: str
    data: str
    name: str
    budget: str
    gmacs: float | None
    cost: Row  # the row that the cost is from
    tokens: Any
    top1: float | None
    interval: tuple[float, float] | None
    runs: Mapping[str, Row] = field(default_factory=dict)  # by their seeds
    partial: bool = False  # on fewer images than other runs of the same data
    spread: float | None = None  # standard deviation of top-1 over several runs
    reference_id: int | None = None
    reference_differs: list[str] = field(default_factory=list)
    reference_gmacs: float | None = None
    reference_top1: float | None = None
    control: str | None = None  # what kind of control, see `zoo.report.controls`
    guest: bool = False  # shown beside the models of another backbone
    fidelity: Mapping[str, float] = field(default_factory=dict)
    quality: Mapping[str, Quality] = field(default_factory=dict)  # by the keys of `METRICS`
    reference_quality: Mapping[str, Quality] = field(default_factory=dict)
    reducer_share: float | None = None  # percent of the GMACs
    speeds: dict[str, Speed] = field(default_factory=dict)
    picture: Row | None = None  # the latest run that drew what becomes of an image's patches

    @property
    def is_reference(self) -> bool:
        """Whether this is a dense model that others are compared with, rather than a control."""
        return self.dense and self.control is None

    @property
    def label(self) -> str:
        """Method and budget, e.g. ``'tome r=13'``."""
        return f"{self.title} {self.budget}".rstrip()

    @property
    def title(self) -> str:
        """Name, telling trained weights from off-the-shelf ones."""
        return f"{self.name} (trained)" if self.trained and not self.control else self.name

    @property
    def scores(self) -> list[float]:
        """Top-1 of every run."""
        return [float(row["top1"]) for row in self.runs.values()]

    @property
    def measured(self) -> list[str]:
        """Keys of the metrics that it has, fidelity left aside."""
        return [*(["top1"] if self.top1 is not None else []), *self.quality]

    @property
    def count(self) -> int:
        """How many runs there are."""
        return max([len(self.runs), *(one.runs for one in self.quality.values())])

    def score(self, metric: Metric = TOP1) -> float | None:
        """How good it is, by one metric."""
        if metric.key == "top1":
            return self.top1
        found = self.quality.get(metric.key)
        return None if found is None else found.value

    def interval_of(self, metric: Metric = TOP1) -> tuple[float, float] | None:
        """The 95 % interval of a score, or its range over several runs."""
        if metric.key == "top1":
            return self.ends
        found = self.quality.get(metric.key)
        if found is None or found.low is None or found.high is None:
            return None
        return found.low, found.high

    def lost(self, metric: Metric = TOP1) -> float | None:
        """Points above (or below) the dense model by one metric; None for the dense model."""
        if metric.key == "top1":
            return self.delta
        base, own = self.reference_quality.get(metric.key), self.score(metric)
        best = metric.same if base is None else base.value
        return None if self.is_reference or own is None or best is None else own - best

    @property
    def ends(self) -> tuple[float, float] | None:
        """The 95 % interval of one run; the lowest and the highest of several."""
        if self.interval is None and len(self.runs) > 1:
            return min(self.scores), max(self.scores)
        return self.interval

    @property
    def delta(self) -> float | None:
        """Points of top-1 above (or below) the dense model; None for the dense model itself."""
        if self.is_reference or self.top1 is None or self.reference_top1 is None:
            return None
        return self.top1 - self.reference_top1

    @property
    def saved(self) -> float | None:
        """Percent of the dense model's GMACs that are saved; None for the dense model itself."""
        if self.is_reference or self.gmacs is None or not self.reference_gmacs:
            return None
        return 100 * (1 - self.gmacs / self.reference_gmacs)


@dataclass(eq=False)
class View:
    """Entries that share their data, and so may be compared; fronts hold entries in cost order.

    `front` and `speed_fronts` are over all entries, the ones ending in `_untrained` over those
    whose weights nobody trained for the purpose.
    """

    label: str
    entries: list[Entry]
    dense: list[Entry]
    front: list[Entry]
    speed_fronts: dict[str, list[Entry]]
    notes: list[str]
    front_untrained: list[Entry]
    failures: list[Row] = field(default_factory=list)
    combined: bool = False  # over several backbones
    metric: Metric = TOP1  # what fronts and pictures go by

    @property
    def partial(self) -> bool:
        """Whether it is on fewer images than other views of the same data."""
        return any(entry.partial for entry in self.entries)

    @property
    def reference(self) -> Entry | None:
        """The dense model, where there is exactly one to compare with."""
        return self.dense[0] if len(self.dense) == 1 else None

    @property
    def settings(self) -> list[str]:
        """Hardware settings and batch sizes with a throughput, the one with most entries first."""
        return list(self.speed_fronts)


@dataclass(eq=False)
class Comparison:
    """All that a report shows: every row is an entry's, in `others`, or in `failed`."""

    rows: list[Row]
    entries: list[Entry]
    views: list[View]
    others: list[tuple[Row, Entry]]
    failed: list[Row]
    gaps: list[Row]  # those that did not succeed later

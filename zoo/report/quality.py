"""How good a model is, in every way that rows know of: by labels, by neighbours, by text.

One list says what there is, what it is called in tables and plots, and where rows hold it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from zoo.report.words import number


class Metric(NamedTuple):
    """A way to be good; more is better.

    Attributes:
        key: Its name.
        column: Heading of its column.
        words: As in "k-NN accuracy against GMACs".
        meaning: In a sentence, for who points at the heading.
        path: Where a row holds it.
        ends: What its 95 % interval is called beside it; empty where it has none.
        gallery: "own" or "dense" where it is of such a gallery alone; empty for any.
        same: What the dense model has by being the dense model; None where it is measured.
        unit: Behind the number.
    """

    key: str
    column: str
    words: str
    meaning: str
    path: tuple[str, ...]
    ends: str = ""
    gallery: str = ""
    same: float | None = None
    unit: str = " %"


def _lookups(gallery: str) -> list[Metric]:
    """What is measured on a gallery."""
    dense = gallery == "dense"
    end, more = ("_dense", ", dense gallery") if dense else ("", "")
    whose = "in a gallery of the dense model" if dense else "in its own gallery"
    found = [
        Metric(
            f"knn{end}",
            f"k-NN %{more}",
            f"k-NN accuracy{more}",
            f"top-1 by the nearest neighbours {whose}",
            ("knn", "top1"),
            "ci95",
            gallery,
        ),
        Metric(
            f"probe{end}",
            f"Probe %{more}",
            f"linear probe accuracy{more}",
            f"top-1 of logistic regression on the features {whose}",
            ("linear_probe", "top1"),
            "ci95",
            gallery,
        ),
    ]
    kinds = {"class": ("", "of its class"), "crop": ("same picture, ", "of the same picture")}
    for kind, (what, relevant) in kinds.items():
        for name, title in (("recall1", "Recall@1"), ("recall5", "Recall@5"), ("map", "mAP")):
            first = "average precision" if name == "map" else f"something {relevant} in the first"
            title = title if not what else f"{title}, {what.rstrip(', ')}"
            found.append(
                Metric(
                    f"{'' if kind == 'class' else 'crop_'}{name}{end}",
                    f"{title}{more}",
                    f"{title}{more}",
                    f"{first}{'' if name == 'map' else f' {name[-1]}'} {whose}",
                    ("retrieval", kind, name),
                    f"{name}_ci95",
                    gallery,
                )
            )
    return found


_AGREEMENT = Metric(
    "knn_agreement",
    "k-NN as dense",
    "k-NN agreement with dense",
    "images with the same k-NN class as the dense model's features give, in the dense gallery",
    ("knn", "agreement"),
    "agreement_ci95",
    "dense",
    100.0,
)
#: Everything but top-1 and fidelity, in the order in which one stands for a report.
METRICS: tuple[Metric, ...] = (
    _AGREEMENT,
    *_lookups("own"),
    Metric(
        "zeroshot",
        "Zero-shot %",
        "zero-shot accuracy",
        "top-1 by the nearest text embedding",
        ("zeroshot", "top1"),
        "ci95",
    ),
    *_lookups("dense"),
    Metric(
        "centred_cosine",
        "Centred cosine",
        "centred cosine to dense",
        "of the features with the dense model's, both minus the mean feature; the mean of all",
        ("centred_cosine", "mean"),
        same=1.0,
        unit="",
    ),
    Metric(
        "centred_cosine_worst",
        "Worst cosine",
        "worst centred cosine to dense",
        "the same, of the image where it is worst",
        ("centred_cosine", "worst"),
        same=1.0,
        unit="",
    ),
)
TOP1 = Metric("top1", "Top-1 %", "top-1 accuracy", "right answers", ("top1",), "ci95")
BY_KEY = {metric.key: metric for metric in (TOP1, *METRICS)}
# In one gallery of each kind, these say most.
_MAIN = ("top1", "knn", "knn_agreement", "knn_dense")


class Quality(NamedTuple):
    """A metric over the runs of an entry.

    Attributes:
        value: The mean.
        low: Lower end of its 95 % interval; of several runs the lowest.
        high: Likewise.
        spread: Standard deviation over several runs.
        runs: How many there are.
    """

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    runs: int = 1


def qualities(row: Mapping[str, Any]) -> dict[str, Quality]:
    """What a row says, by the keys of `METRICS`."""
    found = {}
    for metric in METRICS:
        if metric.gallery and str(row.get("gallery") or "own") != metric.gallery:
            continue
        place: Any = row
        for name in metric.path[:-1]:
            place = place.get(name) if isinstance(place, Mapping) else None
        value = number(place.get(metric.path[-1])) if isinstance(place, Mapping) else None
        if value is not None:
            ends = place.get(metric.ends) if metric.ends else None
            both = isinstance(ends, Sequence) and len(ends) == 2
            low, high = (number(end) for end in ends) if both and ends else (None, None)
            found[metric.key] = Quality(value, low, high)
    return found


def averaged(runs: Iterable[Mapping[str, Quality]]) -> dict[str, Quality]:
    """The metrics of an entry from those of its runs."""
    values: dict[str, list[Quality]] = {}
    for run in runs:
        for key, one in run.items():
            values.setdefault(key, []).append(one)
    found = {}
    for key, several in values.items():
        scores = [one.value for one in several]
        found[key] = several[0]
        if len(several) > 1:
            ends = min(scores), max(scores)
            found[key] = Quality(
                statistics.fmean(scores), *ends, statistics.stdev(scores), len(several)
            )
    return found


def main_metric(measured: Iterable[Iterable[str]]) -> Metric:
    """What a comparison is drawn by: top-1 where it was measured, else what most entries have.

    Args:
        measured: Keys of what each entry knows.
    """
    keys = [key for one in measured for key in one]
    order = list(dict.fromkeys([*_MAIN, *BY_KEY]))
    known = [key for key in order if key in keys]
    if not known or known[0] == "top1":
        return TOP1
    return BY_KEY[max(known, key=lambda key: (keys.count(key), -known.index(key)))]


def shown(metric: Metric, found: Quality | None) -> str:
    """A cell: the value, with the standard deviation of several runs."""
    if found is None:
        return ""
    digits = 2 if metric.unit else 4
    spread = "" if found.spread is None else f" ± {found.spread:.{digits}f}"
    return f"{found.value:.{digits}f}{spread}"

"""What has been shown for each method: fixtures passed, and accuracy on digits at half the cost.

Both come from files in `results/` that runs have written: `parity.json` by
`python -m tests.parity tests/golden --write`, and the rows in `digits/`. Nothing here is typed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import ZooError
from zoo.report.identity import Identity
from zoo.results.rows import read_rows

RESULTS = Path(__file__).resolve().parents[2] / "results"
# "Half the cost": at most this share of the dense GMACs (a search may miss its target by a little),
# and not so much less that it would be another budget; whole rings of a pattern are coarse.
SHARES = (0.42, 0.505)


class Fixtures(NamedTuple):
    """Stored tensors of official codes.

    Attributes:
        passed: Fixtures of the method that are reproduced.
        total: Fixtures of the method.
    """

    passed: int
    total: int

    def __str__(self) -> str:
        if not self.total:
            return "-"
        return str(self.passed) if self.passed == self.total else f"{self.passed} of {self.total}"


class Digits(NamedTuple):
    """Top-1 in percent on digits at half the dense GMACs; None where nobody ran it.

    Of a setting that was run with several seeds it is the mean, with the standard deviation.

    Attributes:
        untrained: Best setting with the weights as they come.
        trained: Best setting after training with the method.
        untrained_spread: Standard deviation over its runs, where there are several.
        trained_spread: Likewise.
    """

    untrained: float | None
    trained: float | None
    untrained_spread: float | None = None
    trained_spread: float | None = None

    def __str__(self) -> str:
        parts = (self.untrained, self.untrained_spread), (self.trained, self.trained_spread)
        return " / ".join(percent(*part) for part in parts)


def percent(value: float | None, spread: float | None = None) -> str:
    """Return a percentage as text, "-" for none.

    >>> percent(91.44), percent(91.44, 0.66)
    ('91.4', '91.4 ± 0.7')
    """
    if value is None:
        return "-"
    return f"{value:.1f}" if spread is None else f"{value:.1f} ± {spread:.1f}"


def fixtures(results: Path = RESULTS) -> dict[str, Fixtures]:
    """Return the fixtures of each method or plugin that has some.

    Args:
        results: Folder with parity.json; an absent file means that nothing was run.

    Raises:
        ZooError: The file is damaged.
    """
    path = results / "parity.json"
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["fixtures"].values()
        pairs = [(name, e["status"] == "PASS") for e in entries for name in e["methods"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(
            f"{path} is damaged; write it with `python -m tests.parity tests/golden --write`"
        ) from error
    found: dict[str, Fixtures] = {}
    for name, passed in pairs:
        old = found.get(name, Fixtures(0, 0))
        found[name] = Fixtures(old.passed + passed, old.total + 1)
    return found


def digits(results: Path = RESULTS) -> dict[str, Digits]:
    """Return what was measured of each method at half the cost on `vit_digits`.

    Runs on part of the test images count nowhere, and of several seeds the mean counts, not the
    luckiest.

    Args:
        results: Folder with digits/*.jsonl.
    """
    rows = [r for path in sorted((results / "digits").glob("*.jsonl")) for r in read_rows(path)]
    rows = [r for r in rows if r.get("status") == "ok" and r.get("top1") is not None]
    rows.sort(key=lambda r: str(r.get("created") or ""))
    identity = Identity(rows)
    runs: dict[tuple[str, bool], dict[tuple[str, ...], dict[str, float]]] = {}
    for row in rows:
        if _counts(row) and identity.whole(row):
            own = runs.setdefault((str(row["method"]), bool(row.get("trained"))), {})
            # Of one run the latest row counts.
            own.setdefault(identity.key(row), {})[identity.run(row)] = float(row["top1"])
    found = {}
    for name in {method for method, _ in runs}:
        (untrained, one), (trained, other) = (
            _best(runs.get((name, after), {}).values()) for after in (False, True)
        )
        found[name] = Digits(untrained, trained, one, other)
    return found


def smaller_images(results: Path = RESULTS) -> list[tuple[float, float]]:
    """Share of the GMACs and top-1 in percent of the dense model on smaller images, largest first.

    Args:
        results: Folder with digits/*.jsonl.
    """
    rows = [r for path in sorted((results / "digits").glob("*.jsonl")) for r in read_rows(path)]
    dense = {
        row.get("img_size"): (float(row["gmacs"]["total"]), float(row["top1"]))
        for row in rows
        if row.get("status") == "ok" and row.get("method") == "none"
        if row.get("weights") == "vit_digits" and row.get("top1") is not None
    }
    whole = max((cost for cost, _ in dense.values()), default=1.0)
    return sorted(((c / whole, top1) for c, top1 in dense.values() if c < whole), reverse=True)


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a method alone, on the test images, at half the cost."""
    if row.get("method") in (None, "none"):
        return False
    where = (row.get("backbone"), row.get("dataset"), row.get("split"))
    if where != ("vit_digits", "digits", "test"):
        return False
    if not row.get("trained") and row.get("weights") not in (None, "vit_digits"):
        return False
    if (row.get("recipe") or {}).get("plugins"):
        return False
    total, dense = (row.get("gmacs") or {}).get("total"), row.get("gmacs_dense")
    return bool(total and dense and SHARES[0] <= total / dense <= SHARES[1])


def _best(settings: Iterable[Mapping[str, float]]) -> tuple[float | None, float | None]:
    """The highest mean over the runs of a setting, and their standard deviation."""
    scores = [list(runs.values()) for runs in settings]
    best = max(scores, key=statistics.fmean, default=None)
    if best is None:
        return None, None
    return statistics.fmean(best), statistics.stdev(best) if len(best) > 1 else None

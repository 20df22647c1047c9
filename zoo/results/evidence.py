"""What has been shown for each method: fixtures passed, and accuracy on digits at half the cost.

Both come from files in `results/` that runs have written: `parity.json` by
`python -m tests.parity tests/golden --write`, and the rows in `digits/`. Nothing here is typed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import ZooError
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

    Attributes:
        untrained: Best row with the weights as they come.
        trained: Best row after training with the method.
    """

    untrained: float | None
    trained: float | None

    def __str__(self) -> str:
        return f"{percent(self.untrained)} / {percent(self.trained)}"


def percent(value: float | None) -> str:
    """Return a percentage as text, "-" for none."""
    return "-" if value is None else f"{value:.1f}"


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
    """Return the measured rows of each method that has some, at half the cost on `vit_digits`.

    Args:
        results: Folder with digits/*.jsonl.
    """
    rows = [r for path in sorted((results / "digits").glob("*.jsonl")) for r in read_rows(path)]
    rows = [r for r in rows if _counts(r)]
    return {
        name: Digits(
            _best(r for r in rows if r["method"] == name and not r["trained"]),
            _best(r for r in rows if r["method"] == name and r["trained"]),
        )
        for name in {str(r["method"]) for r in rows}
    }


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a method alone, on the test images, at half the cost."""
    if row.get("status") != "ok" or row.get("top1") is None or row.get("method") in (None, "none"):
        return False
    if (row.get("backbone"), row.get("dataset"), row.get("split")) != (
        "vit_digits",
        "digits",
        "test",
    ):
        return False
    if (row.get("recipe") or {}).get("plugins"):
        return False
    total, dense = (row.get("gmacs") or {}).get("total"), row.get("gmacs_dense")
    return bool(total and dense and SHARES[0] <= total / dense <= SHARES[1])


def _best(rows: Iterable[Mapping[str, Any]]) -> float | None:
    return max((float(r["top1"]) for r in rows), default=None)

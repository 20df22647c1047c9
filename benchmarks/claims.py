"""Numbers in prose, and the rows that they are from.

A number in a page is followed by a comment that says where it is from:

    96.7 %<!-- size_bias/dinov2 method=tome reducer.prop_attn=true: knn.agreement -->

names a file below results/, what tells the row from others there (of several the last counts), and
the field. A paired test of their answers, or of their neighbours' where there are no others, names
two rows, with `vs` between them, and `p`, `first` or `second`; a difference of one field of both is
`minus FIELD`. `share` is the cost in percent of the dense model's; `over timm` and `over dense` are
speed-ups. `count FIELD` is how many methods have such a row with that field, `count FIELD below 1`
how many a lower one.

    python -m benchmarks.claims docs/findings.md --write

checks every number of a page against its row, and lists the rows at its end.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.table import inserted
from zoo.errors import ZooError
from zoo.results.answers import compared
from zoo.results.rows import read_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
MARKS = "<!-- rows: python -m benchmarks.claims -->", "<!-- end of rows -->"
# A number, perhaps a unit, and the comment behind it.
_CLAIM = re.compile(
    r"(?P<number>-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(?P<unit>[ \u00a0]?(?:%|x|points|images|ms)?)"
    r"<!--\s+(?P<source>[^:]+?):\s+(?P<field>[^>]+?)\s+-->"
)
_OVER = {"over timm": "imgs_per_s_timm", "over dense": "imgs_per_s_dense"}
_PAIRED = ("p", "first", "second", "images")
_COMPARED = {"below": operator.lt, "from": operator.ge}

Row = Mapping[str, Any]


class Claim(NamedTuple):
    """A number of a page.

    Attributes:
        number: As it stands there.
        source: File and row, or rows.
        field: What of it.
    """

    number: str
    source: str
    field: str


def claims(page: str) -> list[Claim]:
    """The numbers of a page that say where they are from, in their order."""
    return [
        Claim(m["number"], " ".join(m["source"].split()), m["field"]) for m in _CLAIM.finditer(page)
    ]


def rows_of(claim: Claim, folder: Path = RESULTS) -> list[Row]:
    """The row of a claim, the two of a comparison, or those that are counted, one per method.

    Raises:
        ZooError: There is none.
    """
    name, _, rest = claim.source.partition(" ")
    file = folder / f"{name}.jsonl"
    known = _good(file, file.stat().st_mtime_ns) if file.is_file() else []
    if claim.field.startswith("count "):
        found = {row["method"]: row for row in known if _fits(row, rest.split())}
        found.pop("none", None)
        return list(found.values()) or [_last([], rest.split(), claim)]
    return [_last(known, part.split(), claim) for part in f" {rest} ".split(" vs ")]


@functools.lru_cache(maxsize=16)
def _good(file: Path, _written: int) -> list[Row]:
    """Good rows of a file, which dozens of claims are about, read once as long as it stays."""
    return [row for row in read_rows(file) if row["status"] == "ok"]


def _last(known: Sequence[Row], conditions: Sequence[str], claim: Claim) -> Row:
    for row in reversed(known):
        if _fits(row, conditions):
            return row
    raise ZooError(f"no row for {claim.number} <!-- {claim.source}: {claim.field} -->")


def _fits(row: Row, conditions: Sequence[str]) -> bool:
    wanted = [condition.split("=", 1) for condition in conditions]
    return all(_is(field(row, name), value) for name, value in wanted)


def field(row: Row, name: str) -> Any:
    """A field of a row by its path, such as `knn.agreement` or `by_batch.0.ms`; None: not there."""
    found: Any = row
    for part in name.split("."):
        if isinstance(found, Mapping):
            found = found.get(part)
        elif isinstance(found, list) and part.isdigit():
            found = found[int(part)] if int(part) < len(found) else None
        else:
            return None
    return found


def _is(value: Any, text: str) -> bool:
    try:
        wanted: Any = json.loads(text)
    except ValueError:
        wanted = text
    if isinstance(value, str):  # such as the family of a processor, "6"
        return value == text
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def value_of(claim: Claim, rows: Sequence[Row]) -> float:
    """What the rows say.

    Raises:
        ZooError: They do not say it.
    """
    found: Any = None
    if claim.field in _PAIRED and len(rows) == 2:
        test = compared(*rows) or compared(*rows, task="knn")
        found = None if test is None else getattr(test, claim.field)
    elif claim.field.startswith("count "):
        name, *condition = claim.field.split()[1:]
        values = [v for row in rows if (v := field(row, name)) is not None]
        found = len(values)
        if condition:
            sign, limit = condition
            found = sum(_COMPARED[sign](value, float(limit)) for value in values)
    elif claim.field.startswith("minus "):
        one, other = (field(row, claim.field.removeprefix("minus ")) for row in rows)
        found = one - other
    elif claim.field == "share":
        found = 100 * rows[0]["gmacs"]["total"] / rows[0]["gmacs_dense"]
    elif claim.field in _OVER and rows[0].get("imgs_per_s"):
        found = rows[0]["imgs_per_s"] / rows[0][_OVER[claim.field]]
    else:
        found = field(rows[0], claim.field)
    if not isinstance(found, (int, float)) or isinstance(found, bool):
        raise ZooError(f"{claim.source}: the row has no number {claim.field!r}, but {found!r}")
    return float(found)


def as_written(value: float, number: str) -> str:
    """A value with as many digits as a number on a page has."""
    if "e" in number:
        return f"{value:.0e}".replace("e-0", "e-")
    digits = len(number.partition(".")[2])
    rounded = Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)
    return f"{rounded:,}" if "," in number else str(rounded)


def wrong(page: str, folder: Path = RESULTS) -> list[str]:
    """A line for every number of a page that is not what its row says."""
    found = []
    for claim in claims(page):
        try:
            said = as_written(value_of(claim, rows_of(claim, folder)), claim.number)
        except ZooError as error:
            found.append(str(error))
            continue
        if said != claim.number:
            found.append(f"{claim.number}: {claim.source}: {claim.field} is {said}")
    return found


def listed(page: str, folder: Path = RESULTS) -> str:
    """Markdown: the rows that a page speaks of, each once, with the command that made it."""
    lines = ["| row | file | command |", "|---|---|---|"]
    seen = set()
    for claim in claims(page):
        rows = rows_of(claim, folder)
        for row in rows[-1:] if claim.field.startswith("count ") else rows:
            if row["run_id"] not in seen:
                seen.add(row["run_id"])
                name = claim.source.partition(" ")[0]
                link = f"[{name}](../results/{name}.jsonl)"
                lines.append(f"| {row['run_id']} | {link} | `{row['command']}` |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.claims")
    usage.add_argument("pages", nargs="+", type=Path)
    usage.add_argument("--write", action="store_true", help="list the rows at the end of the pages")
    given = usage.parse_args(arguments)
    bad = 0
    for path in given.pages:
        page = path.read_text(encoding="utf-8")
        problems = wrong(page)
        bad += len(problems)
        print(f"{path}: {len(claims(page))} numbers, {len(problems)} not as their rows say")
        for line in problems:
            print(f"  {line}")
        if given.write and not problems and MARKS[0] in page:
            path.write_text(inserted(page, listed(page), *MARKS), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

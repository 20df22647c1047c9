"""Numbers in prose equal the rows that they are from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import claims
from zoo.errors import ZooError
from zoo.results.answers import packed

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/findings.md",
    "docs/leaderboard.md",
    "docs/performance.md",
    "docs/size-bias.md",
)


@pytest.fixture
def folder(tmp_path):
    def row(method: str, value: float, right: list[bool], **more):
        return {
            **{"run_id": method, "status": "ok", "method": method, "top1": value, "n_images": 12},
            **{"command": f"python eval.py reducer={method}", "gmacs_dense": 2.0},
            "answers": {"accuracy": packed(right)},
            **more,
        }

    rows = [
        row("tome", 80.04, [True] * 12, gmacs={"total": 1.0}),
        row("tome", 91.25, [True] * 12, gmacs={"total": 1.0}, reducer={"prop_attn": True}),
        row("topk", 66.5, [True] * 4 + [False] * 8),
        row("evit", 99.0, [], status="failed"),
        row("dct", 1.0, [], answers={"knn": packed([True] * 12)}),
        row("evs", 1.0, [], answers={"knn": packed([True] * 7 + [False] * 5)}),
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("91.2 %<!-- a/b method=tome: top1 -->", True),  # of several rows the last; half to even
        ("91.25<!-- a/b method=tome reducer.prop_attn=true: top1 -->", True),
        ("91.3 %<!-- a/b method=tome: top1 -->", False),
        ("50 %<!-- a/b method=tome: share -->", True),
        ("24.75 points<!-- a/b method=tome vs method=topk: minus top1 -->", True),
        ("0.008<!-- a/b method=tome vs method=topk: p -->", True),
        ("8e-3<!-- a/b method=tome vs method=topk: p -->", True),
        ("8 images<!-- a/b method=tome vs method=topk: first -->", True),
        ("9 images<!-- a/b method=tome vs method=topk: first -->", False),
        ("5 images<!-- a/b method=dct vs method=evs: first -->", True),
        ("0.06<!-- a/b method=dct vs method=evs: p -->", True),
        ("99<!-- a/b method=evit: top1 -->", False),  # a failed row is none
        ("1<!-- a/b method=tome reducer.prop_attn=false: top1 -->", False),
        ("1<!-- a/b method=tome: nothing -->", False),
        ("4<!-- a/b : count top1 -->", True),  # of a method the last row
        ("2<!-- a/b : count top1 below 66 -->", True),
        ("2<!-- a/b : count top1 from 66.5 -->", True),
        ("1<!-- a/b : count gmacs.total -->", True),
        ("3<!-- a/b : count top1 below 66 -->", False),
        ("0<!-- a/b method=lost: count top1 -->", False),  # there is nothing to count
    ],
)
def test_a_number_is_what_its_row_says(folder, text, right):
    assert len(claims.claims(f"Some {text} words.")) == 1
    assert (claims.wrong(f"Some {text} words.", folder) == []) == right


def test_rows_are_listed_once_with_their_commands(folder):
    page = "91<!-- a/b method=tome: top1 -->, 91<!-- a/b method=tome: top1 -->"
    lines = claims.listed(page, folder).splitlines()
    assert lines[2:] == ["| tome | [a/b](../results/a/b.jsonl) | `python eval.py reducer=tome` |"]


def test_of_what_is_counted_one_row_is_listed(folder):
    lines = claims.listed("2<!-- a/b : count top1 below 66 -->", folder).splitlines()
    assert len(lines) == 3 and "| evs |" in lines[2]


def test_a_file_that_was_written_again_is_read_again(folder):
    page = "91<!-- a/b method=tome: top1 -->"
    assert claims.wrong(page, folder) == []
    file = folder / "a" / "b.jsonl"
    text = file.read_text().replace("91.25", "12.5")
    file.write_text(text)
    os.utime(file, ns=(1, 1))
    assert claims.wrong(page, folder) != []


def test_a_claim_without_a_row_says_so(folder):
    claim = claims.Claim("5", "a/b method=lost", "top1")
    with pytest.raises(ZooError, match="no row for 5 <!-- a/b method=lost"):
        claims.rows_of(claim, folder)


@pytest.mark.parametrize("name", PAGES)
def test_pages_say_what_their_rows_say(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert claims.claims(page), f"{name} has no number with a row"
    assert claims.wrong(page) == []
    if claims.MARKS[0] in page:
        assert claims.listed(page) in page

"""Rows: the schema, files that several processes write, intervals, words."""

import json
import math
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

import zoo.results.rows
from zoo.errors import ZooError
from zoo.report.words import describe_budget, describe_tokens, format_gmacs, summary_line
from zoo.results.rows import FIELDS, append_row, new_row, read_rows, wilson_interval

ROOT = Path(zoo.results.rows.__file__).resolve().parents[1]


def run_python(code, *arguments, cwd=ROOT):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_new_row_has_every_field_and_fills_in_the_run():
    row = new_row(method="tome", top1=97.5)
    assert list(row) == list(FIELDS)
    assert row["status"] == "ok" and row["top1"] == 97.5 and row["top5"] is None
    age = datetime.now(timezone.utc) - datetime.fromisoformat(row["created"])
    assert 0 <= age.total_seconds() < 60
    assert set(row["versions"]) == {"python", "torch", "timm", "lightning", "tokenzoo"}
    assert row["versions"]["python"] == sys.version.split()[0]
    assert new_row()["run_id"] != row["run_id"]
    json.dumps(row, allow_nan=False)


def test_new_row_refuses_what_is_not_a_field():
    with pytest.raises(TypeError, match="'top_1' is not a field.*did you mean top1"):
        new_row(top_1=3)
    with pytest.raises(ZooError, match="'ok', 'failed', 'skipped', got 'done'"):
        new_row(status="done")


def test_rows_become_plain_json():
    row = new_row(
        top1=np.float32(1.5),
        n_images=np.int64(7),
        ci95=(1.0, float("nan")),
        weights=Path("a/b"),
        reducer={"name": "tome", "r": np.array([1, 2])},
    )
    assert (row["top1"], row["n_images"], row["ci95"]) == (1.5, 7, [1.0, None])
    assert row["weights"] == "a/b" and row["reducer"] == {"name": "tome", "r": [1, 2]}
    assert type(row["n_images"]) is int


def test_commit_only_of_our_own_checkout(monkeypatch, tmp_path):
    zoo.results.rows._checkout.cache_clear()
    monkeypatch.setattr(zoo.results.rows, "__file__", str(tmp_path / "site" / "zoo" / "rows.py"))
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # somebody else's repository
    try:
        row = new_row()
        assert row["git"] is None and row["dirty"] is None
    finally:
        zoo.results.rows._checkout.cache_clear()


def test_commit_and_state_of_a_checkout(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(zoo.results.rows, "__file__", str(tmp_path / "zoo" / "results" / "rows.py"))
    (tmp_path / "zoo" / "results").mkdir(parents=True)
    (tmp_path / "zoo" / "results" / "rows.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    states = []
    for change in (None, "notes.txt", "zoo/new.py"):
        if change:
            (tmp_path / change).write_text("x")
        zoo.results.rows._checkout.cache_clear()
        states.append(zoo.results.rows._checkout())
    zoo.results.rows._checkout.cache_clear()
    commit = git("rev-parse", "HEAD")
    assert states == [(commit, False), (commit, False), (commit, True)]


def test_rows_need_no_torch(tmp_path):
    code = (
        "import sys, zoo.results.rows as r; r.append_row(sys.argv[1], r.new_row(method='tome'));"
        "r.read_rows(sys.argv[1]); heavy = {'torch', 'timm', 'lightning', 'pandas'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out, errors = run_python(code, tmp_path / "rows.jsonl").communicate(timeout=60)
    assert out.strip() == "[]", errors


def test_a_name_that_is_not_utf8_comes_back_as_it_was(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    path = append_row(tmp_path / "rows.jsonl", new_row(method="tome", notes=name))
    path.read_text(encoding="utf-8")  # the file itself stays UTF-8
    assert read_rows(path)[0]["notes"] == name


def test_append_creates_folders_and_never_rewrites(tmp_path):
    path = tmp_path / "a" / "b" / "rows.jsonl"
    assert append_row(path, new_row(method="one", notes="ä\nb")) == path
    before = path.read_bytes()
    append_row(path, new_row(method="two"))
    assert path.read_bytes().startswith(before)
    assert [row["method"] for row in read_rows(path)] == ["one", "two"]
    assert read_rows(path)[0]["notes"] == "ä\nb"


def test_append_does_not_glue_to_a_line_without_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"method": "one"}')
    append_row(path, {"method": "two"})
    assert [row["method"] for row in read_rows(path)] == ["one", "two"]


def test_append_to_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot write results to"):
        append_row(tmp_path / "file" / "rows.jsonl", {})
    with pytest.raises(ZooError, match="cannot write results to"):
        append_row(tmp_path, {})


def test_processes_append_to_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from zoo.results.rows import append_row\n"
        "for i in range(150): append_row(sys.argv[1], {'seed': i, 'notes': sys.argv[2] * 9000})"
    )
    workers = [run_python(code, path, letter) for letter in "abc"]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    rows = read_rows(path)
    for letter in "abc":
        own = [row["seed"] for row in rows if row["notes"] == letter * 9000]
        assert own == list(range(150))
    assert len(rows) == 450


def test_read_folder_in_order_of_time(tmp_path):
    append_row(tmp_path / "z.jsonl", {"method": "old", "created": "2026-01-01T00:00:00+00:00"})
    append_row(tmp_path / "x/y.jsonl", {"method": "new", "created": "2026-01-02T00:00:00+00:00"})
    (tmp_path / "z.txt").write_text("not a row")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    rows = read_rows(tmp_path)
    assert [row["method"] for row in rows] == ["old", "new"]
    assert set(FIELDS) <= set(rows[0])  # fields that the file lacks are None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1}\n{"a": \n', 2),
        ("[1]\n", 1),
        ("\n\n7\n", 3),
        ('{"a": 1}{"a": 2}\n', 1),
        (b'{"a": 1}\n{"a": "\xff"}\n', 2),
    ],
)
def test_corrupt_line_is_named(tmp_path, text, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ZooError) as caught:
        read_rows(tmp_path)
    assert str(caught.value).startswith(f"{path}:{line}: expected")
    assert "\n" not in str(caught.value)


def test_nan_in_a_file_is_unknown(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"top1": NaN, "ms": Infinity}\n')
    [row] = read_rows(tmp_path)
    assert row["top1"] is None and row["ms"] is None


def test_nothing_to_read(tmp_path):
    with pytest.raises(ZooError, match=r"expected \*\.jsonl files in .*found none"):
        read_rows(tmp_path)
    with pytest.raises(ZooError, match="does not exist"):
        read_rows(tmp_path / "missing")


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
    ],
)
def test_wilson_published_values(k, n, low, high):
    found = wilson_interval(k, n)
    assert found == pytest.approx((low, high), abs=0.006)
    mirrored = wilson_interval(n - k, n)
    assert mirrored == pytest.approx((100 - found[1], 100 - found[0]))


def test_wilson_solves_its_equation_at_any_confidence():
    z = 2.5758293035489004  # of 99 %
    for end in wilson_interval(30, 40, confidence=0.99):
        p = end / 100
        assert abs(30 / 40 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 40))
    assert wilson_interval(40, 40)[1] == 100.0 and wilson_interval(0, 40)[0] == 0.0


@pytest.mark.parametrize("bad", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(bad):
    with pytest.raises(ZooError, match="expected 0 <= k <= n"):
        wilson_interval(*bad)
    with pytest.raises(ZooError, match="confidence"):
        wilson_interval(1, 2, confidence=95)


def test_summary_line():
    row = {
        "backbone": "deit_small",
        "method": "tome",
        "schedule": {"name": "constant_r", "r": 13, "inflection": None, "strict": True},
        "gmacs": {"total": 2.7061},
        "gmacs_dense": 4.5989,
        "tokens": [[197, 184], [184, 41]],
        "top1": 97.5,
        "ci95": [96.0, 98.61],
        "imgs_per_s": 123.4,
    }
    assert summary_line(row) == (
        "deit_small + tome r=13 | 2.706 GMACs (-41.2 %) | tokens 197->41 "
        "| top-1 97.50 % [96.00, 98.61] | 123 img/s"
    )
    dense = {"backbone": "deit_small", "method": "none", "gmacs": {"total": 4.5989}}
    assert summary_line({**dense, "gmacs_dense": 4.5989}) == "deit_small | 4.599 GMACs"
    failed = summary_line({**row, "status": "failed", "error": "one\ntwo"})
    assert failed == "deit_small + tome r=13 | FAILED: one two"
    assert summary_line(new_row()) == "?"


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (None, ""),
        ({"name": "constant_r", "r": [8, 8, 4, 4, 2]}, "r=8,8,4,…"),
        ({"name": "constant_r", "r": 12.5, "inflection": -1.0}, "r=12.5 inflection -1"),
        ({"name": "keep_rate", "rate": 0.7, "blocks": None, "of": "initial"}, "keep 0.7"),
        ({"name": "keep_rate", "rate": 0.5, "blocks": [3, 6, 9]}, "keep 0.5 @3,6,9"),
        ({"name": "per_block", "keep": [9, None], "prefix": 0}, "keep 9,None"),
        ({"name": "target_gmacs", "gmacs": 2.9, "fraction": 0.5, "family": None}, "2.9 GMACs"),
        ({"name": "target_gmacs", "gmacs": None, "fraction": 0.5}, "50 % of dense"),
        ({"name": "radius", "pattern": "l2", "start": 3}, "radius pattern=l2 start=3"),
    ],
)
def test_budget_in_words(schedule, words):
    assert describe_budget(schedule) == words


def test_words_survive_strange_values():
    assert describe_tokens([]) == describe_tokens(None) == describe_tokens("x") == ""
    assert [format_gmacs(g) for g in (104.66, 17.58, 4.5989, 0.05214, 0.00123)] == [
        "104.7",
        "17.58",
        "4.599",
        "0.0521",
        "0.00123",
    ]


def test_command_of_a_module_is_no_path(tmp_path):
    (tmp_path / "some_module.py").write_text(
        "from zoo.results.rows import new_row\nprint(new_row()['command'])\n"
    )
    command = [sys.executable, "-m", "some_module", "a b"]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "python -m some_module 'a b'\n", done.stderr

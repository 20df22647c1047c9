"""Files of rows as they are found: broken lines, and texts that are not meant to be read."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import zoo
from tests.test_report import dense, payload, row
from zoo.cli.main import main
from zoo.errors import ZooError
from zoo.report import table, write_report
from zoo.report.words import printable, summary_line
from zoo.results.rows import append_row, plain, read_rows, readable_rows

ROOT = Path(zoo.__file__).resolve().parents[1]
BROKEN = {
    "cut off": b'{"method": "tome", "top1": 9',
    "binary": bytes(range(256)).replace(b"\n", b""),
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "two rows in one line": b'{"a": 1}{"a": 2}',
    "no UTF-8": b'{"a": "\xff"}',
    "a number too long": b'{"a": ' + b"9" * 5000 + b"}",
    "too deep": b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep": b'{"a": ' + b"[" * 700 + b"]" * 700 + b"}",
    "escapes": b"\x1b]0;title\x07\x1b[2J",
}
#: Colours, a cursor, a window title, a link, one-byte forms, other directions, half characters.
ESCAPES = (
    "\x1b[31m",
    "\x1b[2J\x1b[1;1H",
    "\x1b]0;title\x07",
    "\x1b]8;;http://a.b\x1b\\",
    "\x9b5m",
    "\u202e",
    "\u200b",
    "\ud800",
    "\x00\x07\x08",
    "\x1bc",
    "\x1b(0",
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for one in (dense(), row()):
        append_row(tmp_path / "rows.jsonl", one)
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("what", BROKEN)
def test_a_report_reads_past_a_broken_line(rows: Path, what: str, capsys: Any) -> None:
    first, second = rows.read_bytes().splitlines()
    rows.write_bytes(b"\n".join([first, b"", BROKEN[what], second, b""]))
    assert main(["report", str(rows)]) == 0
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert line.startswith(f"warning: left out {rows}:3: expected one JSON object, got ")
    assert len(line) < len(str(rows)) + 200 and line.isprintable()
    assert "tome" in out and "dense" in out
    assert len((rows.parent / "report.csv").read_text().splitlines()) == 3
    with pytest.raises(ZooError, match=r"rows.jsonl:3: expected .*delete or repair that line"):
        read_rows(rows)


def test_several_broken_lines_of_several_files_are_one_warning(rows: Path, capsys: Any) -> None:
    with rows.open("ab") as file:
        file.writelines(line + b"\n" for line in BROKEN.values())
    other = rows.parent / "sub" / "more.jsonl"
    other.parent.mkdir()
    other.write_bytes(b"{\n")
    assert main(["report", str(rows.parent)]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert f"{rows}:3: " in line and f"(and {len(BROKEN)} more such lines)" in line
    assert len(readable_rows([rows, other])) == 2


def test_nothing_but_broken_lines_is_no_report(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"{\n[]\n")
    assert main(["report", str(tmp_path)]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and error.startswith("error: a report needs")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_file_of_an_editor_with_a_mark_at_its_start_is_read(rows: Path) -> None:
    rows.write_bytes(b"\xef\xbb\xbf" + rows.read_bytes().replace(b"\n", b"\r\n"))
    assert [one["method"] for one in read_rows(rows)] == ["none", "tome"]


def test_a_number_beyond_all_numbers_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"top1": 1e999, "gmacs": {"total": -1e999}}')
    [found] = read_rows(tmp_path)
    assert found["top1"] is None and found["gmacs"] == {"total": None}


@pytest.mark.parametrize("escape", ESCAPES)
def test_texts_lose_what_is_not_read(escape: str) -> None:
    assert printable(f"a{escape}b") == "ab"
    assert printable({f"a{escape}": [f"{escape}b\nc\td", 1, None]}) == {"a": ["b c d", 1, None]}
    assert printable("Grüße, 日本 ×2 – ±0.5 %") == "Grüße, 日本 ×2 – ±0.5 %"


FIELDS = ("method", "backbone", "tag", "dataset", "split", "device", "dtype", "weights", "notes")


def hostile(fields: tuple[str, ...], status: str = "ok") -> dict[str, Any]:
    bad = "".join(ESCAPES) + "\r\n# heading\n"
    found = row(status=status)
    found.update({name: f"{found.get(name) or 'x'}{bad}" for name in fields})
    found["schedule"] = {"name": f"odd{bad}", f"key{bad}": bad}
    found["reducer"] = {"name": f"tome{bad}", bad: bad}
    found["recipe"] = {"plugins": [f"plug{bad}"]}
    found["error"] = f"reason{bad}" if status == "failed" else None
    return {**found, f"extra{bad}": bad}


@pytest.mark.parametrize("field", [*FIELDS, "all"])
@pytest.mark.parametrize("status", ["ok", "failed"])
def test_no_name_in_a_row_reaches_a_terminal_or_a_page_as_it_is(
    tmp_path: Path, field: str, status: str
) -> None:
    fields = FIELDS if field == "all" else (field,)
    found = [plain(dense()), plain(hostile(fields, status)), plain(row(hits=340))]
    assert summary_line(found[1]).isprintable()
    assert table(found).replace("\n", "").isprintable()
    if field != "all":
        return
    paths = write_report(found, tmp_path, title="a\x1b[31mtitle\nof two")
    for path in paths[:3]:
        text = path.read_text(encoding="utf-8")
        assert not set("\x1b\x07\x08\x00\x9b\u202e\u200b") & set(text)
        assert "\n# heading" not in text.replace("# atitle", "")
        assert text.count("\r") == 0
    assert "atitle of two" in paths.markdown.read_text(encoding="utf-8")
    shown = json.dumps(payload(paths.html.read_text(encoding="utf-8")))
    assert not any(f"\\u{ord(c):04x}" in shown for c in "\x1b\x07\x9b\u202e\ud800")


def test_an_error_of_a_command_is_printable(capsys: Any) -> None:
    assert main(["report", "no\x1b[31msuch\nfile.jsonl"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.isprintable() and "nosuch file.jsonl does not exist" in line


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout")
@pytest.mark.parametrize("folder", ["results", "results/digits", "results/new", "outputs/x"])
def test_git_ignores_what_a_report_leaves_beside_rows(folder: str, rows: Path) -> None:
    names = [path.name for path in write_report(rows, rows.parent)]
    names += [f".{name}.4711" for name in names]  # while it is written
    for name in names:
        command = ["git", "-C", str(ROOT), "check-ignore", "-q", f"{folder}/{name}"]
        assert subprocess.run(command).returncode == 0, f"{folder}/{name}"
    # But the rows themselves are kept.
    kept = ["git", "-C", str(ROOT), "check-ignore", "-q", "results/digits/trained.jsonl"]
    assert subprocess.run(kept).returncode == 1

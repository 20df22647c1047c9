"""Published numbers: nothing is called what it is not, and the page says what the file says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

import zoo
from zoo.cli.published import cost_of
from zoo.errors import ZooError
from zoo.published import config_folder
from zoo.report import write_report
from zoo.report.published import COSTS, FILE, TAGS, command, entries, key_of, page, read, runs_here
from zoo.results.rows import new_row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def test_every_method_that_is_here_has_our_gmacs_near_theirs() -> None:
    found = read(RESULTS)
    assert len(found) > 100
    for one in found:
        if one.command:
            assert one.ours is not None, one
        if one.ours is None or one.gmacs is None:
            continue
        # Papers round, count otherwise, or leave their own products out: never by a fifth.
        assert abs(one.ours / one.gmacs - 1) < 0.2, one
    assert not json.loads((RESULTS / COSTS).read_text()).keys() - {
        key_of(entry) for entry in entries(RESULTS)
    }


def test_stored_gmacs_are_what_zoo_computes() -> None:
    stored = json.loads((RESULTS / COSTS).read_text())
    some = [e for e in entries(RESULTS) if e.get("backbone") == "deit_small" and runs_here(e)]
    for entry in (some[0], some[1], next(e for e in some if "published" in e)):
        assert stored[key_of(entry)] == pytest.approx(cost_of(entry))


def test_second_hand_numbers_are_called_so() -> None:
    text = page(read(RESULTS))
    assert text == (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    assert "None of them was run here" in text
    for tag, words in TAGS.items():
        assert f"| {tag} | {words} |" in text
    for one in read(RESULTS):
        if one.tag == "2":
            assert not re.search(r"own table|README", one.source), one


def test_commands_are_options_that_exist() -> None:
    known = {e["reducer"] for e in entries(RESULTS) if "reducer" in e}
    assert known <= set(zoo.list_methods())
    lines = {command(e) for e in entries(RESULTS)} - {""}
    kinds = {re.sub(r"[\d.]+", "", line): line for line in lines if line.startswith("python e")}
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        for line in sorted(kinds.values())[:: max(1, len(kinds) // 8)]:
            words = [word.strip("'") for word in line.split()[2:]]
            assert compose("eval", words).data.root == "PATH"
    options = {p.stem for p in (config_folder() / "backbone").glob("*.yaml")}
    assert {e["backbone"] for e in entries(RESULTS) if "backbone" in e} <= options


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tag": "Z"}, "tag must be one of"),
        ({"top1": 790}, "percentage"),
        ({"training": "some"}, "training must be"),
        ({"colour": 1}, "unknown key colour"),
        ({"source": None}, None),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    entry = {"method": "m", "training": "none", "backbone": "deit_small", "gmacs": 1.0}
    entry |= {"top1": 70.0, "tag": "T", "source": "a table", **change}
    (tmp_path / FILE).write_text(yaml.safe_dump([entry]))
    if words is None:
        assert read(tmp_path)[0].command == ""  # no method of ours: nothing to type
        return
    with pytest.raises(ZooError, match=words) as error:
        read(tmp_path)
    assert "entry 0" in str(error.value)


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    for text in ("{a: 1}", "[1, 2]", "a: [", ""):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ZooError, match="published.yaml"):
            read(tmp_path)


def test_a_report_over_a_folder_with_published_numbers_draws_them(tmp_path: Path) -> None:
    row = new_row(method="none", backbone="deit_small", dataset="imagenet", top1=79.8)
    rows = [{**row, "gmacs": {"total": 4.6}}]
    without = write_report(rows, tmp_path / "a").html.read_text(encoding="utf-8")
    assert 'id="published"' not in without
    text = write_report(rows, tmp_path / "b", published=RESULTS).html.read_text(encoding="utf-8")
    found = re.search(r'id="payload">(.*?)</script>', text, re.S)
    assert found is not None and 'id="published"' in text
    payload = json.loads(found[1])
    assert len(payload["published"]) > 100 and len(payload["imagenet"]) == 1
    assert all(p["hover"][-1] == "not run here" for p in payload["published"])

"""The catalogue's columns come from files that runs have written, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reduction
from tests.parity.runner import main, methods_of, recorded
from zoo.cli import catalogue, docs
from zoo.errors import ZooError
from zoo.report import evidence

GOLDEN = Path(__file__).parent / "golden"


def row(**known: object) -> dict[str, object]:
    return {
        "status": "ok",
        "method": "tome",
        "backbone": "vit_digits",
        "dataset": "digits",
        "split": "test",
        "top1": 90.0,
        "trained": False,
        "gmacs": {"total": 0.5},
        "gmacs_dense": 1.0,
        "recipe": {"plugins": []},
        **known,
    }


def write(folder: Path, *rows: dict[str, object]) -> Path:
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "digits" / "rows.jsonl").write_text(lines)
    return folder


def test_nothing_run_is_a_dash(tmp_path: Path) -> None:
    assert evidence.fixtures(tmp_path) == {} and evidence.digits(tmp_path) == {}
    assert str(evidence.Fixtures(0, 0)) == "-"
    assert str(evidence.Digits(None, None)) == "- / -"


def test_the_best_row_at_half_the_cost_counts(tmp_path: Path) -> None:
    found = evidence.digits(
        write(
            tmp_path,
            row(top1=90.0),
            row(top1=91.25, gmacs={"total": 0.45}),
            row(top1=95.0, trained=True),
            # None of these: another budget, backbone, split, plugin, or a failure.
            row(top1=99.0, gmacs={"total": 0.75}),
            row(top1=99.0, gmacs={"total": 0.35}),
            row(top1=99.0, backbone="jumbo_digits"),
            row(top1=99.0, split="val"),
            row(top1=99.0, recipe={"plugins": [{"name": "clca"}]}),
            row(top1=None, status="failed"),
            row(method="none", gmacs={"total": 0.5}),
        )
    )
    assert found == {"tome": evidence.Digits(91.25, 95.0)}
    assert str(found["tome"]) == "91.2 / 95.0"


def test_fixtures_are_counted_per_method(tmp_path: Path) -> None:
    entries = {
        "a": {"status": "PASS", "methods": ["tome", "topk"]},
        "b": {"status": "FAIL", "methods": ["tome"]},
    }
    (tmp_path / "parity.json").write_text(json.dumps({"fixtures": entries}))
    found = evidence.fixtures(tmp_path)
    assert str(found["tome"]) == "1 of 2" and str(found["topk"]) == "1"
    (tmp_path / "parity.json").write_text("{}")
    with pytest.raises(ZooError, match="--write"):
        evidence.fixtures(tmp_path)


def test_a_parity_run_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        name = f"topk_kr70_p64{suffix}"
        (folder / name).write_bytes((GOLDEN / name).read_bytes())
    (folder / "x.json").write_text('{"method": "nobody", "fixture": "x"}')
    assert main(folder, tmp_path / "parity.json") == 1
    entries = json.loads((tmp_path / "parity.json").read_text())["fixtures"]
    assert entries["topk_kr70_p64"]["status"] == "PASS"
    assert entries["topk_kr70_p64"]["methods"] == ["topk"]
    assert entries["topk_kr70_p64"]["comparisons"] > 1
    assert entries["x"] == {"status": "FAIL", "cases": 1, "comparisons": 0, "methods": []}
    assert evidence.fixtures(tmp_path) == {"topk": evidence.Fixtures(1, 1)}
    assert "wrote" in capsys.readouterr().out


def test_a_fixture_belongs_to_what_it_is_named_after_and_what_it_builds() -> None:
    assert methods_of("tome_matching_functions", []) == ["tome"]
    assert methods_of("clca_paramfree", ["tome", "topk"]) == ["clca"]
    assert methods_of("kmedoids_kr50_p64", ["kmedoids_haurum"]) == ["kmedoids_haurum"]
    assert methods_of("selector_prumerge_plus_p576", []) == ["selector_prumerge_plus"]
    assert methods_of("selector_cdpruner_k12_p64", []) == ["selector_dpp"]
    with recorded() as built:
        reduction.create("random")
    assert built == {"random"}
    reduction.create("topk")
    assert built == {"random"}


def test_the_committed_parity_file_knows_every_fixture() -> None:
    stored = json.loads((evidence.RESULTS / "parity.json").read_text())["fixtures"]
    assert set(stored) == {p.stem for p in GOLDEN.glob("*.json")}, (
        "run `python -m tests.parity tests/golden --write`, then `python -m zoo.cli.docs`"
    )


def test_tables_have_a_row_and_every_column_for_each_method() -> None:
    full = docs.full_table().splitlines()
    short = docs.methods_table("").split("\n\n")[0].splitlines()
    names = reduction.list_methods()
    for table in (full, short):
        assert len(table) == len(names) + 2
        assert len({line.count(" | ") for line in table if "---" not in line}) == 1
    terminal = catalogue.methods_table(names)
    assert all(any(line.startswith(f"{n} ") for line in terminal.splitlines()) for n in names)


def test_what_a_method_needs_and_counts() -> None:
    assert catalogue.attention_needs(reduction.create("topk")) == "class row"
    assert catalogue.attention_needs(reduction.create("tome", metric="feature")) == "nothing"
    assert catalogue.counts(reduction.create("ats")) == "adaptive"
    assert catalogue.describe("random")["fixtures"] == {"passed": 0, "total": 0}
    assert all(signal in catalogue._SIGNALS for signal in reduction.Signals._fields)

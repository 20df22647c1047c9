"""The page about sizes in the attention: its tables follow from rows."""

from __future__ import annotations

from benchmarks import size_bias
from zoo.results.rows import read_rows


def test_the_tables_of_the_page_are_those_of_the_rows() -> None:
    page = size_bias.PAGE.read_text(encoding="utf-8")
    assert size_bias.write_tables(page) == page
    for name in size_bias.NAMES:
        for row in read_rows(size_bias.ROWS / f"{name}.jsonl"):
            assert row["status"] == "ok" and f"experiment=size_bias/{name}" in row["command"]
            assert row["gallery"] == "dense" and row["dirty"] is False


def test_of_rows_for_one_setting_the_last_counts() -> None:
    knn = {"top1": 50.0, "ci95": [40.0, 60.0], "agreement": 70.0}
    row = {
        **{"status": "ok", "method": "topk", "knn": knn, "gmacs": {"total": 1.234}},
        "reducer": {"name": "topk", "prop_attn": True, "settle": "nearest"},
        "centred_cosine": {"mean": 0.5, "worst": -0.25},
    }
    lines = size_bias.table([row, {**row, "knn": {**knn, "top1": 51.0}}]).splitlines()
    assert len(lines) == 3
    assert lines[2] == (
        "| topk | yes | nearest | 1.23 | 51.0 | 40.0 to 60.0 | 70.0 | 0.500 | -0.250 |"
    )

"""Rows of `task=select` in the report: selectors beside their two controls."""

from __future__ import annotations

from typing import Any

from zoo.report.selection import COLUMNS, as_html, sections
from zoo.report.tables import markdown_table, table
from zoo.results.rows import new_row


def _row(name: str, knn: float, created: str = "2026-01-01", **more: Any) -> dict[str, Any]:
    def measured(top1: float) -> dict[str, Any]:
        return {"knn_top1": top1, "recall1": 80.0, "map": 50.0, "agreement": 70.0}

    entry = {
        "keep": 16,
        "selector": {**measured(knn), "coverage_mean": 0.1234, "coverage_worst": 0.5},
        "random": {**measured(60.0), "knn_top1_spread": 2.0, "coverage_mean": 0.2},
        "resolution": {**measured(55.0), "n_tokens": 9, "gmacs": 0.01},
    }
    select = {
        "selector": {"name": name, **more},
        "block": 4,
        "norm": False,
        "n_images": 100,
        "gallery": "own",
        "n_gallery": 300,
        "by_keep": [entry],
    }
    return {
        **new_row(task=["select"], method="none", backbone="vit_digits", dataset="digits"),
        "split": "test",
        "created": created,
        "gmacs": {"total": 0.04},
        "select": select,
    }


def test_every_selector_stands_beside_both_controls() -> None:
    [section] = sections([_row("scope", 90.0), _row("dpp", 80.0), {"select": "damaged"}])
    assert "vit_digits" in section.title and "block 4" in section.title
    assert [line[:2] for line in section.lines] == [
        ["16", "dpp"],
        ["16", "scope"],
        ["16", "random"],
        ["16", "smaller image, 9"],
    ]
    knn = COLUMNS.index("k-NN %")
    assert [line[knn] for line in section.lines] == ["80.0", "90.0", "60.0 ± 2.0", "55.0"]
    assert section.lines[1][COLUMNS.index("Coverage error")] == "0.123"
    assert [line[-1] for line in section.lines] == ["0.0400", "0.0400", "0.0400", "0.0100"]


def test_the_latest_run_counts_and_arguments_tell_runs_apart() -> None:
    rows = [_row("scope", 1.0, "2026-01-02"), _row("scope", 2.0), _row("scope", 3.0, alpha=0.5)]
    [section] = sections(rows)
    names = [line[1] for line in section.lines]
    assert names[:2] == ["scope", "scope alpha=0.5"]
    assert section.lines[0][COLUMNS.index("k-NN %")] == "1.0"
    # Another tower is another table.
    assert len(sections([*rows, {**rows[0], "backbone": "other"}])) == 2


def test_console_markdown_and_page_have_them() -> None:
    from zoo.report.compare import compare

    rows = [_row("scope<b>", 90.0)]
    assert "smaller image, 9" in table(rows)
    text = markdown_table(compare(rows), "t")
    assert "| 16 | scope&lt;b&gt; |" in text
    page = as_html(sections(rows))
    assert "<td>scope&lt;b&gt;</td>" in page and "scope<b>" not in page
    assert as_html([]) == "" and sections([]) == []

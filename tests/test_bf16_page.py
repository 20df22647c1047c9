"""The page about bfloat16: its tables follow from rows, and its numbers from answers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bf16
from zoo.results.rows import read_rows


def test_the_tables_of_the_page_are_those_of_the_rows() -> None:
    rows = read_rows(bf16.ROWS)
    page = bf16.PAGE.read_text(encoding="utf-8")
    assert bf16.write_tables(page, rows) == page
    assert {row["method"] for row in rows} == set(bf16.METHODS)
    assert all(row["n_images"] == 360 and row["status"] == "ok" for row in rows)
    for row in rows:
        words = row["command"].removeprefix("python eval.py ")
        assert ("weights_dtype" in words) == (row["weights_dtype"] is not None)
        assert row["dtype"] == ("bfloat16" if " dtype=" in words else "float32")


def test_pairs_and_patches_are_counted() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    # Two images of four patches: pairs 01, 23 and 012; the last patch of the second is dropped.
    exact = torch.tensor([[0, 0, 1, 1], [0, 0, 0, -1]])
    own = torch.tensor([[0, 0, 1, 2], [1, 1, -1, 0]])
    found = bf16.compare(
        bf16.Answers(logits.flip(1), (own, exact)), bf16.Answers(logits, (exact, exact))
    )
    assert found["agreement"] == 0 and found["logit_error"] == pytest.approx(2**0.5)
    # Of the pairs 01 23 | 01 02 12 two are left; of seven patches six are held.
    assert found["pairs_first"] == pytest.approx(40) and found["pairs"] == 100
    assert found["kept_first"] == pytest.approx(100 * 6 / 7) and found["kept"] == 100
    same = bf16.compare(bf16.Answers(logits, None), bf16.Answers(logits, None))
    assert same["pairs"] is None and same["logit_error"] == 0 and same["agreement"] == 100

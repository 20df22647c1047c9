"""Answers image by image in rows, and paired tests between two of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.cli.main import main
from zoo.results.answers import compared, mcnemar, packed, unpacked
from zoo.results.rows import read_rows


@given(st.lists(st.booleans(), max_size=70))
def test_answers_come_back_as_they_were(right):
    assert unpacked(packed(right)) == right


def test_a_cut_text_is_refused():
    count, _, rest = packed([True] * 20).partition(":")
    with pytest.raises(ValueError, match="expected 90 answers"):
        unpacked(f"90:{rest}")


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_sign_test_of_the_images_that_differ(ours, theirs):
    found = mcnemar(
        [True] * ours + [False] * theirs + [True], [False] * ours + [True] * (theirs + 1)
    )
    n = ours + theirs
    tail = sum(math.comb(n, k) for k in range(min(ours, theirs) + 1)) / 2**n
    assert found[:3] == (ours, theirs, n + 1)
    assert found.p == pytest.approx(min(1, 2 * tail), rel=1e-5)


def test_many_images_do_not_overflow():
    assert mcnemar([True] * 6000 + [False] * 4000, [False] * 6000 + [True] * 4000).p < 1e-80


@pytest.fixture
def row(tmp_path):
    def run(*words):
        file = tmp_path / "rows.jsonl"
        assert not main(["eval", "weights=vit_digits", "limit=60", f"results={file}", *words])
        return read_rows(file)[-1]

    return run


def test_rows_hold_answers_on_wish_and_compare(row):
    dense = row("task=[accuracy,knn]", "gallery=dense", "gallery_limit=200", "answers=true")
    pruned = ("reducer=topk", "schedule=keep_rate", "schedule.rate=0.3")
    few = row("task=accuracy", "answers=true", *pruned)
    right = unpacked(dense["answers"]["accuracy"])
    assert 100 * sum(right) / 60 == pytest.approx(dense["top1"])
    assert all(unpacked(dense["answers"]["knn_as_dense"]))
    assert sum(unpacked(dense["answers"]["knn"])) / 0.6 == pytest.approx(dense["knn"]["top1"])
    found = compared(dense, few)
    assert found.images == 60
    assert found.first - found.second == round(0.6 * (dense["top1"] - few["top1"]))
    assert compared(dense, few, "knn") is None
    assert compared(dense, {**few, "n_images": 59}) is None
    assert row("task=accuracy")["answers"] is None

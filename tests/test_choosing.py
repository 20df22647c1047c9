"""The table of questions in docs/methods/index.md: answers follow from rows alone."""

from __future__ import annotations

import pytest

import reduction
from zoo.cli import choosing
from zoo.report import evidence
from zoo.report.evidence import Digits


def _known(name: str) -> choosing.Known:
    from zoo.cli.catalogue import describe

    card, made = reduction.card(name), reduction.create(name)
    return choosing.Known(card, made, frozenset(describe(name)["arguments"]))


@pytest.mark.parametrize(
    ("words", "yes", "no"),
    [
        ("fused attention", ["tome", "topk", "repshift"], ["vidtldr", "mctf", "dynamicvit"]),
        (
            "without a class token",
            ["tome", "evit", "zero_tprune"],
            ["flowcut", "adavit", "idlevit"],
        ),
        ("exported with as few", ["tome", "cubistmerge"], ["dtome", "pixelprune", "avit"]),
        ("as many tokens as an image", ["dtome", "algm", "ats"], ["tome", "ltmp"]),
        ("stays in some token", ["tome", "toma", "cubistmerge"], ["topk", "vidtldr", "dct"]),
        ("before block 0", ["cts", "apt", "pixelprune", "rlt"], ["tome", "evs"]),
    ],
)
def test_who_meets_a_need(words: str, yes: list[str], no: list[str]) -> None:
    [question] = [q for q in choosing.QUESTIONS if words in q.words]
    assert [n for n in [*yes, *no] if question.fits(_known(n))] == yes


def test_the_best_come_first_and_the_unmeasured_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = {"tome": Digits(90.0, None), "topk": Digits(95.0, 97.0), "random": Digits(99.0, 1.0)}
    monkeypatch.setattr(evidence, "digits", lambda: measured)
    monkeypatch.setattr(evidence, "smaller_images", lambda: [(0.5, 98.06)])
    text = "\n".join(choosing.section())
    assert "| off the shelf, and every patch stays in some token | [`tome`](tome.md) 90.0 |" in text
    assert "| trained with the method | [`topk`](topk.md) 97.0 |" in text
    assert "random tokens 99.0" in text and "98.1 at 50 %" in text


def test_every_method_that_needs_no_training_has_a_number() -> None:
    measured = evidence.digits()
    left = [
        name
        for name in reduction.list_methods()
        if reduction.card(name).training.startswith("none")
        and measured.get(name, Digits(None, None)).untrained is None
    ]
    # For stacks of frames, which digits are not.
    assert left == ["evs", "rlt"]
    shares = [share for share, _ in evidence.smaller_images()]
    assert shares == sorted(shares, reverse=True) and len(shares) == 3

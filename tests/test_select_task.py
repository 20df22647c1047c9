"""`task=select`: what a selector leaves of images, against random tokens and smaller images."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reduction
import zoo
from zoo.cli.main import main
from zoo.measure.knn import knn_classes
from zoo.measure.selection import covered, look, pooled
from zoo.results.rows import read_rows

SMALL = "weights=vit_digits task=select limit=40 gallery_limit=100 select.seeds=2"
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        code = main(["eval", *shlex.split(line)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def the_row(tmp_path: Path) -> dict[str, Any]:
    (row,) = read_rows(tmp_path / "results")
    return row


def test_a_row_says_what_is_left_with_both_controls(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(f"{SMALL} selector=scope selector.alpha=0.5 select.keep=[16,0.5]")
    assert code == 0 and "scope 16: k-NN" in out and "random" in out and "smaller image" in out
    row = the_row(tmp_path)
    found = row["select"]
    assert row["task"] == ["select"] and row["status"] == "ok"
    assert found["selector"]["name"] == "scope" and found["selector"]["alpha"] == 0.5
    assert (found["n_tokens"], found["n_images"], found["n_gallery"]) == (64, 40, 100)
    assert [entry["keep"] for entry in found["by_keep"]] == [32, 16]
    for entry in found["by_keep"]:
        ours, lots, small = entry["selector"], entry["random"], entry["resolution"]
        for part in (ours, lots):
            for key in ("knn_top1", "recall1", "map", "agreement"):
                assert 0 <= part[key] <= 100
            assert 0 < part["coverage_mean"] < part["coverage_worst"] < 2
        assert lots["knn_top1_spread"] >= 0
        assert small["n_tokens"] in (36, 16) and small["gmacs"] < row["gmacs_dense"]
    # Coverage is what SCOPE is made for.
    assert all(
        e["selector"]["coverage_mean"] < e["random"]["coverage_mean"] for e in found["by_keep"]
    )


def test_the_numbers_are_those_of_the_tokens_by_hand(run: Run, tmp_path: Path) -> None:
    from zoo.data import ImageData

    line = "weights=vit_digits task=select selector=fastervlm select.keep=9 select.seeds=1"
    assert run(f"{line} gallery=dense data.name=digits")[0] == 0
    found = the_row(tmp_path)["select"]
    model = zoo.load("vit_digits").eval()
    data = ImageData("digits", test_split="test").attach(model)
    data.setup("test")
    eyes = zoo.selector(model, "fastervlm", keep=9)
    whole = zoo.selector(model, "random", keep=64)

    def gathered(part: str, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        xs, ys = [], []
        with torch.no_grad():
            for images, labels, *_ in data.chosen_dataloader(part):
                xs.append(module(images).mean(1))
                ys.append(labels)
        return torch.cat(xs), torch.cat(ys)

    gallery, classes = gathered("gallery", whole)
    queries, labels = gathered("test", eyes)
    dense, _ = gathered("test", whole)
    ours = knn_classes(queries, gallery, classes, 20, 0.07)
    theirs = knn_classes(dense, gallery, classes, 20, 0.07)
    (entry,) = found["by_keep"]
    assert entry["selector"]["knn_top1"] == pytest.approx(
        100 * float((ours == labels).float().mean())
    )
    assert entry["selector"]["agreement"] == pytest.approx(
        100 * float((ours == theirs).float().mean())
    )
    assert found["dense"]["knn_top1"] == pytest.approx(
        100 * float((theirs == labels).float().mean())
    )


def test_a_reducer_inside_is_compared_with_the_dense_tower(run: Run, tmp_path: Path) -> None:
    line = f"{SMALL} selector=visionzip reducer=tome schedule.r=4 select.keep=16"
    assert run(line)[0] == 0
    found = the_row(tmp_path)["select"]
    assert found["n_tokens"] == 64 - 5 * 4
    assert found["by_keep"][0]["selector"]["agreement"] <= 100


def test_images_looked_up_among_themselves_do_not_find_themselves(run: Run, tmp_path: Path) -> None:
    line = f"{SMALL} selector=scope select.keep=32 gallery_split=test knn.k=5"
    assert run(line.replace(" gallery_limit=100", ""))[0] == 0
    assert the_row(tmp_path)["select"]["dense"]["recall1"] < 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("weights=vit_digits task=select", "needs a selector; type selector=NAME"),
        (
            "weights=vit_digits selector=scope",
            "selector has no effect without the select or visualize task",
        ),
        ("weights=vit_digits select.seeds=3", "no effect without the select or visualize task"),
        (f"{SMALL} selector=scop", "did you mean scope"),
        (f"{SMALL} selector=scope selector.alpha=-1", "alpha must be 0 or more"),
        (f"{SMALL} selector=scope +selector.beta=1", "beta"),
        (f"{SMALL} selector=scope select.keep=[0.5,-1]", "select.keep"),
        (f"{SMALL} selector=scope select.keep=64", "nothing would be left out"),
        (f"{SMALL} selector=scope select.block=6", "block must be one of 6"),
        (f"{SMALL} selector=hired selector.crops=[2,2]", "leave selector.crops out"),
        (f"{SMALL} selector=hiprune reducer=tome schedule.r=4", "neighbours"),
        ("backbone=lookupvit_digits task=select selector=scope", "runs itself"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Run, line: str, message: str) -> None:
    code, _, err = run(line)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_coverage_is_the_distance_to_the_nearest_kept_patch() -> None:
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    chosen = reduction.select(x, 4, "divprune")
    mean, worst = covered(x, chosen)
    for i in range(2):
        cosine = torch.nn.functional.cosine_similarity(
            x[i, :, None], x[i, chosen.indices[i]][None], dim=-1
        )
        gap = 1 - cosine.max(1).values
        assert mean[i] == pytest.approx(float(gap.mean()), abs=1e-6)
        assert worst[i] == pytest.approx(float(gap.max()), abs=1e-6)
    assert torch.equal(covered(x, None)[0], torch.zeros(2))


def test_padding_is_not_pooled() -> None:
    from tests.selector_cases import signals

    given = signals(3)
    got = reduction.select(keep=20, method="prumerge", adaptive=True, **given)
    for i, count in enumerate(got.valid.tolist()):
        assert torch.allclose(pooled(got)[i], got.features[i, :count].mean(0), atol=1e-6)


def test_the_tower_runs_once_for_all_choices() -> None:
    model = zoo.load("vit_digits").eval()
    calls = []
    model.backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    module = zoo.selector(model, "scope", keep=8)
    choices = {str(k): (module.selector, k) for k in (8, 16)}
    batch = (torch.rand(4, 1, 16, 16), torch.arange(4))
    seen = look(module, choices, [batch, batch], torch.device("cpu"), limit=6)
    assert len(calls) == 2 and set(seen) == {"", "8", "16"}
    assert seen["8"].features.x.shape == (6, 96)
    assert (seen["8"].mean_error > seen["16"].mean_error).all()

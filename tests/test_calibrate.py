"""Thresholds from unlabelled images, and merging that they decide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from reduction.functional.components import components, edges
from tests.cases import backbone, images
from zoo.checkpoint.folder import save_pretrained
from zoo.errors import ZooError
from zoo.measure.calibrate import calibrate, pairs_per_block, removed

R8 = {"name": "constant_r", "r": 8}


def dtome(name: str = "plain", **args: object) -> zoo.ReducedViT:
    return zoo.wrap(backbone(name), {"name": "dtome", **args}, R8).eval()


def left(model: zoo.ReducedViT, x: torch.Tensor) -> torch.Tensor:
    """Reducible tokens behind every block, `(L, B)`."""
    info = model(x, return_info="trace")[1]
    full = [torch.full((len(x),), t.n) for t in info.trace]
    return torch.stack(
        [
            n if t.mask is None else t.mask[:, t.prefix :].sum(1)
            for n, t in zip(full, info.trace, strict=True)
        ]
    )


@torch.no_grad()
def test_one_batch_without_ties_is_reproduced_by_its_own_thresholds() -> None:
    model, x = dtome(), images(6)
    found = calibrate(model, [x])
    counts = left(model, x)
    # As many tokens of the whole batch as the schedule asks for, in every block.
    assert torch.equal(counts.sum(1), torch.tensor([64 - 8 * i for i in range(1, 5)]) * 6)
    assert len(set(counts[-1].tolist())) > 1
    assert all(0 <= v < 1 for v in found)
    assert not model.reducer.limit


@torch.no_grad()
def test_thresholds_fall_when_more_is_merged_and_padding_changes_nothing() -> None:
    x = images(4)
    few, many = (calibrate(dtome(), [x], [r] * 4) for r in (3, 12))
    assert few[0] > many[0]
    model = dtome()
    calibrate(model, [x])
    together, alone = model(x), torch.cat([model(i[None]) for i in x])
    assert torch.allclose(together, alone, atol=2e-5)
    info = model(x, return_info=True)[1]
    sums = (info.size * (1 if info.final.mask is None else info.final.mask)).sum(1)
    assert torch.allclose(sums, torch.full((4,), 65.0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "gap"])
def test_the_ends_of_the_scale(name: str) -> None:
    model, x = dtome(name), images(2)
    model.reducer.set_thresholds([1.0] * 4)
    dense = zoo.wrap(model.unwrap(), None).eval()
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    model.reducer.set_thresholds([-1.0, 1.0, 1.0, 1.0])
    # With a class token every second patch is a sender; without one, one of them has to stay.
    assert left(model, x)[0].tolist() == [33, 33] if name == "gap" else [32, 32]


@torch.no_grad()
def test_thresholds_are_saved_with_the_model(tmp_path: Path) -> None:
    model = zoo.create_model("test_vit", reducer="dtome", schedule=R8).eval()
    x = torch.randn(3, 3, 160, 160)
    calibrate(model, [x])
    save_pretrained(model, tmp_path / "m")
    again = zoo.load(str(tmp_path / "m")).eval()
    assert torch.equal(again.reducer.thresholds, model.reducer.thresholds)
    assert not again.reducer.limit
    assert torch.equal(again(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("metric", ["key", "feature"])
def test_tome_with_thresholds_merges_what_tome_merges(metric: str) -> None:
    model, x = zoo.wrap(backbone("plain"), {"name": "tome", "metric": metric}, R8).eval(), images(1)
    want = model(x)
    calibrate(model, [x])
    # Of one image the thresholds bring back the counts.
    assert model.reducer.name == "dtome" and model.reducer.metric == metric
    assert left(model, x)[:, 0].tolist() == [56, 48, 40, 32]
    assert torch.allclose(model(x), want, atol=2e-5)


@torch.no_grad()
def test_pitome_with_thresholds_merges_what_pitome_merges(tmp_path: Path) -> None:
    args = {"name": "pitome", "mode": "bsm", "margin": 0.6, "energy": "paper", "prop_attn": True}
    model, x = zoo.wrap(backbone("plain"), args, R8).eval(), images(3)
    want = model(x[:1])
    calibrate(model, [x[:1]])
    assert model.reducer.order == "energy"
    assert torch.allclose(model(x[:1]), want, atol=2e-5)
    calibrate(model, [x])
    together, alone = model(x), torch.cat([model(i[None]) for i in x])
    assert torch.allclose(together, alone, atol=2e-5)
    assert len(set(left(model, x)[-1].tolist())) > 1


def test_a_calibration_that_fails_leaves_the_model_as_it_was() -> None:
    model = zoo.wrap(backbone("plain"), "tome", R8)
    with pytest.raises(ZooError, match="at least one batch"):
        calibrate(model, [])
    assert model.reducer.name == "tome"
    with pytest.raises(ZooError, match="one number; type margin=0.75"):
        calibrate(zoo.wrap(backbone("plain"), {"name": "pitome", "margin": [0.1] * 4}, R8), [])


def test_what_cannot_be_calibrated_says_so() -> None:
    x = images(2)
    with pytest.raises(ZooError, match="no thresholds to calibrate"):
        calibrate(zoo.wrap(backbone("plain"), "topk", R8), [x])
    with pytest.raises(ZooError, match="one count for each of the 4 blocks"):
        calibrate(dtome(), [x], [3])
    with pytest.raises(ZooError, match="at least one batch"):
        calibrate(dtome(), [])
    with pytest.raises(ZooError, match="one number for each of the 4 blocks"):
        dtome().reducer.set_thresholds([0.5])
    assert removed(dtome()) == [8] * 4


def test_how_pairs_are_spread() -> None:
    assert pairs_per_block(50, 12) == [5, 5] + [4] * 10
    linear = pairs_per_block(96, 12, "linear")
    assert sum(linear) == 96 and linear == sorted(linear, reverse=True)
    assert pairs_per_block(96, 12, "reverse_linear") == linear[::-1]
    with pytest.raises(ZooError, match="kind must be"):
        pairs_per_block(9, 3, "cubic")


def slow_components(right: torch.Tensor, below: torch.Tensor) -> list[int]:
    """By flooding."""
    rows, columns = right.shape[0], below.shape[1]
    label = [-1] * (rows * columns)
    for start in range(rows * columns):
        todo = [start] if label[start] < 0 else []
        while todo:
            p = todo.pop()
            label[p] = start
            r, c = divmod(p, columns)
            near = [
                (p + 1, c + 1 < columns and bool(right[r, c])),
                (p - 1, c > 0 and bool(right[r, c - 1])),
                (p + columns, r + 1 < rows and bool(below[r, c])),
                (p - columns, r > 0 and bool(below[r - 1, c])),
            ]
            todo += [q for q, joined in near if joined and label[q] < 0]
    return label


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (7, 1), (6, 9), (16, 16)])
def test_components_are_those_of_flooding(grid: tuple[int, int], share: float) -> None:
    g = torch.Generator().manual_seed(3)
    right = torch.rand(3, grid[0], grid[1] - 1, generator=g) < share
    below = torch.rand(3, grid[0] - 1, grid[1], generator=g) < share
    found = components(right, below)
    for b in range(3):
        assert found[b].tolist() == slow_components(right[b], below[b])


def test_long_paths_are_one_component() -> None:
    for n in (8, 24):
        # A snake: along every row, down at alternating ends; and the same upside down.
        right = torch.ones(1, n, n - 1, dtype=torch.bool)
        below = torch.zeros(1, n - 1, n, dtype=torch.bool)
        below[:, ::2, -1] = True
        below[:, 1::2, 0] = True
        for r, b in ((right, below), (right.flip(1), below.flip(1))):
            assert (components(r, b) == 0).all()
        # A spiral from the outside in.
        walk, seen, r, c, turn = [(0, 0)], {(0, 0)}, 0, 0, 0
        while len(walk) < n * n:
            step = [(0, 1), (1, 0), (0, -1), (-1, 0)][turn % 4]
            q = (r + step[0], c + step[1])
            if q in seen or not (0 <= q[0] < n and 0 <= q[1] < n):
                turn += 1
                continue
            walk.append(q)
            seen.add(q)
            r, c = q
        right, below = torch.zeros_like(right), torch.zeros_like(below)
        for (r1, c1), (r2, c2) in zip(walk, walk[1:], strict=False):
            if r1 == r2:
                right[0, r1, min(c1, c2)] = True
            else:
                below[0, min(r1, r2), c1] = True
        assert (components(right, below) == 0).all()


def test_a_checkerboard_has_no_edges_and_a_ramp_collapses() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    board = torch.stack([a if (r + c) % 2 else b for r in range(4) for c in range(5)])[None]
    right, below = edges(board, (4, 5), 0.5)
    assert not right.any() and not below.any()
    angle = torch.linspace(0, 3, 20)
    ramp = torch.stack([angle.cos(), angle.sin()], 1)[None]
    assert (components(*edges(ramp, (1, 20), 0.9)) == 0).all()


def test_the_command_saves_a_calibrated_model(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    from zoo.cli.main import main

    words = ["calibrate", "vit_digits", "digits", "--reducer", "dtome", "--r", "3", "--limit", "32"]
    assert main([*words, "--out", str(tmp_path / "m")]) == 0
    said = capfd.readouterr()
    # Thresholds that are about to be found are not missed.
    assert "saved:" in said.out and "holds no parameters" not in said.err
    model = zoo.load(str(tmp_path / "m"))
    assert model.reducer.thresholds.max() < 1 and not model.reducer.limit
    few = [*words[:4], "ranked", *words[5:], "--limit", "8", "--out", str(tmp_path / "r")]
    assert main([*few, "--set", "settle=nearest", "--set", "reducer.temperature=null"]) == 0
    typed = "ranked with thresholds: reducer=ranked reducer.thresholds=true"
    assert typed in capfd.readouterr().out
    assert zoo.load(str(tmp_path / "r")).reducer.config()["settle"] == "nearest"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "bad.png").write_text("no picture")
    for wrong, says in [
        (["calibrate", "vit_digits", "digits", "--out", "x"], "no thresholds"),
        (few, "type reducer.settle=nearest"),
        ([*few, "--set", "settle"], "ARGUMENT=VALUE, e.g. settle=nearest, got 'settle'"),
        ([*words[:3], "--set", "settle=drop", "--out", "x"], "type --reducer NAME"),
        ([*words, "--out", "x", "--r-total", "9"], "either --r or --r-total"),
        ([*words[:1], "vit_digits", "nowhere", "--reducer", "dtome", "--out", "x"], "a folder of"),
        ([*words[:5], "--r", "many", "--out", "x"], "whole number"),
        ([*words[:5], "--r", "-3", "--out", "x"], "0 or more"),
        ([*words[:5], "--r", "3,4", "--out", "x"], "one count for each of the 6 blocks"),
        ([*words[:4], "evit", "--out", "x"], "that can have them: 'tome' or 'pitome'"),
        (
            ["calibrate", "vit_digits", str(tmp_path / "p"), *words[3:], "--out", "x"],
            "bad.png cann",
        ),
    ]:
        assert main(wrong) == 2
        assert says in capfd.readouterr().err


@torch.no_grad()
def test_a_model_whose_weights_were_cast_takes_images_as_they_are() -> None:
    found = calibrate(dtome().to(torch.bfloat16), [images(4)])
    assert len(found) == 4 and all(0 <= v < 1 for v in found)

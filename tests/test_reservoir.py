"""TCA's reservoir of class tokens around zero-shot evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.cli.main import main
from zoo.measure.reservoir import Options, Reservoir
from zoo.results.rows import read_rows


def _vectors(*angles: float) -> torch.Tensor:
    a = torch.tensor(angles)
    return torch.stack([a.cos(), a.sin()], dim=-1)


def test_an_image_alone_adds_its_whole_weight_to_its_own_class() -> None:
    reservoir = Reservoir(3, Options(size=2, weight=3.0))
    logits = torch.tensor([1.0, 4.0, 0.0])
    out = reservoir.see(logits, _vectors(0.0)[0], _vectors(0.3, 0.6))
    assert torch.allclose(out, torch.tensor([1.0, 7.0, 0.0]), atol=1e-6)
    assert len(reservoir) == 1 and reservoir.anchors() is None


def test_the_correction_is_the_published_sum() -> None:
    reservoir = Reservoir(2, Options(size=2, weight=2.0, sharpness=5.0, scale=0.5))
    first, second = _vectors(0.0, 0.0), _vectors(0.5, 1.0)
    reservoir.see(torch.tensor([9.0, 0.0]), _vectors(0.0)[0], first)
    out = reservoir.see(torch.tensor([0.0, 1.0]), _vectors(1.0)[0], second)
    blocks = torch.tensor([0.0, 2.0]).softmax(0)
    near = float((blocks * torch.tensor([0.5, 1.0]).cos()).sum())
    want = torch.tensor([2 * torch.exp(torch.tensor(-5 * (1 - near))).item(), 1 + 2.0])
    assert torch.allclose(out, want, atol=1e-5)


def test_the_unsure_and_the_repeated_go_first() -> None:
    reservoir = Reservoir(2, Options(size=2))
    sure, unsure = torch.tensor([9.0, 0.0]), torch.tensor([0.2, 0.0])
    for logits, angle in ((unsure, 0.0), (sure, 1.0), (sure, 2.5)):
        reservoir.see(logits, _vectors(angle)[0], _vectors(angle, angle))
    kept = reservoir._kept[0]
    assert [round(float(torch.atan2(*i.feature.flip(0))), 2) for i in kept] == [1.0, 2.5]
    assert [i.unsure for i in kept] == sorted(i.unsure for i in kept)
    # As sure as the others, but like one of them: one of the two goes.
    reservoir.see(sure, _vectors(2.6)[0], _vectors(2.6, 2.6))
    angles = [round(float(torch.atan2(*i.feature.flip(0))), 2) for i in reservoir._kept[0]]
    assert 1.0 in angles and len(angles) == 2


def test_anchors_are_class_means_once_every_class_has_two() -> None:
    reservoir = Reservoir(2, Options(size=3))
    for k in (0, 1):
        logits = torch.eye(2)[k] * 9
        for angle in (0.1, 0.5):
            assert reservoir.anchors() is None
            reservoir.see(logits, _vectors(angle + k)[0], _vectors(angle, angle + k))
    anchors = reservoir.anchors()
    assert anchors is not None and anchors.shape == (2, 2, 2)
    assert torch.allclose(anchors[1, 1], _vectors(1.1, 1.5).mean(0))


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        code = main(["eval", *line.split()])
        return code, *capsys.readouterr()

    model = zoo.load("vit_digits").eval()
    # In place of a text tower: the classifier's own rows.
    save_file(
        {"text": model.backbone.head.weight.detach() @ model.backbone.head.weight.detach().T},
        tmp_path / "text.safetensors",
        metadata={"class_names": json.dumps([str(i) for i in range(10)])},
    )
    base = (
        "task=zeroshot zeroshot.embeddings=text.safetensors limit=30 features.cache=false "
        "zeroshot.reservoir.size=2 "
    )
    code, _, err = run(f"{base} weights=vit_digits zeroshot.reservoir.weight=0")
    assert code == 0, err
    code, out, _ = run(f"{base} weights=vit_digits reducer=tca reducer.anchors=10")
    assert code == 0 and "with a reservoir of 2" in out
    plain, row = read_rows(tmp_path / "results")
    found = row["zeroshot"]["reservoir"]
    assert 10 <= found["remembered"] <= 20 and found["anchors"] in (True, False)
    # Without a weight the stream answers as the images one by one do.
    assert plain["zeroshot"]["reservoir"]["top1"] == pytest.approx(plain["zeroshot"]["top1"])
    code, _, err = run(f"{base} weights=vit_digits reducer=tca reducer.anchors=3")
    assert code == 2 and "type reducer.anchors=10 or reducer.anchors=0" in err
    code, _, err = run(f"{base} backbone=lookupvit_digits")
    assert code == 2 and "this model has none; type zeroshot.reservoir.size=0" in err

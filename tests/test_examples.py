"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    """One of the scripts, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_segmentation_prints_every_way_of_restoring(capsys: pytest.CaptureFixture[str]) -> None:
    example("segmentation").main("--steps 1 --images 8 --head-steps 2".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["restore", "mIoU", "tokens", "GMACs"]
    assert [x.split()[0] for x in lines[1:]] == ["dense", "merged", "nearest", "zero", "knn"]
    assert lines[1].split()[2] == "145" and {x.split()[2] for x in lines[2:]} == {"37"}


def test_restored_features_segment_better_than_none() -> None:
    results = example("segmentation").compare(steps=0, images=48, head_steps=30)
    miou = {r.name: r.miou for r in results}
    assert miou["merged"] > miou["zero"] + 2 and miou["dense"] > miou["zero"] + 2


def test_every_pixel_of_the_shapes_has_its_class() -> None:
    module = example("segmentation")
    images, labels = module.shapes(64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, 48, 48) and labels.shape == (64, 48, 48)
    share = torch.bincount(labels.flatten(), minlength=4) / labels.numel()
    assert share.min() > 0.02 and share[0] > share[1:].max()
    assert module.mean_iou(labels, labels) == 100
    assert module.mean_iou(torch.zeros_like(labels), labels) == pytest.approx(
        25 * float(share[0]), rel=1e-5
    )


def test_features_of_a_photograph_are_painted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    Image.effect_noise((90, 70), 80).save(tmp_path / "photo.png")
    line = f"--backbone test_vit --size 64 --keep 0.5 1 --weights {tmp_path / 'w.safetensors'}"
    out = tmp_path / "new" / "pca.png"
    words = [*line.split(), "--image", str(tmp_path / "photo.png"), "--out", str(out)]
    example("features_of_a_photograph").main(words)
    printed = capsys.readouterr().out
    assert "tokens 17->8" in printed or "tokens 17->9" in printed
    assert "tokens 17->17" in printed and "cosine to dense 1.0000" in printed
    sheet = Image.open(out)
    assert sheet.size == (4 * (64 + 8) - 8, 64 + 18)
    dense, same = (sheet.crop((x * 72, 18, x * 72 + 64, 82)).tobytes() for x in (1, 3))
    assert dense == same


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    line = f"--backbone test_vit --size 64 --weights {tmp_path / 'w.safetensors'}"
    with pytest.raises(SystemExit, match="^error: .*not those of test_vit"):
        example("features_of_a_photograph").main(line.split())

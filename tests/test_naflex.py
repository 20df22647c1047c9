"""NaFlexVit on padded batches of patches: every image gets what it gets alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models.naflexvit import batch_patchify
from torch import Tensor

import zoo
from tests.cases import Row
from tests.families import FAMILIES, family, first_rows, reduced
from zoo.checkpoint import save_pretrained
from zoo.data.checks import data_config
from zoo.errors import ZooError

ALL = [name for name in FAMILIES if name.startswith("naflex")]
SIZES = [(24, 24), (16, 32), (12, 20), (16, 32)]


def batch(sizes: list[tuple[int, int]] = SIZES) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Images of several sizes, and the padded batch of their patches, with rubbish for padding."""
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(1, 3, *size, generator=generator) for size in sizes]
    cut = [batch_patchify(x, (4, 4))[0][0] for x in images]
    longest = max(map(len, cut)) + 2
    given = {
        "patches": torch.randn(len(cut), longest, cut[0].shape[1], generator=generator) * 9,
        "patch_coord": torch.zeros(len(cut), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(cut), longest, dtype=torch.bool),
    }
    for i, (own, (_, width)) in enumerate(zip(cut, sizes, strict=True)):
        n, index = len(own), torch.arange(len(own))
        given["patches"][i, :n] = own
        given["patch_coord"][i, :n] = torch.stack([index // (width // 4), index % (width // 4)], 1)
        given["patch_valid"][i, :n] = True
    return images, given


@pytest.mark.parametrize("name", ALL)
def test_nothing_reduced_is_the_backbone_itself(name: str) -> None:
    backbone = family(name)
    images, given = batch()
    with torch.no_grad():
        expected = backbone(given)
        nothing = {"name": "constant_r", "r": 0}
        for model in (zoo.wrap(backbone, None), zoo.wrap(backbone, "tome", nothing)):
            assert torch.equal(model.eval()(given), expected)
        # Size by size, as with a reduction, it is the same to rounding.
        model = zoo.wrap(backbone, None).eval().set_runtime(own_kernels=True)
        assert torch.allclose(model(given), expected, atol=1e-4)
        alone = torch.cat([backbone(x) for x in images])
        assert torch.allclose(model(given), alone, atol=1e-4)


@pytest.mark.parametrize("row", first_rows(), ids=lambda row: row.id)
def test_every_image_gets_what_it_gets_alone(row: Row) -> None:
    model = reduced(row, family("naflex"))
    if row.name == "random":
        pytest.skip("draws by the place in the batch")
    if row.frames > 1:
        with pytest.raises(ZooError, match=f"expected {row.frames} frames on top of each other"):
            model(batch()[1])
    # Of frames on top of each other, grids with as many rows for each.
    images, given = batch([size for size in SIZES if size[0] // 4 % row.frames == 0])
    assert len({x.shape for x in images}) > 1
    with torch.no_grad():
        alone = torch.cat([model(x) for x in images])
        assert torch.allclose(model(given), alone, atol=1e-4)
        rubbish = {**given, "patches": given["patches"].clone()}
        rubbish["patches"][~given["patch_valid"]] = torch.nan
        assert torch.allclose(model(rubbish), alone, atol=1e-4)


def test_features_of_a_batch_of_sizes() -> None:
    backbone = family("naflex")
    images, given = batch()
    dense = zoo.wrap(backbone, None).eval()
    model = zoo.wrap(backbone, "tome", {"name": "constant_r", "r": 4}).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(
            given, 2, output_fmt="NLC", intermediates_only=True, output_dict=True
        )
        assert len(maps["image_intermediates"]) == 2
        for i, x in enumerate(images):
            own = model.forward_intermediates(x, 2, output_fmt="NLC", intermediates_only=True)
            for found, wanted in zip(maps["image_intermediates"], own, strict=True):
                n = wanted.shape[1]
                assert torch.allclose(found[i, :n], wanted[0], atol=1e-4)
                assert not found[i, n:].any()
        if hasattr(backbone.embeds, "channels_last"):  # timm 1.0.20 has no such features
            found = dense.forward_intermediates(given, output_fmt="NLC", intermediates_only=True)
            wanted = backbone.forward_intermediates(
                given, output_fmt="NLC", intermediates_only=True
            )
            real = given["patch_valid"][:, : found[0].shape[1]]
            for a, b in zip(found, wanted, strict=True):
                assert torch.allclose(a[real], b[:, : a.shape[1]][real], atol=1e-4)
        with pytest.raises(ZooError, match="these images have 3 sizes.*one size at a time"):
            model(given, return_info=True)
        _, one = batch([(16, 32), (16, 32)])
        assert model(one, return_info=True)[1].grid == (4, 8)


def test_grey_images_are_taken_from_pictures(tmp_path: Path) -> None:
    backbone = timm.create_model(
        "naflexvit_base_patch16_gap", depth=2, embed_dim=48, num_heads=3, num_classes=7, in_chans=1
    )
    model = zoo.wrap(backbone, "tome", {"name": "constant_r", "r": 2})
    config = data_config(model)
    assert config["input_size"] == model.tower.input_size(backbone) == (1, 384, 384)
    assert len(config["mean"]) == 1
    seen = zoo.visualize(model, Image.new("RGB", (40, 40)))
    assert seen.images[0][1][0].picture.size == (384, 384)
    made = zoo.create_model(
        "naflexvit_base_patch16_gap", depth=2, embed_dim=48, num_heads=3, in_chans=1
    )
    save_pretrained(made, tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["data"]["input_size"] == [1, 384, 384]


@pytest.mark.parametrize(
    "sizes", [[(16, 32)] * 2, SIZES, SIZES[:0]], ids=["one", "several", "none"]
)
@pytest.mark.parametrize("name", ["naflex", "naflex_gap", "naflex_map"])
def test_the_head_knows_the_tokens_of_every_image(
    name: str, sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    given = {k: v[: len(sizes)] for k, v in batch(sizes or SIZES)[1].items()}
    for reducer in (None, "tome", "avit", "patchmerger"):
        options = {"name": "constant_r", "r": 4} if reducer == "tome" else None
        model = zoo.wrap(family(name), reducer, options).eval()
        with torch.no_grad():
            features, expected = model.forward_features(given), model(given)
            assert torch.allclose(model.forward_head(features), expected, atol=1e-4)
            final, _ = model.forward_intermediates(given, 1, output_fmt="NLC")
            assert torch.allclose(model.forward_head(final), expected, atol=1e-4)
            torch.save(features, tmp_path / "features.pt")
            again = model.forward_head(torch.load(tmp_path / "features.pt"))
            assert torch.allclose(again, expected, atol=1e-4)
            if reducer == "tome":
                inside = zoo.attach(model.unwrap(), reducer, options).eval()
                assert torch.equal(inside(given), expected)
                answer = inside.forward_head(inside.forward_features(given))
                assert torch.allclose(answer, expected, atol=1e-4)


def without(given: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**given, **changes}.items() if v is not None}


def test_batches_that_cannot_be_run_are_refused() -> None:
    model = zoo.wrap(family("naflex"), "tome", {"name": "constant_r", "r": 4}).eval()
    images, given = batch()
    shuffled = given["patch_coord"].flip(1)
    wrong = [
        (without(given, patch_coord=None), "expected a mapping with the tensors"),
        (without(given, patch_coord=shuffled), "whole raster, row by row"),
        (without(given, patch_valid=given["patch_valid"].flip(1)), "whole raster, row by row"),
        (without(given, attn_mask=torch.ones(4, 1, 1, 40)), "attn_mask is not possible"),
        (without(given, patches=given["patches"][:, :, :9]), r"expected patches \(B, N, 48\)"),
        (images, r"expected images, a tensor of shape \(B, C, H, W\), got list"),
        (images[0][0], r"or a mapping with patches"),
        (images[0][..., :23], "not divisible by the patch size 4x4"),
    ]
    for bad, message in wrong:
        with pytest.raises(ZooError, match=message):
            model(bad)
    plain = zoo.wrap(family("beit"), None)
    with pytest.raises(ZooError, match="expected images, a tensor .*, got dict"):
        plain(given)

"""Position embeddings go from the grid that they have to the grid that a model has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from tests.test_checkpoint_refusals import lightning, weights_refusal
from zoo.checkpoint import load_weights, save_pretrained
from zoo.errors import ZooError
from zoo.model.reduced import ReducedViT

Grid = tuple[int, int]

# A name of timm or of this package, its patch size, and what makes it small.
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", 16, {"embed_dim": 12, "num_heads": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", 16, {"embed_dim": 12, "num_heads": 2}),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        14,
        {"embed_dim": 12, "num_heads": 2},
    ),
    "no class token": ("vit_base_patch16_siglip_224", 16, {"embed_dim": 12, "num_heads": 2}),
    "eva02": ("eva02_tiny_patch14_224", 14, {"embed_dim": 12, "num_heads": 1}),
    "rotary alone": ("vit_small_patch16_dinov3", 16, {"embed_dim": 12, "num_heads": 1}),
    "jumbo": ("jumbo_digits", 2, {"embed_dim": 16, "num_heads": 2}),
    "lookupvit": ("lookupvit_digits", 2, {"embed_dim": 16, "num_heads": 2}),
    "vit_digits": ("vit_digits", 2, {"embed_dim": 16, "num_heads": 2}),
}
CHANGES: list[tuple[Grid, Grid]] = [
    ((8, 2), (4, 4)),
    ((4, 4), (2, 8)),
    ((4, 8), (8, 4)),
    ((2, 4), (6, 12)),
    ((2, 6), (2, 6)),
]


def build(family: str, grid: Grid, seed: int = 0, **options: Any) -> ReducedViT:
    """A small model whose first two position features are the row and the column of the patch."""
    name, patch, small = FAMILIES[family]
    torch.manual_seed(seed)
    if family == "lookupvit":
        options["compressed_grid"] = 2
    model = zoo.create_model(
        name,
        img_size=(grid[0] * patch, grid[1] * patch),
        depth=1,
        num_classes=3,
        **{**small, **options},
    )
    table = model.backbone.pos_embed
    if table is not None:
        rows, columns = torch.meshgrid(*(torch.linspace(0, 1, n) for n in grid), indexing="ij")
        with torch.no_grad():
            if table.dim() == 4:
                table[0, 0], table[0, 1] = rows, columns
            else:
                table[0, -rows.numel() :, 0] = rows.flatten()
                table[0, -rows.numel() :, 1] = columns.flatten()
    return model


def map_of(model: ReducedViT, grid: Grid) -> Tensor:
    """The positions of the patches as a map `(1, C, rows, columns)`."""
    table = model.backbone.pos_embed.detach()
    if table.dim() == 4:
        return table
    return table[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def check(model: ReducedViT, source: ReducedViT, old: Grid, new: Grid) -> None:
    assert model.grid == new
    if source.backbone.pos_embed is None:
        return
    expected = map_of(source, old)
    if old != new:
        expected = F.interpolate(expected, new, mode="bicubic", antialias=True)
    assert (map_of(model, new) - expected).abs().max() < 1e-5
    prefix = source.backbone.pos_embed.shape[1] - old[0] * old[1]
    if source.backbone.pos_embed.dim() == 3 and prefix:
        rows = source.backbone.pos_embed[:, :prefix]
        assert torch.equal(model.backbone.pos_embed[:, :prefix], rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("old", "new"), CHANGES, ids=str)
def test_grids_are_kept(tmp_path: Path, family: str, old: Grid, new: Grid) -> None:
    source, patch = build(family, old), FAMILIES[family][1]
    folder = save_pretrained(source, tmp_path / "model")
    size = (new[0] * patch, new[1] * patch)
    check(zoo.load(folder, img_size=size), source, old, new)
    check(load_weights(build(family, new, 1), folder), source, old, new)
    run = lightning(source, tmp_path / "last.ckpt")
    check(zoo.load(run, img_size=size), source, old, new)
    check(load_weights(build(family, new, 1), run), source, old, new)
    # A file that does not say it, where a person does.
    torch.save(source.backbone.state_dict(), tmp_path / "file.pth")
    said = (old[0] * patch, old[1] * patch)
    model = load_weights(build(family, new, 1), tmp_path / "file.pth", img_size=said)
    check(model, source, old, new)
    # timm's own loading, from a file whose image size is described.
    described = {"file": str(tmp_path / "file.pth"), "num_classes": 3, "custom_load": False}
    channels = source.backbone.patch_embed.proj.in_channels
    described["input_size"] = (channels, *said)
    torch.manual_seed(1)
    model = zoo.create_model(
        FAMILIES[family][0],
        pretrained=True,
        pretrained_cfg_overlay=described,
        img_size=size,
        depth=1,
        num_classes=3,
        **FAMILIES[family][2],
        **({"compressed_grid": 2} if family == "lookupvit" else {}),
    )
    check(model, source, old, new)


@pytest.mark.parametrize(("old", "new"), [((8, 2), (4, 4)), ((4, 4), (2, 8)), ((2, 6), (4, 12))])
def test_a_lookupvit_starts_from_a_plain_vit_of_another_grid(
    tmp_path: Path, old: Grid, new: Grid
) -> None:
    source = build("vit_digits", old)
    folder = save_pretrained(source, tmp_path / "model")
    target = build("lookupvit", new, 1)
    load_weights(target, folder)
    expected = F.interpolate(map_of(source, old), new, mode="bicubic", antialias=True)
    assert (target.backbone.pos_embed - expected).abs().max() < 1e-5
    from zoo.models.lookupvit import warm_start

    again = warm_start(build("lookupvit", new, 1), source)
    assert (again.backbone.pos_embed - expected).abs().max() < 1e-5


def test_a_loaded_model_of_another_size_is_saved_as_it_is(tmp_path: Path) -> None:
    source = build("plain", (8, 2))
    model = zoo.load(save_pretrained(source, tmp_path / "a"), img_size=(64, 64))
    again = zoo.load(save_pretrained(model, tmp_path / "b"))
    assert again.grid == (4, 4)
    assert torch.equal(again.backbone.pos_embed, model.backbone.pos_embed)


def test_what_a_file_cannot_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.pth"
    torch.save(build("plain", (2, 6)).backbone.state_dict(), path)
    # As many positions as the model has are the model's.
    model = load_weights(build("plain", (2, 6), 1), path)
    check(model, build("plain", (2, 6)), (2, 6), (2, 6))
    assert not caplog.records
    text = weights_refusal(build("plain", (4, 4)), path)
    assert "its 12 positions are no square" in text and "img_size=(H, W)" in text
    # Sixteen could be a square of four: that is said.
    torch.save(build("plain", (2, 8)).backbone.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        load_weights(build("plain", (2, 8), 1), path)
    [record] = caplog.records
    assert "taken for a grid of 2x8" in record.message and "img_size=" in record.message
    with pytest.raises(ZooError, match=r"img_size is the side.* got \(3, 4, 5\)"):
        load_weights(build("plain", (4, 4)), path, img_size=(3, 4, 5))  # type: ignore[arg-type]
    # The grid of another architecture is not the thing to speak of.
    torch.save(build("plain", (2, 6), embed_dim=24).backbone.state_dict(), path)
    assert "not those of vit_tiny" in weights_refusal(build("plain", (4, 4)), path)

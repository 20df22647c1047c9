"""Merging duplicates with proportional attention must change nothing.

An image of two textures, without position embedding, has two kinds of tokens. A merged token of
size s then acts exactly like the s duplicates it stands for, in attention and in pooling. Nearly
every bookkeeping error breaks this.
"""

from __future__ import annotations

import pytest
import torch

import reduction
import zoo
from tests.cases import METHODS, backbone

MERGING = [
    r
    for r in METHODS
    if (made := reduction.create(r.name, **dict(r.args))).prop_attn
    and not (r.prunes or r.ranked or r.soft or isinstance(made, reduction.Adaptive))
]


def two_textures(batch: int = 3, grid: int = 8, patch: int = 4) -> torch.Tensor:
    """Images whose patches are one of two random textures each."""
    g = torch.Generator().manual_seed(0)
    textures = torch.randn(batch, 2, 3, patch, patch, generator=g, dtype=torch.float64)
    choice = torch.randint(0, 2, (batch, grid, grid), generator=g)
    tiles = textures[torch.arange(batch)[:, None, None], choice]  # (B, rows, columns, 3, p, p)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, grid * patch, grid * patch)


def without_positions(name: str) -> torch.nn.Module:
    m = backbone(name).double()
    with torch.no_grad():
        m.pos_embed[:, -64:] = m.pos_embed[:, -1:]
    return m


@pytest.mark.parametrize("row", MERGING, ids=lambda r: r.id)
@pytest.mark.parametrize("name", ["plain", "distilled", "registers", "gap", "mae", "map", "avgmax"])
def test_merging_duplicates_changes_nothing(row: reduction.Reducer, name: str) -> None:
    m, x = without_positions(name), two_textures()
    schedule = {"name": "constant_r", "r": 12}
    reduced = zoo.wrap(m, row.reducer(m.cls_token is not None), schedule).eval().double()
    with torch.no_grad():
        logits, info = reduced(x, return_info=True)
        assert list(info.tokens) == reduced.token_counts()
        # A method may leave the last block alone.
        assert info.tokens[-1][1] <= 64 - 3 * 12 + reduced.prefix
        assert info.size.max() > 2
        # Sizes are float32 whatever the features are, and a method may weigh with them.
        assert (logits - m(x)).abs().max() < 1e-6


def test_the_test_can_fail() -> None:
    """Without proportional attention the same merges do change the output."""
    m, x = without_positions("plain"), two_textures()
    schedule = {"name": "constant_r", "r": 12}
    reduced = zoo.wrap(m, {"name": "tome", "prop_attn": False}, schedule).eval()
    with torch.no_grad():
        assert (reduced(x) - m(x)).abs().max() > 1e-3

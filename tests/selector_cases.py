"""A row for every selector: arguments for the shared tests, and the signals that it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Easy and hard arguments of every selector.
SELECTOR_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "apet": ({}, {"basis": 3, "ridge": 0.1}),
    "dart": ({}, {"pivots": 3}),
    "divprune": ({}, {"start": "attention", "objective": "sum"}),
    "dpp": ({}, {"quality_from": "attention"}),
    "fastervlm": ({}, {}),
    "hiprune": ({}, {"alpha": 1.0, "object_layer": 3}),
    "hired": ({}, {"alpha": 0.2}),
    "holov": ({}, {"segments": 5}),
    "prumerge": ({}, {"weights": "normalised", "extras": True, "neighbours": 5}),
    "prumerge_plus": ({}, {"weights": "normalised", "extras": True, "neighbours": 5}),
    "prunesid": ({}, {"class_token": True}),
    "random": ({}, {"seed": 7}),
    "scope": ({}, {"alpha": 0.5, "combine": "add"}),
    "visionzip": ({}, {"targets": 1, "contextual": "mean", "class_token": True}),
    "vispruner": ({}, {"diverse": "maxmin", "important": 0.25}),
    "vscan": ({}, {"window": 2, "local": 0.75}),
}
#: Rows that hold no patch, with the hard arguments.
EXTRAS = {"prumerge": 1, "prumerge_plus": 1, "prunesid": 1, "visionzip": 1}


def signals(
    images: int = 2,
    grid: tuple[int, int] = (6, 6),
    prefix: int = 1,
    width: int = 12,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Features and every signal of a made-up tower."""
    g = torch.Generator().manual_seed(seed)
    n, heads = grid[0] * grid[1], 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "features": draw(images, n, width),
        "cls_row": (2 * draw(images, heads, prefix + n)).softmax(-1),
        "cls_row_shallow": (2 * draw(images, heads, prefix + n)).softmax(-1),
        "column": draw(images, prefix + n).softmax(-1),
        "column_shallow": draw(images, prefix + n).softmax(-1),
        "q": draw(images, heads, prefix + n, 4),
        "k": draw(images, heads, prefix + n, 4),
        "class_token": draw(images, width),
    }

"""Segmentation with fewer tokens: a linear head on features that are restored for every patch.

    python examples/segmentation.py [--reducer tome] [--keep 0.25] [--steps 1200]

Images of coloured shapes are generated with a class for every pixel. A small vision transformer
learns to segment them, dense, with a linear head. Then its tokens are reduced, and for every way of
restoring removed patches (`restore=`) a new linear head is fitted to the frozen features. `zero`,
which gives removed patches nothing, is the control that the others have to beat. A few minutes on
two cores; without any data or download.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zoo

CLASSES = ("background", "disk", "square", "triangle")
POLICIES = ("merged", "nearest", "zero", "knn")
SIZE, PATCH, WIDTH, DEPTH = 48, 4, 64, 4


class Result(NamedTuple):
    """What one way of restoring is worth.

    Attributes:
        name: "dense", or a policy.
        miou: Mean intersection over union of all classes, in percent.
        tokens: Tokens behind the last block.
        gmacs: Of the model, for one image.
    """

    name: str
    miou: float
    tokens: int
    gmacs: float


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of two to four shapes that may cover each other, on a ground of noise.

    Returns:
        Images `(count, 3, SIZE, SIZE)`, and the class of every pixel `(count, SIZE, SIZE)`.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    coarse = draw(3, SIZE // 8, SIZE // 8)
    images = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear") * 0.6
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for place in range(4):
        kind = 1 + (draw(1, 1) * 3).long()
        there = draw(1, 1) < (1.0 if place < 2 else 0.5)
        cx, cy = (draw(1, 1) * SIZE for _ in "xy")
        radius = SIZE * (0.12 + 0.14 * draw(1, 1))
        dx, dy = x - cx, y - cy
        disk = dx.square() + dy.square() <= radius.square()
        square = torch.maximum(dx.abs(), dy.abs()) <= 0.85 * radius
        triangle = (dy <= radius) & (2 * dx.abs() <= dy + radius)
        inside = torch.where(kind == 1, disk, torch.where(kind == 2, square, triangle)) & there
        colour = 0.3 + 0.7 * draw(3, 1, 1)
        images = torch.where(inside.unsqueeze(1), colour, images)
        labels = torch.where(inside, kind, labels)
    noise = torch.randn(images.shape, generator=generator)
    return (images + 0.08 * noise - 0.4) / 0.3, labels


class Head(nn.Module):
    """A linear layer from a patch's features to the classes of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv2d(WIDTH, len(CLASSES) * PATCH * PATCH, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits `(B, classes, SIZE, SIZE)` of maps `(B, WIDTH, rows, columns)`."""
        return F.pixel_shuffle(self.linear(maps), PATCH)


def features(model: nn.Module, images: Tensor, **options: str) -> Tensor:
    """Features of the last block with a place for every patch, `(B, WIDTH, rows, columns)`."""
    [maps] = model.forward_intermediates(images, 1, norm=True, intermediates_only=True, **options)
    return maps


def pretrain(model: nn.Module, steps: int, batch: int, generator: torch.Generator) -> None:
    """Let a dense model learn to segment, every step on new images."""
    head = Head()
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 2))
    for step in range(steps):
        images, labels = shapes(batch, generator)
        loss = F.cross_entropy(head(features(model, images)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def fitted(maps: Tensor, labels: Tensor, steps: int, generator: torch.Generator) -> Head:
    """A linear head on frozen features."""
    torch.manual_seed(0)
    head = Head()
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        some = torch.randint(len(maps), (64,), generator=generator)
        loss = F.cross_entropy(head(maps[some]), labels[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
    return head


def mean_iou(found: Tensor, labels: Tensor) -> float:
    """Intersection over union of every class that is there, averaged, in percent."""
    pairs = labels.flatten() * len(CLASSES) + found.flatten()
    counts = torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1).double()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    return 100 * float((counts.diag() / union)[union > 0].mean())


def compare(
    reducer: str = "tome",
    keep: float = 0.25,
    steps: int = 1200,
    images: int = 1024,
    head_steps: int = 400,
    seed: int = 0,
) -> list[Result]:
    """Train, reduce, and judge every way of restoring.

    Args:
        reducer: Any method of `zoo.list_methods()` that needs no training.
        keep: Share of the patches that is left behind the last block.
        steps: Of training the dense model.
        images: On which heads are fitted; a quarter as many are tested on.
        head_steps: Of fitting a head.
        seed: Of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vit = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=0
    )
    pretrain(vit, steps, 32, generator)
    vit.eval()
    train, test = shapes(images, generator), shapes(max(images // 4, 1), generator)
    schedule = {"name": "geometric", "rate": keep ** (1 / DEPTH)}
    results = []
    for policy in ("dense", *POLICIES):
        model = zoo.wrap(vit, *((None,) if policy == "dense" else (reducer, schedule))).eval()
        options = {} if policy == "dense" else {"restore": policy}
        with torch.no_grad():
            maps = [
                torch.cat([features(model, part, **options) for part in some.split(64)])
                for some, _ in (train, test)
            ]
        head = fitted(maps[0], train[1], head_steps, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found = head(maps[1]).argmax(1)
        cost = zoo.profile(model)
        results.append(Result(policy, mean_iou(found, test[1]), cost.tokens[-1][1], cost.gmacs))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for the dense model and one for every way of restoring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reducer", default="tome", help="a method that needs no training")
    parser.add_argument("--keep", type=float, default=0.25, help="share of patches that is left")
    parser.add_argument("--steps", type=int, default=1200, help="of training the dense model")
    parser.add_argument("--images", type=int, default=1024, help="on which heads are fitted")
    parser.add_argument("--head-steps", type=int, default=400, help="of fitting a head")
    parser.add_argument("--seed", type=int, default=0)
    results = compare(**vars(parser.parse_args(arguments)))
    print(f"{'restore':<8} {'mIoU':>6} {'tokens':>7} {'GMACs':>7}")
    for row in results:
        print(f"{row.name:<8} {row.miou:6.2f} {row.tokens:7d} {row.gmacs:7.4f}")


if __name__ == "__main__":
    main()

"""How well selectors cover an image, and how far rounding decides what they choose.

`python benchmarks/selectors.py WEIGHTS` with Meta's DINOv2 ViT-S/14 as safetensors or timm's own
file; two photographs of scikit-learn, three square crops of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

import reduction
import zoo
from reduction.selection.registry import pick
from zoo.checkpoint.files import read_tensors

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crops(size: int) -> Tensor:
    """Six crops `(6, 3, size, size)`."""
    found = []
    for photograph in load_sample_images().images:
        image = torch.tensor(photograph).permute(2, 0, 1).float() / 255
        image = (image - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        side = image.shape[1]
        for left in (0, 107, 213):
            part = image[None, :, :, left : left + side]
            found.append(F.interpolate(part, size=size, mode="bicubic")[0])
    return torch.stack(found)


def overlap(one: Tensor, other: Tensor, skip: int = 0) -> float:
    """Share of the tokens, from place `skip` of the order on, that are in both."""
    pairs = zip(one[:, skip:].tolist(), other[:, skip:].tolist(), strict=True)
    return sum(len(set(a) & set(b)) / len(a) for a, b in pairs) / len(one)


@torch.no_grad()
def measure(tower: Any, images: Tensor, name: str, keep: int, **options: Any) -> str:
    """One line about one selector."""
    module = zoo.selector(tower, name, keep, **options)
    given, _ = module.given(images)
    found = pick(module.selector, given, keep)
    noise = torch.randn(given.x.shape, generator=torch.Generator().manual_seed(1))
    close, rounded = (
        pick(module.selector, given._replace(x=x), keep).order
        for x in (given.x * (1 + 1e-6 * noise), given.x.bfloat16().float())
    )
    unit = F.normalize(given.x, dim=-1)
    index = found.indices.unsqueeze(2).expand(-1, -1, unit.shape[2])
    gap = 1 - (unit @ unit.gather(1, index).transpose(1, 2)).amax(2)
    skip = keep // 2 if name == "vispruner" else 0
    return (
        f"{name} {options or ''}: coverage error x 1000 mean {1e3 * gap.mean():.2f}, worst "
        f"{1e3 * gap.amax(1).mean():.1f}; kept under noise of 1e-6 "
        f"{overlap(found.order, close, skip):.2f}, bfloat16 "
        f"{overlap(found.order, rounded, skip):.2f}"
    )


def main() -> None:
    """Print a line for every selector."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="file with the weights of vit_small_patch14_dinov2")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--size", type=int, default=336)
    arguments = parser.parse_args()
    tower = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=arguments.size)
    state = {k: v.float() for k, v in read_tensors(Path(arguments.weights)).items()}
    tower.load_state_dict(checkpoint_filter_fn(state, tower))
    tower, images = tower.eval(), crops(arguments.size)
    for name in reduction.list_selectors():
        print(measure(tower, images, name, arguments.keep), flush=True)
    print(measure(tower, images, "vispruner", arguments.keep, diverse="maxmin"))


if __name__ == "__main__":
    main()

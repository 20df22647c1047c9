"""Features of a photograph as a picture: three principal components, dense beside reduced.

    python examples/features_of_a_photograph.py --weights FILE [--image PHOTO.jpg] [--out pca.png]

Patches with alike features have alike colours. The components are those of the dense model, and the
reduced models are shown in them, with the mean cosine between a patch's features and the dense
ones, both minus the mean of all, which they share.
`--weights` takes any weights of `--backbone`, such as DINOv2's; without, timm fetches its own.
Without `--image` it is a photograph that scikit-learn brings along.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from torch import Tensor

import zoo
from zoo.checkpoint import load_weights
from zoo.errors import ZooError
from zoo.measure.similar import centred_cosine

GAP, LINE = 8, 18


def photograph(path: str | None, size: int) -> Image.Image:
    """The middle square of a photograph, `size` pixels wide."""
    image = Image.open(path) if path else Image.fromarray(load_sample_image("china.jpg"))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image, model: torch.nn.Module) -> Tensor:
    """A photograph as a model takes it, `(1, 3, H, W)`."""
    data = timm.data.resolve_model_data_config(model)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((pixels - mean) / std).unsqueeze(0)


def patch_features(model: torch.nn.Module, images: Tensor, restore: str = "merged") -> Tensor:
    """Features of the last block for every patch, `(rows, columns, C)`."""
    with torch.no_grad():
        [maps] = model.forward_intermediates(
            images, 1, norm=True, intermediates_only=True, restore=restore
        )
    return maps[0].permute(1, 2, 0)


class Colours:
    """Three principal components of features as red, green and blue.

    Args:
        dense: The features whose components they are, `(rows, columns, C)`.
    """

    def __init__(self, dense: Tensor) -> None:
        x = dense.flatten(0, 1)
        self.mean = x.mean(0)
        self.axes = torch.linalg.svd(x - self.mean, full_matrices=False)[2][:3].T
        found = (x - self.mean) @ self.axes
        self.low, self.high = found.quantile(0.02, 0), found.quantile(0.98, 0)

    def __call__(self, features: Tensor, size: int) -> Image.Image:
        """Features `(rows, columns, C)` as a picture of `size` pixels."""
        found = ((features - self.mean) @ self.axes - self.low) / (self.high - self.low)
        pixels = (found.clamp(0, 1) * 255).byte().numpy()
        return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def beside(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one size in a row, each with a line of text above."""
    size = pictures[0][1].width
    sheet = Image.new("RGB", (len(pictures) * (size + GAP) - GAP, size + LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (text, picture) in enumerate(pictures):
        draw.text((i * (size + GAP) + 2, 3), text, fill="black")
        sheet.paste(picture, (i * (size + GAP), LINE))
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture, and print how near the reduced features are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", help="a file; without: timm's own, from its cache or the hub")
    parser.add_argument("--image", help="a photograph; without: one of scikit-learn's")
    parser.add_argument("--size", type=int, default=448, help="of the image, in pixels")
    parser.add_argument("--reducer", default="tome", help="a method that needs no training")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--restore", default="merged", help="merged, nearest, zero or knn")
    parser.add_argument("--out", type=Path, default=Path("outputs/pca.png"))
    args = parser.parse_args(arguments)

    try:
        dense = zoo.create_model(
            args.backbone, pretrained=args.weights is None, img_size=args.size, num_classes=0
        ).eval()
        if args.weights is not None:
            load_weights(dense, args.weights)
    except ZooError as error:
        raise SystemExit(f"error: {error}") from error
    photo = photograph(args.image, args.size)
    images = as_tensor(photo, dense)
    expected = patch_features(dense, images)
    paint, depth, cost = Colours(expected), dense.depth, zoo.profile(dense)
    pictures = [("photograph", photo)]
    pictures.append((f"dense, {cost.gmacs:.1f} GMACs", paint(expected, args.size)))
    for keep in args.keep:
        schedule = {"name": "geometric", "rate": keep ** (1 / depth)}
        model = zoo.wrap(dense.unwrap(), args.reducer, schedule).eval()
        found, cost = patch_features(model, images, args.restore), zoo.profile(model)
        rows = [x.flatten(0, 1) for x in (found, expected)]
        near = centred_cosine(*rows, paint.mean).mean().item()
        tokens = f"tokens {cost.tokens[0][0]}->{cost.tokens[-1][1]}"
        print(f"{args.reducer} {tokens}, {cost.gmacs:.2f} GMACs, cosine to dense {near:.4f}")
        text = f"{args.reducer} {tokens}, {cost.gmacs:.1f} GMACs, cosine {near:.3f}"
        pictures.append((text, paint(found, args.size)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    beside(pictures).save(args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()

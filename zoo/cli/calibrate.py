"""`zoo calibrate`: thresholds from unlabelled images, saved with the model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

import zoo
from zoo.checkpoint.folder import save_pretrained
from zoo.data.checks import data_config
from zoo.data.digits import Digits
from zoo.data.folder import image_extensions
from zoo.data.images import opened
from zoo.data.transforms import eval_transform
from zoo.errors import ZooError
from zoo.measure.calibrate import calibrate, pairs_per_block
from zoo.model.reduced import ReducedViT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("model", help="folder, checkpoint or shipped name, as zoo.load takes it")
    parser.add_argument("images", help="a folder of images, labels not needed; or digits")
    parser.add_argument("--out", required=True, help="folder for the calibrated model")
    parser.add_argument("--reducer", help="use this method, e.g. dtome (default: the model's own)")
    parser.add_argument(
        "--r",
        help="pairs per image that merge in each block: one number for all, or one for each, with "
        "commas (default: what the model's schedule removes)",
    )
    parser.add_argument("--r-total", type=int, help="pairs per image in all blocks together")
    parser.add_argument("--batch-size", type=int, default=64, help="images that share a threshold")
    parser.add_argument("--limit", type=int, default=1024, help="images at most (default 1024)")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate a model and save it.

    Raises:
        ZooError: If an argument makes no sense, or there is nothing to read.
    """
    if arguments.batch_size < 1 or arguments.limit < 1:
        raise ZooError("--batch-size and --limit must be 1 or more")
    if arguments.r is not None and arguments.r_total is not None:
        raise ZooError("give either --r or --r-total")
    own = {} if arguments.reducer is None else {"reducer": {"name": arguments.reducer}}
    model = zoo.load(arguments.model, **own)
    r = _counts(arguments.r, model.depth)
    if arguments.r_total is not None:
        r = pairs_per_block(arguments.r_total, model.depth)
    batches = _batches(model, arguments.images, arguments.batch_size, arguments.limit)
    was = getattr(model.reducer, "name", None)
    found = calibrate(model, batches, r)
    now = getattr(model.reducer, "name", None)
    if now != was:
        print(f"{was} with thresholds is {now}: {_typed(model)}")
    where = save_pretrained(model, arguments.out)
    print("thresholds:", " ".join(f"{value:.4f}" for value in found))
    print(f"saved: {where}")
    return 0


def _typed(model: ReducedViT) -> str:
    """The reducer as it is typed: `reducer=NAME reducer.ARGUMENT=VALUE`."""
    config = {} if model.reducer is None else dict(model.reducer.config())
    words = [f"reducer={config.pop('name', None)}"]
    own = {key: value for key, value in config.items() if key in ("metric", "order", "prop_attn")}
    return " ".join([*words, *(f"reducer.{k}={str(v).lower()}" for k, v in own.items())])


def _counts(text: str | None, depth: int) -> list[int] | None:
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ZooError(
            f"--r must be a whole number, or {depth} of them with commas, got {text!r}"
        ) from None
    return found * depth if len(found) == 1 else found


def _batches(model: ReducedViT, name: str, size: int, most: int) -> Iterator[Tensor]:
    """Images as the model expects them, spread over what there is."""
    transform = eval_transform(data_config(model))
    if name == "digits":
        digits = Digits("train")
        pictures: Sequence[Path | Image] = [digits[i][0] for i in _spread(len(digits), most)]
    else:
        files = _files(Path(name))
        pictures = [files[i] for i in _spread(len(files), most)]
    for start in range(0, len(pictures), size):
        part = pictures[start : start + size]
        yield torch.stack([transform(_picture(p)) for p in part])


def _picture(given: Path | Image) -> Image:
    if not isinstance(given, Path):
        return given
    try:
        with given.open("rb") as file:
            return opened(file)
    except (OSError, ValueError, SyntaxError) as error:  # as Pillow's decoders complain
        reason = " ".join(str(error).split()).partition(" <_io")[0]
        raise ZooError(f"{given} cannot be read as an image: {reason}; take it away") from error


def _spread(count: int, most: int) -> list[int]:
    few = min(count, most)
    return [i * count // few for i in range(few)]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ZooError(f"expected a folder of images or 'digits', got {str(folder)!r}")
    known = image_extensions()
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in known)
    if not found:
        raise ZooError(f"{folder} holds no images")
    return found

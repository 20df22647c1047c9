"""`zoo calibrate`: thresholds from unlabelled images, saved with the model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL.Image import Image
from torch import Tensor

import zoo
from reduction.checks import typed
from reduction.mixins.calibrating import THRESHOLDS
from zoo.checkpoint.folder import save_pretrained
from zoo.checkpoint.weights import fit
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
        "--set",
        action="append",
        default=[],
        metavar="ARGUMENT=VALUE",
        help="an argument of that method, e.g. settle=nearest; may be given several times",
    )
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
    if arguments.set and arguments.reducer is None:
        raise ZooError(f"--set {arguments.set[0]} needs a method; type --reducer NAME, too")
    own: dict[str, Any] = {}
    if arguments.reducer is not None:
        own["reducer"] = {"name": arguments.reducer, **_arguments(arguments.set)}
    with _nothing_said_of(THRESHOLDS):
        model = zoo.load(arguments.model, **own)
    r = _counts(arguments.r, model.depth)
    if arguments.r_total is not None:
        r = pairs_per_block(arguments.r_total, model.depth)
    batches = _batches(model, arguments.images, arguments.batch_size, arguments.limit)
    was = model.reducer
    found = calibrate(model, batches, r)
    if was is not None and model.reducer is not None and model.reducer is not was:
        now = model.reducer.config()
        same = "" if now["name"] == was.name else f" is {now['name']}"
        print(f"{was.name} with thresholds{same}: {_typed(was.config(), now)}")
    where = save_pretrained(model, arguments.out)
    print("thresholds:", " ".join(f"{value:.4f}" for value in found))
    print(f"saved: {where}")
    return 0


@contextmanager
def _nothing_said_of(names: frozenset[str]) -> Iterator[None]:
    """Within, nobody is told that weights hold no parameters of these names."""

    def to_be_said(record: logging.LogRecord) -> bool:
        missing = getattr(record, "missing", None)
        return missing is None or not {name.rpartition(".")[2] for name in missing} <= names

    logger = logging.getLogger(fit.__module__)
    logger.addFilter(to_be_said)
    try:
        yield
    finally:
        logger.removeFilter(to_be_said)


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of a method, as they are typed elsewhere.

    Raises:
        ZooError: If one is not `ARGUMENT=VALUE`.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.removeprefix("reducer.").partition("=")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.isidentifier():
            raise ZooError(f"--set must be ARGUMENT=VALUE, e.g. settle=nearest, got {text!r}")
    return found


def _typed(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A reducer as it is typed: `reducer=NAME reducer.ARGUMENT=VALUE`, with what has changed."""
    own = {key: value for key, value in now.items() if key != "name" and was.get(key) != value}
    if was["name"] != now["name"]:
        own = {key: value for key, value in now.items() if key in ("metric", "order", "prop_attn")}
    return " ".join([f"reducer={now['name']}", *(f"reducer.{k}={typed(own[k])}" for k in own)])


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

"""A model on disk, before anything large is read or built: its recipe, its weights, their fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from zoo.build import wrap
from zoo.checkpoint import config as cfg
from zoo.checkpoint.containers import Tower
from zoo.checkpoint.files import file_sha256, first_line, read_any, read_shapes
from zoo.checkpoint.rebuild import twin
from zoo.checkpoint.untrusted import cut, short
from zoo.checkpoint.weights import (
    check_fits,
    classifiers_of,
    difference,
    parts_of,
    read_folder,
    tower_of,
)
from zoo.errors import BadCheckpoint, ZooError

# Numbers by which weights may differ from a recipe when an image size or classes are changed.
_SLACK = 1 << 24


class Stored(NamedTuple):
    """A model on disk, before anything large is read or built.

    Attributes:
        config: The checked recipe.
        origin: The file of its weights, for messages.
        shapes: Of the weights, by the backbone's names and by those of the rest; None where they
            are timm's, to be fetched by tag.
        read: Reads the weights.
    """

    config: dict[str, Any]
    origin: Path
    shapes: Callable[[nn.Module], Tower] | None
    read: Callable[[nn.Module], Tower]


def in_folder(folder: Path) -> Stored:
    """A folder with a recipe.

    Raises:
        BadCheckpoint: The recipe cannot be read, or a file that it names is missing.
    """
    config = cfg.read_config(folder)
    weights = config["weights"]
    named = {cfg.MODEL: weights["model"], cfg.REDUCER: weights["reducer"]}
    for name in (name for name, given in named.items() if given):
        if not (folder / name).is_file():
            raise BadCheckpoint(
                f"{folder / name}: no such file, but {cfg.CONFIG} names it; copy it too"
            )

    def shapes(_: nn.Module) -> Tower:
        found = [read_shapes(folder / name) if given else {} for name, given in named.items()]
        return Tower("", *found)

    def read(_: nn.Module) -> Tower:
        _check_hash(folder / cfg.MODEL, weights["sha256"])
        if weights["reducer"]:
            _check_hash(folder / cfg.REDUCER, weights["reducer_sha256"])
        return read_folder(folder)

    return Stored(config, folder / cfg.MODEL, shapes if weights["model"] else None, read)


def _check_hash(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    actual = file_sha256(path)
    if actual != expected:
        raise BadCheckpoint(
            f"{path}: not the file that {cfg.CONFIG} describes (sha256 {actual[:12]}..., "
            f"expected {expected[:12]}...); copy or download the folder again"
        )


def of_run(path: Path) -> Stored:
    """A checkpoint of a training run, which holds its recipe.

    Raises:
        BadCheckpoint: It cannot be read, or holds none.
    """
    loaded = read_any(path)
    try:
        recipe = cfg.recipe_of_run(loaded)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    if recipe is None:
        raise BadCheckpoint(
            f"{path}: weights without a recipe; create the model first and use "
            "zoo.checkpoint.load_weights(model, path)"
        )
    config = cfg.check_config(recipe, f"{path} (recipe)")
    if (config["schedule"] or {}).get("file"):
        raise BadCheckpoint(f"{path}: the recipe's schedule points at a file; expected its counts")

    def tower(backbone: nn.Module) -> Tower:
        return tower_of(loaded, backbone, path)

    return Stored(config, path, tower, tower)


def check_size(stored: Stored, before: nn.Module, exact: bool, whole: bool) -> None:
    """Compare a recipe with its weights by names and shapes, before memory is taken for either.

    Args:
        stored: Recipe and weights.
        before: The recipe's backbone without content.
        exact: Nothing of the backbone is changed on loading.
        whole: Nor anything else.

    Raises:
        BadCheckpoint: They do not belong together, or the recipe's model is out of proportion.
    """
    config, origin = stored.config, stored.origin
    name, want, extras = config["backbone"]["name"], before.state_dict(), None
    if whole:
        with of_the_file(origin, config), torch.device("meta"):
            parts = config["reducer"], config["schedule"], config["plugins"]
            model = wrap(before, *parts, tensors=True)
            extras = parts_of(model)[1]
    if stored.shapes is None:
        if not config["backbone"].get("library"):
            _check_proportion(before, name, origin)
        return
    with of_the_file(origin, config):
        found = stored.shapes(before)
    if exact:
        check_fits(want, found.body, classifiers_of(before), origin, name)
    have, need = (sum(t.numel() for t in s.values()) for s in (found.body, want))
    if not need / 8 - _SLACK <= have <= 8 * need + _SLACK:
        raise BadCheckpoint(
            f"{origin}: the weights are not those of {name}: the file holds {have / 1e6:.3g} M "
            f"numbers, the recipe asks for {need / 1e6:.3g} M"
        )
    problem = difference(extras, found.extras) if extras and found.extras else ""
    if problem:
        raise BadCheckpoint(
            f"{origin.parent / cfg.REDUCER}: the parameters of the reducer or plugins do not fit "
            f"{name}: {problem}"
        )


def _check_proportion(before: nn.Module, name: str, origin: Path) -> None:
    """timm's weights by tag are for the architecture of that name, give or take an image size."""
    usual = sum(
        t.numel() for t in twin({"name": name, "args": {}, "num_classes": None}).parameters()
    )
    asked = sum(t.numel() for t in before.parameters())
    if asked > 4 * usual + _SLACK:
        raise BadCheckpoint(
            f"{origin.parent}: a recipe without weights asks for {asked / 1e6:.3g} M parameters; "
            f"{name} has {usual / 1e6:.3g} M"
        )


@contextlib.contextmanager
def of_the_file(
    origin: Path, config: Mapping[str, Any], doing: str = "", only: bool = True
) -> Iterator[None]:
    """Whatever goes wrong within is the file's fault, and ends as one line.

    Args:
        origin: The file.
        config: Its recipe.
        doing: What cannot be done, for errors that do not say it.
        only: False where the caller gave parts of his own, whose mistakes keep their words.
    """
    try:
        yield
    except BadCheckpoint:
        raise
    except ZooError as error:
        if not only:
            raise
        raise BadCheckpoint(f"{origin}: {cut(error)} ({writer(config)})") from error
    except Exception as error:  # a recipe may hold anything, and libraries check little
        if not only:
            raise
        reason = cut(first_line(error)) if str(error).strip() else type(error).__name__
        what = short(doing, 200)[1:-1] if doing else "a recipe that nothing can be built from"
        raise BadCheckpoint(f"{origin}: {what}: {reason} ({writer(config)})") from error


def writer(config: Mapping[str, Any]) -> str:
    """Who wrote a recipe and who reads it, for messages."""
    return f"written by tokenzoo {config['zoo']}, this is {cfg.zoo_version()}"

"""The task `visualize`: what a model keeps, merges and drops of images, as sheets and a page."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reduction.errors import UnknownName
from zoo.data.checks import IMAGE_OPTIONS
from zoo.data.images import Picture, opened, reason, upright
from zoo.errors import NoClassToken, ZooError
from zoo.measure.describe import method_name
from zoo.model.selecting import SelectingTower
from zoo.published import config_folder
from zoo.run.build import build_model, instantiate
from zoo.run.done import short
from zoo.run.variants import copied, nothing_reduced
from zoo.visual.photographs import files_of
from zoo.visual.see import Visual, describe_model, visualize

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT

#: Images where no limit is given: a page of more is slow to open.
MOST = 16
#: Width of a drawing in the small picture that goes into a report.
_SMALL = 112


def make_pictures(cfg: DictConfig, model: ReducedViT, device: torch.device) -> dict[str, Any]:
    """Writes sheets and the page, and returns the fields `visual` and `picture` of a row.

    Args:
        cfg: configs/eval.yaml, composed.
        model: The model.
        device: Where to run.

    Raises:
        ZooError: There are no images, one of them cannot be read, or a model has no blocks to look
            into.
    """
    options = cfg.visualize
    images = _images(cfg)
    models = _models(cfg, model, device)
    keeps = _keeps(cfg)
    seen = visualize(
        models,
        images,
        keep=keeps or None,
        attention=bool(options.attention),
        **_image_options(cfg),
    )
    folder = Path(options.folder or Path(cfg.paths.outputs) / "visual" / _name(cfg, model))
    return _written(seen, folder, int(options.panels), str(options.format))


def _image_options(cfg: DictConfig) -> dict[str, Any]:
    """What was typed of how images are prepared."""
    keys = (*IMAGE_OPTIONS, "upright")
    return {key: value for key in keys if (value := cfg.data.get(key)) is not None}


def _images(cfg: DictConfig) -> list[Path]:
    from omegaconf import OmegaConf

    given = cfg.images
    if OmegaConf.is_config(given):
        given = OmegaConf.to_container(given, resolve=True)
    found = files_of(given)
    limit = MOST if cfg.limit is None else int(cfg.limit)
    read = _readable(found, limit, strict=cfg.data.get("damaged") == "fail")
    if cfg.limit is None and len(read) == limit and read[-1] != found[-1]:
        print(
            f"the first {limit} of {len(found)} images; limit=N takes another number",
            file=sys.stderr,
        )
    return read


def _readable(files: list[Path], limit: int, strict: bool) -> list[Path]:
    """The first `limit` that can be read; others before them are named, as in data sets.

    Raises:
        ZooError: None can be read, or one cannot and that is what `data.damaged` says.
    """
    read: list[Path] = []
    broken: list[str] = []
    for file in files:
        if len(read) == limit:
            break
        try:
            with file.open("rb") as stream:
                # Some files open, and only their pixels turn out to have no meaning as colours.
                Picture(3)(upright(opened(stream)))
        except Exception as error:  # files break in as many ways as there are formats
            broken.append(f"{file}: {reason(error)}")
        else:
            read.append(file)
    if broken and (strict or not read):
        raise ZooError(broken[0])
    for line in broken:
        print(f"left out: {line}", file=sys.stderr)
    return read


def _models(cfg: DictConfig, model: ReducedViT, device: torch.device) -> dict[str, nn.Module]:
    """The model, and those that it is compared with, by their names."""
    found: dict[str, nn.Module] = {}
    for other, more in ((model, ""), *_against(cfg)):
        other = other.to(device).eval()
        shown: nn.Module = other if cfg.get("selector") is None else _selecting(cfg, other)
        found[_free(describe_model(shown) + more, found)] = shown
    return found


def _free(name: str, taken: Mapping[str, Any]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name} ({count})"
    return free


def _selecting(cfg: DictConfig, model: ReducedViT) -> SelectingTower:
    selector = instantiate(dict(cfg.selector), "selector")
    return SelectingTower(model, selector, _keeps(cfg)[0], int(cfg.select.block))


def _keeps(cfg: DictConfig) -> list[int | float]:
    if cfg.get("selector") is None:
        return []
    keep = cfg.select.keep
    found = [keep] if isinstance(keep, int | float) else list(keep)
    return sorted(found, key=lambda k: (k < 1, k), reverse=False)[::-1]


def _against(cfg: DictConfig) -> list[tuple[ReducedViT, str]]:
    """The same backbone and weights with other methods, under the same schedule.

    Each with what its name has to tell besides: as in a sweep, a method that ranks by a class
    token which the model does not have takes its other score.
    """
    against = cfg.visualize.against
    names = [against] if isinstance(against, str) else list(against or ())
    return [_built(_with_reducer(cfg, str(name)), str(name)) for name in names]


def _built(cfg: DictConfig, name: str) -> tuple[ReducedViT, str]:
    from omegaconf import OmegaConf

    try:
        return build_model(cfg), ""
    except NoClassToken as error:
        if not error.instead:
            raise ZooError(f"visualize.against={name}: {error}") from error
        more = error.instead
    for key, value in more.items():
        OmegaConf.update(cfg, f"reducer.{key}", value, force_add=True)
    told = ", ".join(f"{key}={value}" for key, value in more.items())
    print(f"visualize.against={name}: {told}, as the model has no class token", file=sys.stderr)
    return build_model(cfg), f" ({told})"


def _with_reducer(cfg: DictConfig, name: str) -> DictConfig:
    from omegaconf import OmegaConf

    if name in ("none", "dense"):
        return nothing_reduced(cfg)
    file = config_folder() / "reducer" / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise UnknownName("visualize.against", name, known)
    other = copied(cfg)
    other.reducer = OmegaConf.load(file)
    return other


def _name(cfg: DictConfig, model: ReducedViT) -> str:
    """Folder of what was given none: what it is, in words that every file system takes."""
    from zoo.checkpoint import weights_sha256

    recipe = model.recipe
    # Points of one method under other budgets, or on other images, keep their own pictures.
    facts = {"recipe": recipe, "images": cfg.images, "selector": cfg.get("selector")}
    facts |= {"seed": cfg.seed, "visualize": cfg.visualize, "keep": cfg.select.keep}
    facts |= {"block": cfg.select.block, "limit": cfg.limit, "data": _image_options(cfg)}
    facts["weights"] = weights_sha256(str(cfg.weights)) if cfg.get("weights") else None
    source = Path(str(cfg.weights)).stem if cfg.get("weights") else recipe["backbone"]["name"]
    parts = [str(source), method_name(model)]
    if cfg.get("selector") is not None:
        parts.append(str(cfg.selector["_target_"]).rpartition(".")[2].lower())
    return re.sub(r"[^\w.-]+", "_", "-".join([*parts, short(facts)]))


def _written(seen: Visual, folder: Path, panels: int, kind: str) -> dict[str, Any]:
    (page,) = seen.save(folder / "index.html")
    sheets = seen.save(folder / f"sheet.{kind}", most=panels)
    tokens, small = folder / "tokens.png", folder / "small.png"
    try:
        seen.tokens().save(tokens)
        # So small that a report can hold one for every point.
        own = Visual(seen.title, [(name, strips[:1]) for name, strips in seen.images[:1]])
        own.strip(panel=_SMALL).quantize(128).save(small, optimize=True)
    except OSError as error:
        raise ZooError(f"{folder} cannot be written: {error.strerror or error}") from error
    trails = [strips[0].trail for _, strips in seen.images]
    return {
        "visual": {
            "page": str(page),
            "sheets": [str(path) for path in sheets],
            "tokens": str(tokens),
            "images": [name for name, _ in seen.images],
            "counts": [trail.counts for trail in trails],
        },
        "picture": str(small),
    }

"""Putting weights from a file into a model, or saying in one line why they do not fit."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.checkpoint import config as cfg
from zoo.checkpoint.containers import Tower, find_tower, without_pretraining
from zoo.checkpoint.files import read_any, read_tensors
from zoo.checkpoint.google import read_npz
from zoo.checkpoint.positions import (
    PATCHES,
    TABLE,
    Grid,
    grid_of,
    to_grid,
    to_patch,
    without_table,
)
from zoo.checkpoint.rebuild import grid_of_recipe
from zoo.errors import BadCheckpoint, ZooError

_log = logging.getLogger(__name__)

NewHead = bool | Literal["auto"]
_SHOWN = 3  # names listed per kind of difference
_RADIO = "radio_model."


class OtherClassifier(BadCheckpoint):
    """A file whose classifier is not the model's; everything else fits.

    Attributes:
        classes: Of the file; 0 where it has no classifier.
    """

    def __init__(self, origin: Path, classes: int, name: str, wanted: int) -> None:
        self.classes = classes
        has = f"{classes} classes" if classes else "no classifier"
        super().__init__(
            f"{origin}: the file has {has}, the model {name} has {wanted or 'none'}; create the "
            f"model with num_classes={classes}, or keep its own head with new_head=True"
        )


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    ema: bool = True,
    new_head: NewHead = False,
    img_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Load a weights file into a model that already exists.

    Reads plain timm and DeiT files (``.pth``, ``.bin``, ``.safetensors``), Google's ``.npz``,
    Lightning checkpoints, the model folders of :func:`zoo.checkpoint.save_pretrained`, and what the
    training scripts of DINO, DINOv2, MoCo v3, MAE and their followers write: the tower is found in
    students and teachers, averages, and under the prefixes of wrappers and compilers; decoders and
    projection heads stay behind. Foreign key names go through the ``checkpoint_filter_fn`` of the
    backbone's timm module where it has one. The position embedding is resampled to the grid of the
    model.

    Args:
        model: a :class:`~zoo.model.reduced.ReducedViT` or a plain timm model; changed in place.
        path: the file or model folder.
        ema: take the averaged weights (EMA, a teacher) where a training file holds both.
        new_head: keep the model's own classifier and leave the file's aside; "auto" does so where
            the file has none, or one of another size, and says so in one line.
        img_size: image size that the weights were trained at, for a file that does not say it and
            whose grid of patches is neither the model's nor a square.

    Returns:
        The same model.

    Raises:
        BadCheckpoint: the file cannot be read safely or does not fit; the model is then unchanged.
        ZooError: an argument is out of range.
    """
    if new_head not in (True, False, "auto"):
        raise ZooError(f"new_head must be True, False or 'auto', got {new_head!r}")
    path = Path(path)
    backbone, _ = parts_of(model)
    told = None if img_size is None else grid_of(img_size, backbone)
    origin = path
    if path.is_dir():
        origin = path / cfg.MODEL
        tower = read_folder(path)
        told = _told_by(lambda: cfg.read_config(path)) if told is None else told
    elif path.suffix.lower() == ".npz":
        tower = Tower("", read_npz(path, backbone), {})
    else:
        loaded = read_any(path)
        tower = tower_of(loaded, backbone, path, ema=ema)
        if told is None:
            told = _told_by(lambda: cfg.check_config(cfg.recipe_of_run(loaded) or {}, path))
    fit(model, tower, origin, adapt=True, new_head=new_head, told=told)
    return model


def read_folder(folder: Path) -> Tower:
    """Return the tensors of a model folder."""
    extra = folder / cfg.REDUCER
    return Tower(
        "", read_tensors(folder / cfg.MODEL), read_tensors(extra) if extra.is_file() else {}
    )


def tower_of(loaded: Any, backbone: nn.Module, path: Path, *, ema: bool = True) -> Tower:
    """Find a model's weights in what a file holds.

    Raises:
        BadCheckpoint: there are no tensors in it, or some are not plain ones.
    """
    found = find_tower(loaded, backbone.state_dict().keys(), ema=ema)
    if found is None:
        seen = [str(k)[:40] for k in list(loaded)[:5]] if isinstance(loaded, Mapping) else []
        raise BadCheckpoint(
            f"{path}: no weights found; expected a state_dict, alone or under a name such as "
            f"'model' or 'state_dict', found {seen or type(loaded).__name__}"
        )
    return found


def _told_by(read: Callable[[], dict[str, Any]]) -> Grid | None:
    """The patch grid of the recipe beside the weights; None where it is no recipe of ours.

    A folder of weights may well hold somebody else's config.json.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return grid_of_recipe(read()["backbone"])
    except BadCheckpoint:
        return None


def fit(
    model: nn.Module,
    tower: Tower,
    origin: Path,
    *,
    adapt: bool,
    new_head: NewHead = False,
    ignore_extras: bool = False,
    told: Grid | None = None,
    other_patch: bool = False,
) -> None:
    """Load a tower into a model, all of it or nothing.

    Args:
        model: a ReducedViT or a plain timm model.
        tower: what was found in the file.
        origin: where the tensors are from, for messages.
        adapt: let timm's ``checkpoint_filter_fn`` convert and resample what does not fit as it is.
        new_head: see :func:`load_weights`.
        ignore_extras: leave parameters of another reducer or other plugins aside.
        told: grid of the file's position embedding, where somebody told it.
        other_patch: resample the patch embedding to the patch size of the model, as was asked for.

    Raises:
        BadCheckpoint: names, shapes or the number of classes differ.
    """
    backbone, extras = parts_of(model)
    want, body, rest = backbone.state_dict(), tower.body, tower.extras
    heads, name = classifiers_of(backbone), name_of(model)
    if other_patch:
        body = to_patch(body, want, origin)
    if adapt:
        body = _adapted(backbone, body, want, heads, told, origin)
    own = classes_of(want, heads)
    if new_head == "auto":
        classes = classes_of(body, heads)
        new_head = classes != own
        if new_head and own:
            has = classes or "none"
            _log.warning("new classifier: %d classes, %s has %s", own, origin, has)
    if new_head:
        body = _starting_norm({k: v for k, v in body.items() if not k.startswith(heads)}, want)
        body.update({k: v for k, v in want.items() if k.startswith(heads)})
    check_fits(want, body, heads, origin, name)

    if ignore_extras:
        rest = {k: v for k, v in rest.items() if k in extras and v.shape == extras[k].shape}
    elif rest and extras:
        problem = difference(extras, rest)
        if problem:
            raise BadCheckpoint(
                f"{origin}: the parameters of the reducer or plugins do not fit {name}: {problem}"
            )
    missing = [k for k in extras if k not in rest]
    if missing:
        _log.warning(
            "%s holds no parameters for %s; they keep their initial values",
            origin,
            _some(missing),
            extra={
                "note": "untrained " + " and ".join(sorted({k.split(".")[0] for k in missing})),
                "missing": missing,
            },
        )
    backbone.load_state_dict(body)
    if extras and rest:
        model.load_state_dict(rest, strict=False)
    for i, plugin in enumerate(getattr(model, "plugins", ())):
        if not any(k.startswith(f"plugins.{i}.") for k in rest):
            plugin.warm_start(backbone)  # what it copied was there before these weights


def parts_of(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Split a model into the timm backbone and the named tensors of everything else."""
    backbone = model.get_submodule("backbone") if hasattr(model, "unwrap") else model
    if backbone is model:
        return model, {}
    return backbone, {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}


def _adapted(
    backbone: nn.Module,
    body: dict[str, Tensor],
    want: Mapping[str, Tensor],
    heads: tuple[str, ...],
    told: Grid | None,
    origin: Path,
) -> dict[str, Tensor]:
    """Bring names, decoders and positions of a file to what the model has."""
    if difference(want, body):
        body = _converted(backbone, body, want, told, origin)
        body = without_pretraining(body, want, heads)
    # Where the rest is of another architecture, its positions are not the thing to speak of.
    apart = (TABLE, *heads)
    others = [{k: v for k, v in s.items() if not k.startswith(apart)} for s in (want, body)]
    if difference(others[0], _starting_norm(others[1], want)):
        return body
    return to_grid(body, backbone, told, origin)


def _converted(
    backbone: nn.Module,
    body: dict[str, Tensor],
    want: Mapping[str, Tensor],
    told: Grid | None,
    origin: Path,
) -> dict[str, Tensor]:
    """Apply timm's own conversion; on failure return the input, whose difference is then told.

    Raises:
        BadCheckpoint: If the conversion knows the file and refuses it.
    """
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    # timm would also resample the patch embedding to another patch size. That is another
    # architecture: its numbers would be quietly different, so it is refused unless asked for.
    table = body.get(PATCHES)
    other_patch = table is not None and table.ndim == 4 and table.shape != want[PATCHES].shape
    if convert is None or other_patch:
        return body
    options = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:  # DeiT III's own files
        options["adapt_layer_scale"] = any(re.match(r"blocks\.\d+\.gamma_[12]$", k) for k in body)
    given = to_grid(body, backbone, told, origin) if _is_map(want) else dict(body)
    # timm would take positions for a square; RADIO's it cuts out of a larger grid.
    keep = _is_map(want) or any(k.startswith(_RADIO) for k in body)
    try:
        return dict(convert(given, backbone if keep else without_table(backbone), **options))
    except ZooError as error:  # a filter of ours that knows what is wrong with the file
        raise BadCheckpoint(f"{origin}: {error}") from error
    except Exception as error:  # conversions assume the files they know; ours may be any file
        _log.debug("checkpoint_filter_fn failed on %s: %s", origin, error)
        return body


def _is_map(want: Mapping[str, Tensor]) -> bool:
    """Whether the position table says its grid: it is one of rows and columns, `(1, C, h, w)`."""
    return TABLE in want and want[TABLE].dim() == 4


def _starting_norm(body: dict[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Start the norm of an averaging model from that of a file trained without a classifier.

    As timm does for EVA: a better start than a new one.
    """
    if "fc_norm.weight" not in want or "norm.weight" in want or "fc_norm.weight" in body:
        return body
    return {f"fc_{k}" if k in ("norm.weight", "norm.bias") else k: v for k, v in body.items()}


def check_fits(
    want: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    heads: tuple[str, ...],
    origin: Path,
    name: str,
) -> None:
    """Refuse tensors that are not a model's.

    Args:
        want: the model's tensors.
        got: the file's, or their shapes.
        heads: starts of the names of the model's classifiers.
        origin: where the tensors are from.
        name: of the model.

    Raises:
        BadCheckpoint: names, shapes, types or the number of classes differ.
    """
    problem = difference(want, got)
    if not problem:
        return
    classes_file, classes_model = classes_of(got, heads), classes_of(want, heads)
    body_want = {k: v for k, v in want.items() if not k.startswith(heads)}
    body_got = {k: v for k, v in got.items() if not k.startswith(heads)}
    if classes_file != classes_model and not difference(body_want, body_got):
        raise OtherClassifier(origin, classes_file, name, classes_model)
    raise BadCheckpoint(f"{origin}: the weights are not those of {name}: {problem}")


def difference(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """Describe how two sets of named tensors differ; empty if they agree."""
    missing = [k for k in want if k not in got]
    unexpected = [k for k in got if k not in want]
    both = [k for k in want if k in got]
    shapes = [
        f"{k} is {tuple(got[k].shape)} in the file, {tuple(want[k].shape)} in the model"
        for k in both
        if got[k].shape != want[k].shape
    ]
    kinds = [f"{k} is {kind}" for k in both if (kind := _odd_kind(want[k], got[k]))]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({_some(shapes, '; ')})")
    if kinds:
        parts.append(f"{len(kinds)} of another kind ({_some(kinds, '; ')})")
    return "; ".join(parts)


def _odd_kind(want: Tensor, got: Tensor) -> str:
    """What is odd about a tensor that torch would copy without a word, such as a quantised one."""
    if got.is_meta:
        return "" if want.is_meta else "without content"
    if got.layout is not torch.strided or got.is_quantized:
        return "sparse" if got.layout is not torch.strided else "quantised"
    if want.is_floating_point() != got.is_floating_point():
        return str(got.dtype).removeprefix("torch.")
    return ""


def _some(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:_SHOWN]) + (separator + "..." if len(names) > _SHOWN else "")


def classifiers_of(backbone: nn.Module) -> tuple[str, ...]:
    """Starts of the names of a model's classifiers, such as `head.`."""
    names = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{n}." for n in ([names] if isinstance(names, str) else names))


def classes_of(state: Mapping[str, Tensor], heads: tuple[str, ...]) -> int:
    """Number of classes by the classifier's weight; 0 when there is none."""
    weight = state.get(f"{heads[0]}weight")
    return int(weight.shape[0]) if weight is not None and weight.dim() else 0


def name_of(model: nn.Module) -> str:
    """The model's name for messages."""
    recipe = getattr(model, "recipe", None)
    if isinstance(recipe, Mapping):
        return str(recipe["backbone"]["name"])
    described = getattr(model, "pretrained_cfg", None) or {}
    return str(described.get("architecture") or type(model).__name__)

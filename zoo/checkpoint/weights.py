"""Putting weights from a file into a model, or saying in one line why they do not fit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoo.checkpoint.files import read_any, read_tensors
from zoo.errors import BadCheckpoint, ZooError

_log = logging.getLogger(__name__)

# Wrappers leave these in front of every key; in any order, so they are stripped repeatedly.
_WRAPPERS = ("module.", "_orig_mod.")
# Where training scripts put the weights, in timm's order of preference.
_EMA_KEYS = ("state_dict_ema", "model_ema")
_STATE_KEYS = ("state_dict", "model")
_SHOWN = 3  # names listed per kind of difference


def load_weights(
    model: nn.Module, path: str | Path, *, ema: bool = True, new_head: bool = False
) -> nn.Module:
    """Load a weights file into a model that already exists.

    Reads plain timm and DeiT files (``.pth``, ``.bin``, ``.safetensors``; also nested under
    ``"model"`` or ``"state_dict"`` and with ``module.`` prefixes), Lightning checkpoints, and the
    model folders of :func:`zoo.checkpoint.save_pretrained`. Foreign key names go through the
    ``checkpoint_filter_fn`` of the backbone's timm module where it has one, which also resamples
    the position embedding to another image size.

    Args:
        model: a :class:`~zoo.model.reduced.ReducedViT` or a plain timm model; changed in place.
        path: the file or model folder.
        ema: take the averaged weights where a training file holds both.
        new_head: keep the model's own classifier and leave the file's aside.

    Returns:
        The same model.

    Raises:
        BadCheckpoint: the file cannot be read safely or does not fit; the model is then unchanged.
    """
    path = Path(path)
    if path.is_dir():
        state = read_folder_state(path)
        origin = path / "model.safetensors"
    else:
        state = flat_state(read_any(path), path, ema=ema)
        origin = path
    fit(model, state, origin, adapt=True, new_head=new_head)
    return model


def read_folder_state(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder under the names of ``ReducedViT.state_dict()``."""
    state = {f"backbone.{k}": v for k, v in read_tensors(folder / "model.safetensors").items()}
    extra = folder / "reducer.safetensors"
    if extra.is_file():
        state.update(read_tensors(extra))
    return state


def flat_state(loaded: Any, path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Find the state dict in what a file holds and strip the prefixes of wrappers.

    Raises:
        BadCheckpoint: there is no mapping of tensors in it.
    """
    found = loaded
    for _ in range(3):  # {"state_dict": {"model": {...}}} is the deepest nesting seen in the wild
        if not isinstance(found, Mapping):
            break
        keys = (*_EMA_KEYS, *_STATE_KEYS) if ema else _STATE_KEYS
        inner = next((found[k] for k in keys if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = (
        {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        seen = (
            sorted(map(str, loaded))[:5] if isinstance(loaded, Mapping) else type(loaded).__name__
        )
        raise BadCheckpoint(
            f"{path}: no weights found; expected a state_dict, alone or under 'model' or "
            f"'state_dict', found {seen}"
        )
    tensors = {_strip(k): v for k, v in tensors.items()}
    # A LightningModule keeps the network as `net`; its other entries (losses, metrics) stay behind.
    if any(k.startswith("net.") for k in tensors):
        tensors = {_strip(k[4:]): v for k, v in tensors.items() if k.startswith("net.")}
    return tensors


def _strip(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    origin: Path,
    *,
    adapt: bool,
    new_head: bool = False,
    ignore_extras: bool = False,
) -> None:
    """Load a flat state dict into a model, all of it or nothing.

    Args:
        model: a ReducedViT or a plain timm model.
        state: keys as in the timm model, or as in ``ReducedViT.state_dict()``.
        origin: where the tensors are from, for messages.
        adapt: let timm's ``checkpoint_filter_fn`` convert and resample what does not fit as it is.
        new_head: keep the model's own classifier.
        ignore_extras: leave parameters of another reducer or other plugins aside.

    Raises:
        BadCheckpoint: names, shapes or the number of classes differ.
    """
    backbone, extras = _parts(model)
    wrapped = any(k.startswith("backbone.") for k in state)
    body = (
        {k[9:]: v for k, v in state.items() if k.startswith("backbone.")}
        if wrapped
        else dict(state)
    )
    rest = {k: v for k, v in state.items() if wrapped and not k.startswith("backbone.")}

    want = backbone.state_dict()
    heads = _classifier_prefixes(backbone)
    if adapt and _difference(want, body):
        body = _convert(backbone, body, want, origin)
    if new_head:
        body = {k: v for k, v in body.items() if not k.startswith(heads)}
        body.update({k: v for k, v in want.items() if k.startswith(heads)})
    _check(want, body, heads, origin, _name_of(model))

    if ignore_extras:
        rest = {k: v for k, v in rest.items() if k in extras and v.shape == extras[k].shape}
    elif rest and extras:
        problem = _difference(extras, rest)
        if problem:
            raise BadCheckpoint(
                f"{origin}: the parameters of the reducer or plugins do not fit {_name_of(model)}: "
                f"{problem}"
            )
    missing = [k for k in extras if k not in rest]
    if missing:
        _log.warning(
            "%s holds no parameters for %s; they keep their initial values", origin, _some(missing)
        )
    backbone.load_state_dict(body)
    if extras and rest:
        model.load_state_dict(rest, strict=False)
    for i, plugin in enumerate(getattr(model, "plugins", ())):
        if not any(k.startswith(f"plugins.{i}.") for k in rest):
            plugin.warm_start(backbone)  # what it copied was there before these weights


def _parts(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Split a model into the timm backbone and the named tensors of everything else."""
    backbone = model.get_submodule("backbone") if hasattr(model, "unwrap") else model
    if backbone is model:
        return model, {}
    return backbone, {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}


def _convert(
    backbone: nn.Module, body: dict[str, Tensor], want: Mapping[str, Tensor], origin: Path
) -> dict[str, Tensor]:
    """Apply timm's own conversion; on failure return the input, whose difference is then told.

    Raises:
        BadCheckpoint: If the conversion knows the file and refuses it.
    """
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    patch = "patch_embed.proj.weight"
    # timm would also resample the patch embedding to another patch size. That is another
    # architecture: its numbers would be quietly different, so it is refused instead.
    other_patch = patch in body and body[patch].ndim == 4 and body[patch].shape != want[patch].shape
    if convert is None or other_patch:
        return body
    try:
        converted = dict(convert(dict(body), backbone))
    except BadCheckpoint as error:  # a filter of ours that knows what is wrong with the file
        raise BadCheckpoint(f"{origin}: {error}") from error
    except ZooError as error:  # a filter of our own, which says what does not fit
        raise BadCheckpoint(f"{origin}: {error}") from error
    except Exception as error:  # conversions assume the files they know; ours may be any file
        _log.debug("checkpoint_filter_fn failed on %s: %s", origin, error)
        return body
    for key in body.keys() & converted.keys():
        if body[key].shape != converted[key].shape:
            _log.warning(
                "%s: %s resampled from %s to %s",
                origin, key, tuple(body[key].shape), tuple(converted[key].shape),
            )  # fmt: skip
    return converted


def _check(
    want: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    heads: tuple[str, ...],
    origin: Path,
    name: str,
) -> None:
    problem = _difference(want, got)
    if not problem:
        return
    classes_file, classes_model = _classes(got, heads), _classes(want, heads)
    body_want = {k: v for k, v in want.items() if not k.startswith(heads)}
    body_got = {k: v for k, v in got.items() if not k.startswith(heads)}
    if classes_file != classes_model and not _difference(body_want, body_got):
        raise BadCheckpoint(
            f"{origin}: the file has {classes_file} classes, the model {name} has {classes_model}; "
            f"create the model with num_classes={classes_file}, or keep its own head with "
            "new_head=True"
        )
    raise BadCheckpoint(f"{origin}: the weights are not those of {name}: {problem}")


def _difference(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """Describe how two sets of named tensors differ; empty if they agree."""
    missing = [k for k in want if k not in got]
    unexpected = [k for k in got if k not in want]
    shapes = [
        f"{k} is {tuple(got[k].shape)} in the file, {tuple(want[k].shape)} in the model"
        for k in want
        if k in got and got[k].shape != want[k].shape
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({_some(shapes, '; ')})")
    return "; ".join(parts)


def _some(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:_SHOWN]) + (separator + "..." if len(names) > _SHOWN else "")


def _classifier_prefixes(backbone: nn.Module) -> tuple[str, ...]:
    names = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{n}." for n in ([names] if isinstance(names, str) else names))


def _classes(state: Mapping[str, Tensor], heads: tuple[str, ...]) -> int:
    """Number of classes by the classifier's weight; 0 when there is none."""
    weight = state.get(f"{heads[0]}weight")
    return int(weight.shape[0]) if weight is not None else 0


def _name_of(model: nn.Module) -> str:
    recipe = getattr(model, "recipe", None)
    if isinstance(recipe, Mapping):
        return str(recipe["backbone"]["name"])
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)

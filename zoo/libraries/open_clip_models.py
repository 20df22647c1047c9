"""open_clip's image towers, by the names of its configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import open_clip
import timm
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transform import PreprocessCfg
from torch import nn

from zoo.adapters.tower import find_tower, tower_of
from zoo.errors import UnknownName, UnsupportedModel, ZooError
from zoo.libraries.build import Built, fetched
from zoo.libraries.hub import ask_hub, cached, offline
from zoo.libraries.names import LIBRARIES, known, why_no_tower

_LIBRARY = LIBRARIES["open_clip"]
_FIELDS = frozenset(field.name for field in fields(CLIPVisionCfg))
# They would fetch weights, or say what another argument says.
_FORBIDDEN = frozenset({"timm_model_pretrained"})
#: Files of weights whose name open_clip does not say.
_USUAL = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]


def create(name: str, pretrained: bool, args: dict[str, Any]) -> Built:
    """See `zoo.libraries.build`, as for the other. Without the text tower."""
    stem, _, tag = name.partition(".")
    config = open_clip.get_model_config(stem)
    if config is None:
        raise UnknownName("model of open_clip", stem, known(_LIBRARY))
    if reason := why_no_tower(config):
        raise UnsupportedModel(f"{stem} of open_clip cannot be reduced: {reason}")
    tags = open_clip.list_pretrained_tags_by_model(stem)
    if tag and tag not in tags:
        raise UnknownName(f"weights of open_clip's {stem}", tag, tags)
    config = copy.deepcopy(config)
    vision = config["vision_cfg"]
    changes = _changes(args, stem)
    vision.update(changes)
    # Weights of one name agree on it; without any, these are the images that they would take.
    data = _data(open_clip.get_pretrained_cfg(stem, tag or next(iter(tags), "")))
    if not pretrained:
        tower = _tower(config["embed_dim"], vision, _quick(stem, tag))
        return Built(_alone(tower), stem, None, data)
    if not tag:
        raise ZooError(
            f"open_clip has several weights of {stem}; choose one: name={stem}.TAG, where TAG is "
            f"{', '.join(tags) or 'none that it knows'}"
        )
    size = changes.pop("image_size", None)
    if changes:
        raise ZooError(
            f"{next(iter(changes))} cannot be changed in weights that open_clip publishes; leave "
            "it out, or backbone.pretrained"
        )
    try:
        model = whole(stem, tag, size)
    except Exception as error:  # of its many ways to fetch, all say what they could not
        raise fetched(f"the weights {tag} of {stem}", _LIBRARY, error) from error
    tower = _sized(model.visual, {} if size is None else {"image_size": size})
    return Built(_alone(tower), stem, tag, data)


def whole(name: str, weights: str, size: int | tuple[int, int] | None = None, tag: str = "") -> Any:
    """A whole model of open_clip, both towers with their weights.

    Args:
        name: Of its configuration, without a tag.
        weights: A tag, or a file.
        size: Of the images, where it is not that of the weights.
        tag: Of the weights in the file, where it is known: it says which GELU they want.

    Raises:
        Exception: What open_clip, the hub or the file says.
    """
    tagged = open_clip.get_pretrained_cfg(name, weights)
    path = _file(tagged) if tagged else weights
    quick = _quick(name, weights if tagged else tag)
    return open_clip.create_model(
        name, pretrained=path, force_quick_gelu=quick, force_image_size=size
    )


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model; open_clip's own needs no network, others have theirs on the hub.

    Args:
        name: Of its configuration, without a tag.

    Raises:
        ZooError: It is out of reach.
    """
    theirs = (open_clip.get_model_config(name) or {}).get("text_cfg", {}).get("hf_tokenizer_name")
    try:
        if theirs and not offline() and cached(theirs, "tokenizer_config.json") is None:
            ask_hub()
        return open_clip.get_tokenizer(name)
    except Exception as error:  # of the hub, or of a package that reads such files
        raise fetched(f"the tokenizer {theirs or 'of ' + name}", _LIBRARY, error) from error


def _quick(name: str, tag: str) -> bool:
    """Whether a model computes GELU the quick way, as OpenAI's weights want it in any case."""
    config = open_clip.get_model_config(name) or {}
    return bool(
        config.get("quick_gelu") or open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")
    )


def _file(tagged: Mapping[str, Any]) -> str:
    """The file with the weights of a tag, from the cache of the hub or from where it lies."""
    repository, _, file = str(tagged.get("hf_hub") or "").rpartition("/")
    if repository:
        names = [file] if file else _USUAL
        for name in names:
            if (found := cached(repository, name)) is not None:
                return str(found)
        if offline():
            raise FileNotFoundError("they are not in the local cache, and HF_HUB_OFFLINE is set")
        ask_hub()
    return open_clip.download_pretrained(dict(tagged))  # type: ignore[no-any-return]


def rebuild(name: str, args: dict[str, Any]) -> Built:
    """See `zoo.libraries.build`."""
    given = {k: v for k, v in args.items() if k != "num_classes"}
    vision = dict(given.pop("vision_cfg", None) or {})
    if "img_size" in given:
        vision["image_size"] = given.pop("img_size")
    quick, width = given.pop("quick_gelu", False), given.pop("embed_dim", None)
    if given or not isinstance(width, int):
        wrong = f"has no argument {next(iter(given))!r}" if given else "needs 'embed_dim'"
        raise ZooError(f"an image tower of open_clip {wrong}")
    _check_fields(vision, name)
    if (trunk := vision.get("timm_model_name")) and not timm.is_model(str(trunk)):
        raise UnknownName("backbone", str(trunk), timm.list_models())
    return Built(_tower(width, vision, bool(quick)), name, None, _data({}))


def _tower(width: int, vision: Mapping[str, Any], quick_gelu: bool) -> nn.Module:
    try:
        return _sized(_build_vision_tower(width, dict(vision), quick_gelu), vision)
    except ZooError:
        raise
    except Exception as error:  # it checks little of what it is given
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ZooError(f"open_clip cannot build {dict(vision)}: {reason}") from error


def _sized(tower: Any, vision: Mapping[str, Any]) -> nn.Module:
    """A tower for images of its configuration's size, which a timm trunk is not told."""
    size, trunk = vision.get("image_size"), getattr(tower, "trunk", None)
    if size is not None and trunk is not None and find_tower(trunk) is not None:
        wanted = (size, size) if isinstance(size, int) else tuple(size)
        if tower_of(trunk).input_size(trunk)[1:] != wanted:
            tower.set_input_size(wanted)
    return tower  # type: ignore[no-any-return]


def _alone(tower: Any) -> nn.Module:
    """A tower that answers with the embedding, without a decoder that would read its tokens."""
    if getattr(tower, "output_tokens", False):
        tower.output_tokens = False
    return tower  # type: ignore[no-any-return]


def _changes(args: Mapping[str, Any], name: str) -> dict[str, Any]:
    changes = {k: v for k, v in args.items() if k not in ("img_size", "num_classes")}
    _check_fields(changes, name)
    if "img_size" in args:
        size = args["img_size"]
        changes["image_size"] = size if isinstance(size, int) else tuple(size)
    return changes


def _check_fields(given: Mapping[str, Any], name: str) -> None:
    wrong = sorted(k for k in given if k not in _FIELDS or k in _FORBIDDEN)
    if wrong:
        takes = ", ".join(sorted(_FIELDS - _FORBIDDEN))
        raise ZooError(
            f"the image tower of open_clip's {name} has no argument {wrong[0]!r}; it takes "
            f"img_size, {takes}"
        )


def usual_data(m: Any) -> dict[str, Any]:
    """What a tower says of its images, by timm's names, or what open_clip does where it is silent.

    Args:
        m: The tower.
    """
    return _data(getattr(m, "preprocess_cfg", None) or {})


def _data(tagged: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing: open_clip's usual one, with what it says of these weights."""
    usual = PreprocessCfg()
    chosen = {key: tagged.get(key) or getattr(usual, key) for key in ("mean", "std")}
    resize = tagged.get("resize_mode") or usual.resize_mode
    return {
        **{key: tuple(value) for key, value in chosen.items()},
        "interpolation": tagged.get("interpolation") or usual.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash" if resize == "squash" else "center",
    }

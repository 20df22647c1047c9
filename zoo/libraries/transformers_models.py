"""Hugging Face's vision transformers, by the names of their repositories or by a folder.

Where a configuration comes from, in this order: a folder of that name, the local cache of the hub,
the table of well-known models in `assets/hf_configs.json`, the hub. So nothing is asked of the hub
that is known already, and it is asked once: without a network that is an answer within seconds.

A model that takes images of any size is built for those that its image processor makes, as DINOv2
for 224 pixels, where the table of positions in the release is one for 518. `img_size` says another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from zoo.adapters.tower import tower_of
from zoo.errors import UnknownName, UnsupportedModel, ZooError
from zoo.libraries.build import Built
from zoo.libraries.hub import ask_hub, cached, offline
from zoo.libraries.names import hf_configs

#: The class that is built for a kind of configuration whose repository names none that is run.
CLASSES = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "vit_mae": "ViTMAEModel",
    "ijepa": "IJepaModel",
    "beit": "BeitModel",
}
#: Kinds that bring their positions to the size of the images by themselves.
ANY_SIZE = ("dinov2", "dinov2_with_registers")
#: Classes that a repository, or a recipe, may name besides.
HEADS = frozenset(
    {
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersForImageClassification",
        "DINOv3ViTForImageClassification",
        "CLIPVisionModel",
        "CLIPForImageClassification",
        "SiglipForImageClassification",
        "Siglip2ForImageClassification",
        "IJepaForImageClassification",
        "BeitForImageClassification",
    }
)
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_IMAGENETS = (1000, 11821, 12000, 21841, 21843)  # numbers of classes of its editions
# Said in every configuration, and nothing about the model.
_PASSING = ("_name_or_path", "transformers_version", "architectures", "auto_map", "torch_dtype")


def create(name: str, pretrained: bool, args: dict[str, Any]) -> Built:
    """See `zoo.libraries.build`, as for the other."""
    config, cls, data = _known(name)
    labels = _labels(config)
    # A new classifier is put in place of the old one when the rest is there.
    changes = {k: v for k, v in args.items() if k != "num_classes"}
    if "num_classes" in args:
        labels = {}
    made = data.pop("size", None)
    if made is not None and config.model_type in ANY_SIZE:
        changes.setdefault("img_size", made)
    size = changes.pop("img_size", None) if pretrained else None
    config = _changed(config, changes, name)
    called = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
    if not pretrained:
        return Built(_built(cls, config), called, None, {**data, **labels})
    model = _loaded(name, cls, config)
    if size is not None:
        _resize(model, size, name)
    return Built(model, called, "main", {**data, **labels})


def rebuild(name: str, args: dict[str, Any]) -> Built:
    """See `zoo.libraries.build`."""
    config, cls = args.get("config"), args.get("class")
    if not isinstance(config, Mapping) or not isinstance(cls, str):
        raise ZooError("a model of Hugging Face needs 'class' and 'config' in its arguments")
    if cls not in HEADS and cls not in CLASSES.values():
        raise UnknownName("class of Hugging Face", cls, [*CLASSES.values(), *HEADS])
    changes = {k: v for k, v in args.items() if k not in ("config", "class")}
    model = _built(cls, _changed(_config(config, name, cls), changes, name))
    return Built(model, name, None, _usual(name, model.config.model_type))


def _known(name: str) -> tuple[PretrainedConfig, str, dict[str, Any]]:
    """Configuration, class and preprocessing behind a name.

    Raises:
        UnknownName: No such model is known, and the hub has none or is out of reach.
        ZooError: What was found is damaged, or of another kind.
    """
    if (folder := Path(name).expanduser()).is_dir():
        return _found(name, folder)
    if (found := cached(name, "config.json")) is not None:
        return _found(name, found.parent)
    if name in hf_configs():
        stored = hf_configs()[name]
        cls = stored["class"]
        return _config(stored["config"], name, cls), cls, _tuples(stored["data"])
    return _found(name, _fetched(name).parent)


def _fetched(name: str) -> Path:
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ZooError(
            f"{name!r} is neither a folder nor a name of Hugging Face; expected for example "
            "facebook/dinov2-small"
        ) from None
    near = UnknownName("model of Hugging Face", name, list(hf_configs()))
    if offline():
        raise ZooError(f"{near}; the hub is not asked, HF_HUB_OFFLINE is set")
    try:
        ask_hub()
        path = Path(hf_hub_download(name, "config.json", etag_timeout=5))
    except Exception as error:  # of many kinds: no such repository, gated, no network
        reason = _first_line(error)
        raise ZooError(f"{near}; the hub has not given its configuration ({reason})") from error
    try:
        hf_hub_download(name, "preprocessor_config.json", etag_timeout=5)
    except Exception:  # many have none; the usual one is assumed then
        pass
    return path


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _found(name: str, folder: Path) -> tuple[PretrainedConfig, str, dict[str, Any]]:
    """The same of a folder with a `config.json`."""
    values = _json(folder / "config.json")
    named = [a for a in values.get("architectures") or [] if a in HEADS or a in CLASSES.values()]
    config = _config(values, name, named[0] if named else None)
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0  # of its training alone
    data = _processor(folder) or _usual(name, config.model_type)
    return config, named[0] if named else CLASSES[config.model_type], data


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ZooError(f"{path}: no such file; expected a model of Hugging Face") from None
    except (OSError, ValueError) as error:
        raise ZooError(f"{path}: cannot be read ({_first_line(error)})") from error
    if not isinstance(values, dict):
        raise ZooError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def _config(values: Mapping[str, Any], name: str, cls: str | None) -> PretrainedConfig:
    """A configuration, of the image tower alone where a model has two and the class takes one.

    Args:
        values: Of a file or a recipe.
        name: Of the model, for messages.
        cls: The class that will be built, None for that of the kind.
    """
    kind: Any = values.get("model_type")
    # CLIP's and SigLIP's classifiers read the configuration of both towers and build one.
    whole = cls is not None and getattr(transformers, cls).config_class.model_type == kind
    own = {k: v for k, v in values.items() if k not in ("model_type", *_PASSING)}
    # A dual model says of its parts only what differs from the usual.
    parts = isinstance(own.get("vision_config"), Mapping) and f"{kind}_vision_model" in CLASSES
    if parts and not whole:
        kind, projection = f"{kind}_vision_model", own.get("projection_dim")
        own = {k: v for k, v in own["vision_config"].items() if k not in ("model_type", *_PASSING)}
        own |= {} if projection is None else {"projection_dim": projection}
    if kind not in CLASSES and not whole:
        raise UnsupportedModel(
            f"{name} is a model of kind {kind!r}; of Hugging Face can be reduced: "
            f"{', '.join(CLASSES)}"
        )
    try:
        return AutoConfig.for_model(kind, **own)
    except Exception as error:
        raise ZooError(f"the configuration of {name} is damaged: {_first_line(error)}") from error


def _changed(config: PretrainedConfig, args: Mapping[str, Any], name: str) -> PretrainedConfig:
    renamed = {"img_size": "image_size", "num_classes": "num_labels"}
    vision = getattr(config, "vision_config", config)
    for key, value in args.items():
        own = renamed.get(key, key)
        part = config if hasattr(config, own) else vision
        if not hasattr(part, own):
            known = {**vision.to_dict(), **config.to_dict()}
            fields = sorted(k for k in known if not k.startswith("_"))
            raise ZooError(
                f"a {config.model_type} of Hugging Face has no argument {key!r}; {name} takes "
                f"img_size, num_classes, {', '.join(fields)}"
            )
        if own == "image_size" and not isinstance(value, int) and len(set(value)) == 1:
            value = value[0]
        setattr(part, own, value)
    return config


def _built(cls: str, config: PretrainedConfig) -> Any:
    build = getattr(transformers, cls)
    try:
        return build(config)
    except Exception as error:
        raise ZooError(f"transformers cannot build a {cls}: {_first_line(error)}") from error


def _loaded(name: str, cls: str, config: PretrainedConfig) -> nn.Module:
    """A model with its weights.

    Raises:
        ZooError: They are not here, and cannot be fetched.
    """
    build = getattr(transformers, cls)
    local = Path(name).expanduser().is_dir()
    try:
        return build.from_pretrained(name, config=config, local_files_only=True)  # type: ignore[no-any-return]
    except Exception as error:
        if local or offline() or os.environ.get("TRANSFORMERS_OFFLINE"):
            raise ZooError(
                f"the weights of {name} are not here, or do not fit: {_first_line(error)}"
            ) from error
    try:
        ask_hub()
        return build.from_pretrained(name, config=config)  # type: ignore[no-any-return]
    except Exception as error:
        raise ZooError(
            f"the weights of {name} are not in the local cache, and the hub has not given them "
            f"({_first_line(error)})"
        ) from error


def _labels(config: PretrainedConfig) -> dict[str, Any]:
    """What the classes are called, as a saved model says it; empty where that is not known.

    Those of ImageNet have long names here, and folders go by the short ones of WordNet, which are
    known for as many classes.
    """
    names = getattr(config, "id2label", None) or {}
    if len(names) in _IMAGENETS or all(str(n) == f"LABEL_{i}" for i, n in names.items()):
        return {}
    return {"zoo_data": {"class_names": [str(names[i]) for i in sorted(names)]}}


def _resize(model: Any, size: int | Sequence[int], name: str) -> None:
    """Bring the positions of a model to images of another size, as the model itself would.

    Raises:
        ZooError: Its positions are no table that it resamples.
    """
    tower: Any = tower_of(model)
    inner: Any = tower.inner(model)
    embed: Any = getattr(inner, "embeddings", None)
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if (height, width) == tower.input_size(model)[1:]:
        return
    table = getattr(embed, "position_embeddings", None)
    if not isinstance(table, nn.Parameter) or not hasattr(embed, "interpolate_pos_encoding"):
        raise ZooError(
            f"img_size cannot be changed in the weights of {name}, whose positions are no table "
            "that is resampled; leave it out"
        )
    patch, (rows, columns) = model.config.patch_size, tower.grid(model)
    prefix = table.shape[1] - rows * columns
    tokens = table.new_zeros(1, prefix + (height // patch) * (width // patch), table.shape[2])
    with torch.no_grad():
        embed.position_embeddings = nn.Parameter(
            embed.interpolate_pos_encoding(tokens, height, width).clone()
        )
    patches = embed.patch_embeddings
    embed.image_size = patches.image_size = (height, width)
    patches.num_patches = (height // patch) * (width // patch)
    inner.config.image_size = height if height == width else [height, width]


def usual_data(m: Any) -> dict[str, Any]:
    """Preprocessing of a model that transformers built, by timm's names; nothing is fetched.

    Args:
        m: The model: one that was loaded by a name or from a folder still knows it.
    """
    name, kind = str(getattr(m.config, "_name_or_path", "") or ""), m.config.model_type
    folder = Path(name).expanduser()
    if not folder.is_dir() and (found := cached(name, "preprocessor_config.json")) is not None:
        folder = found.parent
    data = _processor(folder) if name else {}
    return {k: v for k, v in _tuples(data).items() if k != "size"} or _usual(name, kind)


def _usual(name: str, kind: str) -> dict[str, Any]:
    """Preprocessing of a well-known model, or of the first family there is of its kind."""
    kinds = (kind, f"{kind}_vision_model")
    families = (one for one in hf_configs().values() if one["config"]["model_type"] in kinds)
    data = (hf_configs().get(name) or next(families, {})).get("data", {})
    return {k: v for k, v in _tuples(data).items() if k != "size"}


def _processor(folder: Path) -> dict[str, Any]:
    """Preprocessing as an image processor has it, by timm's names; empty where there is none.

    Raises:
        ZooError: It cannot be read, or says something odd.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    values = _json(path)
    mean, std, size = values.get("image_mean"), values.get("image_std"), values.get("size")
    for key, numbers in (("image_mean", mean), ("image_std", std)):
        if numbers is not None and not (
            isinstance(numbers, list) and all(isinstance(n, int | float) for n in numbers)
        ):
            raise ZooError(f"{path}: {key} must be a list of numbers, got {numbers!r:.60}")
    crop = values.get("crop_size") if values.get("do_center_crop") else None
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    cropped = crop.get("height") if isinstance(crop, dict) else crop
    share = cropped / short if isinstance(cropped, int) and isinstance(short, int) else 1.0
    if not values.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    return {
        "mean": None if mean is None else tuple(mean),
        "std": None if std is None else tuple(std),
        "interpolation": _INTERPOLATION.get(values.get("resample", 2), "bilinear"),
        "crop_pct": min(1.0, share),
        "crop_mode": "center" if cropped or short else "squash",
        "size": cropped if isinstance(cropped, int) else None,
    }


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}

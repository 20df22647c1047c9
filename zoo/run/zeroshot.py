"""The task `zeroshot`: images against the names of their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zoo.errors import ZooError
from zoo.measure.zeroshot import Texts, by_text, encode_texts, in_order_of, read_texts
from zoo.results.rows import wilson_interval
from zoo.run.extract import Extractor, Selection

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT


def measure_zeroshot(
    cfg: DictConfig, model: ReducedViT, queries: Selection, extract: Extractor
) -> dict[str, Any]:
    """Returns the fields `zeroshot` and `n_images` of a row.

    Args:
        cfg: configs/eval.yaml, composed.
        model: The model; its answer is an image's embedding.
        queries: The images.
        extract: Computes their embeddings.

    Raises:
        ZooError: There is no text, or it does not fit the model or the classes.
    """
    data = queries.data
    names, classes = data.class_names, data.num_classes
    texts = _texts(cfg, model, data, names, extract.device)
    if classes is None:
        classes = len(texts.x)
    vectors = in_order_of(texts, names, classes, data.label)
    x, labels, _ = extract(model, queries, answer=True)
    outside = ((labels < 0) | (labels >= len(vectors))).nonzero()
    if len(outside):
        raise ZooError(
            f"{data.label}: image {int(outside[0])}, counted from 0, has the label "
            f"{int(labels[outside[0]])}; task=zeroshot needs one from 0 to {len(vectors) - 1} for "
            "every image"
        )
    hits = by_text(x, vectors, texts.source) == labels[:, None]
    first, total = int(hits[:, 0].sum()), len(labels)
    found = {
        "text": texts.source,
        "classes": len(vectors),
        "top1": 100 * first / total,
        "top5": 100 * int(hits.sum()) / total if len(vectors) > 5 else None,
        "ci95": list(wilson_interval(first, total)),
    }
    if cfg.zeroshot.reservoir.size:
        from zoo.run.stream import measure_stream

        found["reservoir"] = measure_stream(cfg, model, queries, vectors, extract, texts.heat)
    return {"n_images": total, "zeroshot": found}


def _texts(
    cfg: DictConfig,
    model: ReducedViT,
    data: ImageData,
    names: list[str] | None,
    device: torch.device,
) -> Texts:
    given = cfg.zeroshot.embeddings
    if given is not None:
        return read_texts(str(given))
    tower, tokenizer = text_tower(cfg, model)
    if names is None:
        raise ZooError(
            f"task=zeroshot: {data.label} does not name its classes; give data.class_map=FILE, or "
            "zeroshot.embeddings=FILE"
        )
    words = [name.replace("_", " ") for name in names]
    found = encode_texts(tower.to(device).eval(), tokenizer, words, _templates(cfg), device)
    return found._replace(names=names)


def text_tower(cfg: DictConfig, model: Any) -> tuple[Any, Any]:
    """What has `encode_text`, and its tokenizer.

    That is the model itself where it has both, else the whole model of open_clip that the image
    tower is part of.

    Raises:
        ZooError: There is none, or it has no weights.
    """
    for owner in (model, model.backbone):
        if callable(getattr(owner, "encode_text", None)) and hasattr(owner, "tokenizer"):
            return owner, owner.tokenizer
    backbone = cfg.get("backbone")
    library = None if backbone is None else backbone.get("library")
    if library == "hf":
        raise ZooError(
            "task=zeroshot: text towers of Hugging Face are not run here; type backbone=open_clip "
            "backbone.name=ViT-B-32.openai backbone.pretrained=true, which has both, or "
            "zeroshot.embeddings=FILE, a safetensors file with one text embedding per class"
        )
    if library != "open_clip":
        raise ZooError(
            "task=zeroshot: the model has no text tower; type zeroshot.embeddings=FILE, a "
            "safetensors file with one text embedding per class"
        )
    stem, _, tag = str(backbone.name).partition(".")
    weights = cfg.weights if cfg.weights is not None else tag if backbone.pretrained else None
    return open_clip_text(stem, None if weights is None else str(weights), tag)


def open_clip_text(name: str, weights: str | None, tag: str = "") -> tuple[Any, Any]:
    """A whole model of open_clip, and its tokenizer.

    Args:
        name: open_clip's name of it, without a tag.
        weights: A tag of open_clip, or a file with the weights of the whole model.
        tag: Of the weights in a file, where it is known.

    Raises:
        ZooError: open_clip is missing, the weights are not those of both towers, or the tokenizer
            is out of reach.
    """
    _open_clip("the text tower")
    if not weights:
        raise ZooError(
            f"task=zeroshot: the text tower of {name} has no weights; type "
            f"backbone.name={name}.TAG backbone.pretrained=true, weights=FILE with both towers, or "
            "zeroshot.embeddings=FILE"
        )
    from zoo.libraries.open_clip_models import tokenizer_of, whole

    try:
        return whole(name, weights, tag=tag), tokenizer_of(name)
    except ZooError:
        raise
    except Exception as error:  # of files, of the network and of open_clip, in many forms
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ZooError(
            f"task=zeroshot: no text tower of {name} with the weights {weights}: {reason[:200]}; "
            "type zeroshot.embeddings=FILE"
        ) from error


def _open_clip(what: str) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ZooError(f"{what} is of open_clip; pip install 'tokenzoo[open-clip]'") from error
    return open_clip


def _templates(cfg: DictConfig) -> list[str]:
    """The sentences that class names are put into.

    Raises:
        ZooError: One has no place for the name.
    """
    given = cfg.zeroshot.templates
    if not isinstance(given, str):
        found = [str(template) for template in given]
    elif given in ("simple", "openai"):
        library = _open_clip(f"zeroshot.templates={given}")
        own = {"simple": "SIMPLE_IMAGENET_TEMPLATES", "openai": "OPENAI_IMAGENET_TEMPLATES"}
        chosen = getattr(library, own[given])
        found = [template("{}") for template in chosen]
    else:
        found = [given]
    if bad := [template for template in found if "{}" not in template]:
        raise ZooError(
            f"zeroshot.templates: {bad[0]!r} has no {{}} for the class name; type simple, openai, "
            "or sentences such as ['a photo of a {}.']"
        )
    return found

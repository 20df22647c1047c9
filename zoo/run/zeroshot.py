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
    tower = text_tower(model)
    if tower is None:
        raise ZooError(
            "task=zeroshot: the model has no text tower; type zeroshot.embeddings=FILE, a "
            "safetensors file with one text embedding per class"
        )
    if names is None:
        raise ZooError(
            f"task=zeroshot: {data.label} does not name its classes; give data.class_map=FILE, or "
            "zeroshot.embeddings=FILE"
        )
    tokenizer = _tokenizer(cfg, tower)
    words = [name.replace("_", " ") for name in names]
    found = encode_texts(tower.to(device).eval(), tokenizer, words, _templates(cfg), device)
    return found._replace(names=names)


def text_tower(model: Any) -> Any:
    """What has `encode_text`: the model itself, or what its image tower belongs to; else None."""
    for owner in (model, getattr(model, "backbone", None)):
        if callable(getattr(owner, "encode_text", None)):
            return owner
    return None


def _tokenizer(cfg: DictConfig, tower: Any) -> Any:
    own = getattr(tower, "tokenizer", None)
    if own is not None:
        return own
    try:
        import open_clip
    except ImportError as error:
        raise ZooError(
            "the text tower needs open_clip's tokenizer: pip install 'tokenzoo[open_clip]'"
        ) from error
    name = str(cfg.backbone.name) if cfg.backbone else ""
    known = {item.lower(): item for item in open_clip.list_models()}
    return open_clip.get_tokenizer(known.get(name.rpartition("/")[2].lower(), name))


def _templates(cfg: DictConfig) -> list[str]:
    """The sentences that class names are put into.

    Raises:
        ZooError: One has no place for the name.
    """
    given = cfg.zeroshot.templates
    if not isinstance(given, str):
        found = [str(template) for template in given]
    elif given in ("simple", "openai"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        chosen = SIMPLE_IMAGENET_TEMPLATES if given == "simple" else OPENAI_IMAGENET_TEMPLATES
        found = [template("{}") for template in chosen]
    else:
        found = [given]
    if bad := [template for template in found if "{}" not in template]:
        raise ZooError(
            f"zeroshot.templates: {bad[0]!r} has no {{}} for the class name; type simple, openai, "
            "or sentences such as ['a photo of a {}.']"
        )
    return found

"""Classification by text: each image gets the class whose text embedding is nearest to its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from zoo.errors import ZooError

#: Where names of classes may stand in the metadata of a file.
_NAMES = ("class_names", "classes", "names")


class Texts(NamedTuple):
    """Embeddings of classes.

    Attributes:
        x: `(classes, C)`, of length 1.
        names: Of the classes, where they are known.
        source: Where they are from, for messages and rows.
        heat: What similarities are multiplied by in a softmax, as the tower has learned it.
    """

    x: Tensor
    names: list[str] | None
    source: str
    heat: float = 100.0


def read_texts(path: str | Path) -> Texts:
    """Read a safetensors file of text embeddings.

    It holds one tensor, `(classes, width)`, or `(classes, templates, width)` whose templates are
    averaged as CLIP does; its metadata may hold `class_names`, a JSON list in the order of the
    rows.

    Raises:
        ZooError: It is no such file.
    """
    from safetensors import safe_open

    path = Path(path).expanduser()
    if not path.is_file():
        raise ZooError(f"zeroshot.embeddings={path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors has an error class of its own
        reason = " ".join(str(error).split())
        raise ZooError(
            f"zeroshot.embeddings={path} cannot be read as safetensors: {reason}"
        ) from error
    if len(tensors) != 1:
        raise ZooError(
            f"zeroshot.embeddings={path} holds {len(tensors)} tensors "
            f"({', '.join(sorted(tensors)[:5])}); expected one of shape (classes, width)"
        )
    (x,) = tensors.values()
    if x.ndim not in (2, 3) or not len(x) or not x.is_floating_point():
        raise ZooError(
            f"zeroshot.embeddings={path} holds {x.dtype} of shape {tuple(x.shape)}; expected "
            "numbers of shape (classes, width) or (classes, templates, width)"
        )
    if not bool(x.isfinite().all()):
        raise ZooError(f"zeroshot.embeddings={path} holds NaN or infinity")
    return Texts(_pooled(x), _names(about, path, len(x)), str(path))


def _pooled(x: Tensor) -> Tensor:
    """One vector of length 1 per class, the mean of its templates."""
    x = normalize(x.float(), dim=-1)
    return x if x.ndim == 2 else normalize(x.mean(1), dim=-1)


def _names(about: dict[str, str], path: Path, count: int) -> list[str] | None:
    key = next((key for key in _NAMES if key in about), None)
    if key is None:
        return None
    try:
        names = json.loads(about[key])
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ZooError(
            f"zeroshot.embeddings={path}: {key} in its metadata must be a JSON list of text, got "
            f"{about[key]!r:.60}"
        )
    if len(names) != count or len(set(names)) != count:
        raise ZooError(
            f"zeroshot.embeddings={path}: {len(names)} names ({len(set(names))} different) for "
            f"{count} embeddings"
        )
    return names


def encode_texts(
    model: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str], device: torch.device
) -> Texts:
    """Embed class names with the text tower of a model.

    Args:
        model: Has open_clip's `encode_text`.
        tokenizer: From a list of text to tokens.
        names: Of the classes.
        templates: Sentences with {} in the place of the name.
        device: Where to run.
    """
    vectors = []
    with torch.inference_mode():
        for name in names:
            tokens = tokenizer([template.replace("{}", name) for template in templates])
            vectors.append(model.encode_text(tokens.to(device)).float().cpu())
    count = "1 template" if len(templates) == 1 else f"{len(templates)} templates"
    scale = getattr(model, "logit_scale", None)
    heat = float(scale.detach().exp()) if isinstance(scale, Tensor) else 100.0
    return Texts(_pooled(torch.stack(vectors)), list(names), f"text tower, {count}", heat)


def in_order_of(texts: Texts, names: Sequence[str] | None, classes: int, label: str) -> Tensor:
    """Embeddings in the order of the classes of the data.

    Args:
        texts: Of all classes, maybe of more.
        names: Names of the data's classes by number; None goes by the numbers.
        classes: How many classes the data have.
        label: Name of the data.

    Raises:
        ZooError: A class has no embedding, or nobody can tell which it is.
    """
    if names is not None and texts.names is not None:
        missing = [name for name in names if name not in texts.names]
        if missing:
            raise ZooError(
                f"{label} has classes without a text embedding: {_some(missing)}; "
                f"{texts.source} has {_some(texts.names)}"
            )
        return texts.x[[texts.names.index(name) for name in names]]
    if len(texts.x) != classes:
        raise ZooError(
            f"{label} has {classes} classes, {texts.source} has {len(texts.x)} embeddings without "
            "names to tell which is which; expected the same number, or class_names in its metadata"
        )
    return texts.x


def by_text(features: Tensor, texts: Tensor, source: str = "the text") -> Tensor:
    """Classes by falling similarity, `(N, min(5, classes))`.

    Args:
        features: `(N, C)`.
        texts: `(classes, C)`, of length 1.
        source: Where these are from, for the message.

    Raises:
        ZooError: They do not have the same width.
    """
    if features.shape[1] != texts.shape[1]:
        raise ZooError(
            f"the model answers with {features.shape[1]} numbers per image, {source} has "
            f"embeddings of {texts.shape[1]}; expected text embeddings of the tower that these "
            "image weights were trained with"
        )
    similar = normalize(features.float(), dim=1) @ texts.T
    return similar.topk(min(5, len(texts)), dim=1).indices


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")

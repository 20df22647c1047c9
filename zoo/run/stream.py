"""Zero-shot answers over a stream of images, corrected by what came before them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from reduction.methods.tca import TCA
from zoo.errors import ZooError
from zoo.measure.device import like_weights
from zoo.measure.reservoir import Options, Reservoir
from zoo.results.rows import wilson_interval

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.model.reduced import ReducedViT
    from zoo.run.extract import Extractor, Selection


def measure_stream(
    cfg: DictConfig,
    model: ReducedViT,
    queries: Selection,
    texts: Tensor,
    extract: Extractor,
    heat: float,
) -> dict[str, Any]:
    """Returns what a reservoir makes of the images, one after the other in the order of the data.

    With `reducer=tca reducer.anchors=K` for K classes, the anchors are those of the reservoir as
    soon as it has them, and there are none before.

    Args:
        cfg: configs/eval.yaml, composed.
        model: Its answer is an image's embedding.
        queries: The images.
        texts: Embeddings of the classes `(K, D)`, of length 1.
        extract: Knows device and precision.
        heat: What similarities are multiplied by in the softmax.

    Raises:
        ZooError: The model has no class token, or other anchors than classes.
    """
    if model.anatomy.alone is not None or not model.tower.class_tokens(model.backbone):
        raise ZooError(
            "zeroshot.reservoir remembers class tokens, and this model has none; type "
            "zeroshot.reservoir.size=0"
        )
    options = Options(**{name: cfg.zeroshot.reservoir[name] for name in Options._fields})
    reservoir = Reservoir(len(texts), options)
    reducer = model.reducer
    anchored = isinstance(reducer, TCA) and reducer.anchors > 0
    if isinstance(reducer, TCA) and reducer.anchors not in (0, len(texts)):
        raise ZooError(
            f"reducer.anchors={reducer.anchors}: a reservoir makes one anchor per class; type "
            f"reducer.anchors={len(texts)} or reducer.anchors=0"
        )
    model.to(extract.device).eval()
    texts = texts.to(extract.device)
    hits = total = 0
    with _without_anchors(model) as use:
        for images, labels in _batches(queries, 1 if anchored else None):
            for x, tokens, label in zip(*_seen(model, images, extract), labels, strict=True):
                logits = heat * normalize(x.float(), dim=-1) @ texts.T
                answer = reservoir.see(logits, x, tokens)
                hits, total = hits + int(answer.argmax() == int(label)), total + 1
                if anchored and (anchors := reservoir.anchors()) is not None:
                    use(anchors)
    return {
        **options._asdict(),
        "top1": 100 * hits / total,
        "ci95": list(wilson_interval(hits, total)),
        "remembered": len(reservoir),
        "anchors": bool(anchored and reservoir.anchors() is not None),
    }


def _batches(queries: Selection, most: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    left = queries.limit
    for images, labels, *_ in queries.data.chosen_dataloader(queries.part, queries.places, None):
        if left is not None:
            images, labels = images[:left], labels[:left]
            left -= len(labels)
        yield from zip(
            images.split(most or len(images)), labels.split(most or len(labels)), strict=True
        )
        if left == 0:
            return


def _seen(model: ReducedViT, images: Tensor, extract: Extractor) -> tuple[Tensor, Tensor]:
    """Embeddings `(B, D)`, and class tokens behind every block `(B, L, C)`."""
    device, dtype = extract.device, extract.dtype
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        x, info = model(like_weights(images, model, device), return_info="trace")
    return x, torch.stack([t.x[:, 0] for t in info.trace], dim=1)


@contextmanager
def _without_anchors(model: ReducedViT) -> Iterator[Any]:
    """Within, `tca` has no anchors until some are given; afterwards it has what it had."""
    reducer = model.reducer
    if not isinstance(reducer, TCA) or not reducer.anchors:
        yield None
        return
    count, had = reducer.anchors, reducer.anchor_tokens
    assert had is not None
    reducer.anchor_tokens = had.clone()

    def use(anchors: Tensor) -> None:
        reducer.anchors = count
        reducer.set_anchors(anchors.to(had))

    try:
        reducer.anchors = 0
        yield use
    finally:
        reducer.anchors, reducer.anchor_tokens = count, had

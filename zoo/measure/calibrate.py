"""Thresholds from unlabelled images, for methods that merge what is alike enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from reduction.base import Reducer
from reduction.mixins.calibrating import Calibrates, TakesThresholds, noted_thresholds
from reduction.registry import METHODS
from zoo.errors import ZooError
from zoo.measure.device import like_weights
from zoo.model.evaluating import evaluating
from zoo.model.reduced import ReducedViT


def calibrate(
    model: ReducedViT,
    batches: Iterable[Tensor | Sequence[Tensor]],
    r: Sequence[int] | None = None,
) -> list[float]:
    """Set the thresholds of a model from unlabelled images.

    Batch after batch runs through the model; in every block the most similar pairs of the whole
    batch merge, as many as there are images times `r`. A threshold is the mean over the batches of
    the similarity at which that ended. The thresholds are saved with the model, and decide alone
    from then on: the schedule limits nothing any more.

    Args:
        model: Whose reducer has thresholds, such as `dtome`, or has a form with thresholds, as all
            have in which pairs merge by similarity; that then takes its place. It is changed.
        batches: Images `(B, 3, H, W)` as the model expects them, or tuples that begin with them.
            Larger batches give better thresholds.
        r: Pairs per image that merge in each block on average; None: what the schedule removes.

    Returns:
        The thresholds, one per block; 1 where nothing merges.

    Raises:
        ZooError: If the reducer has no thresholds, `r` has another length than the model, or there
            are no images.
    """
    before = model.reducer
    reducer = thresholded(before)
    assert before is not None
    counts = removed(model) if r is None else [int(v) for v in r]
    if min(counts, default=0) < 0:
        raise ZooError(f"r counts pairs per image in each block: expected 0 or more, got {counts}")
    if len(counts) != model.depth:
        raise ZooError(
            f"r must hold one count for each of the {model.depth} blocks, got {list(counts)}"
        )
    assert isinstance(reducer, Reducer)
    total, seen = torch.zeros(model.depth, dtype=torch.float64), 0
    device = next(model.parameters()).device
    model.reducer = reducer
    try:
        reducer.setup(model.anatomy.spec([plan.step for plan in model.plan()]))
        reducer.to(device).train(before.training)
        with evaluating(model), torch.no_grad(), reducer.looking(counts):
            for batch in batches:
                images = batch if isinstance(batch, Tensor) else batch[0]
                _, info = model(like_weights(images, model, device), return_info=True)
                total += noted_thresholds(info.final, model.depth).double().cpu()
                seen += 1
        if not seen:
            raise ZooError("expected at least one batch of images to calibrate on, got none")
    except BaseException:
        model.reducer = before
        raise
    found = [float(v) if c else 1.0 for v, c in zip(total / seen, counts, strict=True)]
    reducer.set_thresholds(found, counts)
    return found


def thresholded(reducer: Reducer | None) -> Calibrates:
    """A reducer that has thresholds as it is, or the form of it that has some.

    Raises:
        ZooError: If there is none.
    """
    if isinstance(reducer, Calibrates):
        return reducer
    if isinstance(reducer, TakesThresholds):
        return reducer.thresholded()
    name = getattr(reducer, "name", None)
    raise ZooError(
        f"reducer {name!r} has no thresholds to calibrate: {_why(reducer)}; choose one that has, "
        "e.g. reducer='dtome', or that can have them: 'tome' or 'pitome', which become dtome, or "
        + ", ".join(repr(n) for n in takers() if n not in ("dtome", "tome", "pitome"))
    )


def takers() -> list[str]:
    """Names of the methods that have thresholds, or can have them."""
    classes = METHODS.load().items()
    return sorted(n for n, c in classes if issubclass(c, Calibrates | TakesThresholds))


def _why(reducer: Reducer | None) -> str:
    """Why there are none."""
    if reducer is None:
        return "nothing is reduced"
    kind = reducer.card.kind
    return reducer.no_thresholds or next(
        (text for word, text in _KINDS.items() if word in kind),
        "no pair of tokens merges by how alike it is",
    )


#: What the kind of a method says, first things first.
_KINDS = {
    "before block 0": "it acts before block 0, where no block has compared tokens yet",
    "soft": "every new token is a mixture of all, and no pair merges",
    "cluster": "it has so many clusters as its schedule says",
}


def removed(model: ReducedViT) -> list[int]:
    """Tokens that the schedule of a model removes in each block."""
    reducer = model.reducer
    if isinstance(reducer, Calibrates) and not reducer.limit:
        reducer.limit = True  # else it is asked for nothing
        try:
            return removed(model)
        finally:
            reducer.limit = False
    steps = [plan.step for plan in model.plan()]
    n, found = model.token_counts()[0][0] - model.prefix, []
    for step in steps:
        keep = n if step is None else min(n, step.keep)
        found.append(n - keep)
        n = keep
    return found


def pairs_per_block(total: int, depth: int, kind: str = "constant") -> list[int]:
    """How DyMU spreads the pairs of an image over the blocks.

    Args:
        total: Pairs that merge in all blocks together.
        depth: Blocks.
        kind: "constant" (the remainder goes to the first blocks), "linear" (many in the first
            blocks) or "reverse_linear".

    Raises:
        ZooError: If the kind is unknown.
    """
    if kind == "constant":
        each, rest = divmod(total, depth)
        return [each + (i < rest) for i in range(depth)]
    if kind not in ("linear", "reverse_linear"):
        raise ZooError(
            f"kind must be one of ('constant', 'linear', 'reverse_linear'), got {kind!r}"
        )
    start = (2 * total) // depth
    found: list[int] = []
    for i in range(depth):
        r = int(start - i * start / depth)
        left = total - sum(found)
        found.append(min(r, left))
    return found if kind == "linear" else found[::-1]

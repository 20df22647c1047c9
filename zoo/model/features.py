"""Features as timm hands them out, of a model whose tokens are merged and dropped on the way.

The sizes of merged tokens travel with the tensor of features itself, so that `forward_head` can
weigh them: an average over tokens is one over patches only if each counts for the patches in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reduction.functional.restoring import Change, check_policy, restored
from reduction.mixins.answer import OwnAnswer
from reduction.tokens import NO_MEMORY, Tokens
from zoo.errors import ZooError
from zoo.model.stream import Outflow, flow, own_answer
from zoo.model.timm_api import take_indices
from zoo.plugins.base import Plugin

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT

#: The attribute of a tensor of features: plain tensors and numbers, so that `torch.save` takes it.
_NAME = "tokens"
_KEPT = ("size", "unit", "policy", "mask")
FORMATS = ("NCHW", "NLC")


def features(model: ReducedViT, out: Outflow) -> Tensor:
    """Tokens after the final norm, `(B, P+M, C)`, with what a head needs to know of them.

    Args:
        model: Whose.
        out: What came out behind its last block.
    """
    t = out.t
    x: Tensor = model.tower.norm(model.backbone, t.x)
    answers = bool(_who_answers(model))
    if not (answers or _weighs(model)):
        return x
    about: dict[str, Any] = {name: getattr(t, name) for name in _KEPT}
    if answers:
        about |= {"x": t.x, "memory": dict(t.memory), "memories": list(out.memories)}
    x = x.view_as(x) if x is t.x else x  # or it would hold on to itself
    return knowing(x, about)


def knowing(x: Tensor, about: dict[str, Any] | None) -> Tensor:
    """Features, which from now on know something about their tokens.

    Args:
        x: Features, which are changed.
        about: Plain tensors and numbers by name.
    """
    setattr(x, _NAME, about)
    return x


def known(x: Tensor) -> dict[str, Any] | None:
    """What features know about their tokens, None where they know nothing."""
    return getattr(x, _NAME, None)


def classify(
    model: ReducedViT, x: Tensor, pre_logits: bool = False, sizes: Tensor | None = None
) -> Tensor:
    """The head on features.

    Args:
        model: Whose.
        x: From `features`, `(B, P+M, C)`.
        pre_logits: Stop before the classifier.
        sizes: Patches in each token, `(B, P+M)`, where `x` does not bring them along.

    Raises:
        ZooError: If the answer would not be the model's own.
    """
    about = known(x)
    if who := _who_answers(model):
        if about is None:
            raise ZooError(
                f"{who} answers in place of the backbone's head, from more than these features; "
                "hand on the tensor that forward_features returned, or call model(images)"
            )
        t = _tokens(model, about["x"], about, about["memory"])
        own = own_answer(model, t, about["memories"])
        if own is not None and pre_logits:
            raise ZooError(
                f"{who} answers in place of the backbone's head and has no features before its "
                "classifier; call model(images) for logits"
            )
        if own is not None:
            return own
    if not _weighs(model):
        return model.tower.classify(model.backbone, x, pre_logits)
    if sizes is not None:
        about = {"size": sizes, "unit": False, "policy": None, "mask": None}
    if about is None:
        raise ZooError(
            "these features do not say how many patches each token stands for, which this head "
            "weighs them by; hand on the tensor that forward_features returned, unchanged, give "
            "sizes=info.size of model(images, return_info=True), or call model(images)"
        )
    return model.tower.leave(model.backbone, _tokens(model, x, about), pre_logits)


def intermediates(
    model: ReducedViT,
    images: Tensor,
    indices: int | Sequence[int] | None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    restore: str = "merged",
) -> Any:
    """See `ReducedViT.forward_intermediates`."""
    check_policy(restore)
    if output_fmt not in FORMATS:
        raise ZooError(f"output_fmt must be one of {', '.join(FORMATS)}, got {output_fmt!r}")
    taken, last = take_indices(model.depth, indices)
    changes: list[tuple[int, Change]] = []

    def note(block: int, before: Tokens, behind: Tokens) -> None:
        changes.append((block, (before, behind)))

    out = flow(
        model,
        images,
        track=True,
        trace=taken,
        until=last if stop_early else None,
        note=note if restore == "knn" else None,
    )
    states = out.info.trace
    if norm:
        states = tuple(t._replace(x=model.tower.norm_maps(model.backbone, t.x)) for t in states)
    maps: list[Any] = [
        restored(t, out.info.grid, restore, [c for block, c in changes if block <= i])
        for i, t in zip(sorted(set(taken)), states, strict=True)
    ]
    if output_fmt == "NCHW":
        maps = [x.transpose(1, 2).unflatten(2, out.info.grid).contiguous() for x in maps]
    heads = [t.x[:, : t.prefix] for t in states] if return_prefix_tokens and model.prefix else None
    if output_dict:
        found: dict[str, Any] = {"image_intermediates": maps}
        found |= {} if heads is None else {"image_intermediates_prefix": heads}
        return found if intermediates_only else {**found, "image_features": features(model, out)}
    if heads is not None:
        maps = list(zip(maps, heads, strict=True))
    return maps if intermediates_only else (features(model, out), maps)


def _weighs(model: ReducedViT) -> bool:
    """Whether the head has to know how many patches each token stands for."""
    return model.reducer is not None and model.tower.weighs(model.backbone)


def _who_answers(model: ReducedViT) -> str:
    """Who may answer instead of the backbone's head, in words; empty if nobody does."""
    for plugin in model.plugins:
        if type(plugin).head is not Plugin.head:
            return f"plugin {plugin.name!r}"
    reducer = model.reducer
    if isinstance(reducer, OwnAnswer) and type(reducer).logits is not OwnAnswer.logits:
        # From the class token all of them leave it to the backbone.
        if model.tower.reads(model.backbone) != "class":
            return f"reducer {reducer.name!r}"
    return ""


def _tokens(
    model: ReducedViT, x: Tensor, about: dict[str, Any], memory: Mapping[str, Tensor] = NO_MEMORY
) -> Tokens:
    kept = {name: about[name] for name in _KEPT}
    return Tokens(x, prefix=model.prefix, memory=memory, **kept)

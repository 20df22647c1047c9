"""Options of how a model runs that change its speed and not its answers.

They belong to the machine and the moment, not to the model: they are in no recipe, no state dict
and no saved folder, and are given anew to `zoo.load`, `zoo.wrap` and `zoo.create_model`, or to
`ReducedViT.set_runtime` at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

from reduction.base import Reducer
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.attention import InAttention
from reduction.mixins.parking import Parks
from zoo.adapters.backbones import has_class_token, pools
from zoo.adapters.fast_linear import MODES, Mode
from zoo.adapters.standalone import as_standalone
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT

LAST_BLOCKS = ("full", "class_token")


class Runtime(NamedTuple):
    """How a model runs.

    Attributes:
        last_block: "full", or "class_token": in evaluation mode the last block computes queries,
            projection and MLP for the prefix tokens only, and merges or prunes nothing that only
            the head could have seen. Exact, because a class-token head reads nothing else. Calls
            that want all tokens (`return_info`, features, feature maps) run the block in full.
        fast_linear: "off", "on", or "auto": linear layers by another matrix product than torch's
            default where a measurement on this machine says that it is faster. Equal to rounding.
        own_kernels: Use this package's choice of attention kernels also where nothing has been
            reduced yet. A dense model then runs as the reduced parts of others do, for fair
            comparisons; without it, the output with nothing reduced is exactly timm's.
    """

    last_block: str = "full"
    fast_linear: Mode = "off"
    own_kernels: bool = False


def make_runtime(model: ReducedViT, changes: Mapping[str, Any]) -> Runtime:
    """A model's options with some of them changed.

    Args:
        model: Its `runtime` holds the others.
        changes: Fields of `Runtime`.

    Raises:
        ZooError: If one is unknown, or invalid for this model.
    """
    for name in changes:
        if name not in Runtime._fields:
            raise ZooError(
                f"unknown runtime option {name!r}; there are {', '.join(Runtime._fields)}"
            )
    chosen = model.runtime._replace(**changes)
    # YAML and command lines turn the bare words into Booleans.
    words: dict[Any, Mode] = {True: "on", False: "off"}
    chosen = chosen._replace(fast_linear=words.get(chosen.fast_linear, chosen.fast_linear))
    if chosen.last_block not in LAST_BLOCKS:
        raise ZooError(
            f"last_block must be one of {', '.join(LAST_BLOCKS)}, got {chosen.last_block!r}"
        )
    if chosen.fast_linear not in MODES:
        raise ZooError(f"fast_linear must be one of {', '.join(MODES)}, got {chosen.fast_linear!r}")
    if not isinstance(chosen.own_kernels, bool):
        raise ZooError(f"own_kernels must be true or false, got {chosen.own_kernels!r}")
    if chosen.last_block == "class_token":
        reason = why_all_tokens(model)
        if reason:
            raise ZooError(f"last_block=class_token is not possible here: {reason}")
    return chosen


def why_all_tokens(model: ReducedViT) -> str:
    """Who needs more of the last block than its prefix tokens; empty if nobody does."""
    m, reducer = model.backbone, model.reducer
    if as_standalone(m) is not None:
        return "the backbone runs itself"
    forward_head = getattr(type(m), "forward_head", None)
    heads = (VisionTransformer, VisionTransformerDistilled, Eva)
    known = forward_head in [cls.forward_head for cls in heads]
    if not (known and has_class_token(m) and getattr(m, "global_pool", "") == "token"):
        what = "averages over patches" if pools(m) == "patches" else "is not a plain one"
        return f"the classifier does not read the class token alone (it {what})"
    if getattr(m, "attn_pool", None) is not None:
        return "the classifier attends to all tokens"
    blocks = [cls.forward for cls in (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm)]
    if type(m.blocks[-1]).forward not in blocks:
        return f"the last block is a {type(m.blocks[-1]).__name__}"
    if len(model.plugins):
        names = ", ".join(p.name for p in model.plugins)
        return f"a plugin ({names}) looks at tokens behind the last block"
    if reducer is not None and _reads_the_end(reducer):
        return f"reducer {reducer.name!r} needs all tokens of the last block"
    return ""


def _reads_the_end(reducer: Reducer) -> bool:
    """Whether what happens in the last block to other tokens than the prefix reaches the logits."""
    if isinstance(reducer, OwnAnswer):
        return reducer.reads_last_block
    return isinstance(reducer, InAttention) or (
        isinstance(reducer, Parks) and reducer.parks != "no"
    )

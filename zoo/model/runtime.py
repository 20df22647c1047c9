"""Options of how a model runs that change its speed and not its answers.

They belong to the machine and the moment, not to the model: they are in no recipe, no state dict
and no saved folder, and are given anew to `zoo.load`, `zoo.wrap` and `zoo.create_model`, or to
`ReducedViT.set_runtime` at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from reduction.base import Reducer
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.attention import InAttention
from reduction.mixins.parking import Parks
from zoo.adapters.blocks import block_adapter
from zoo.adapters.fast_linear import FORMER, MODES, Mode
from zoo.errors import ZooError
from zoo.model.anatomy import Anatomy

LAST_BLOCKS = ("full", "class_token")
#: Values of the option, and how many groups each of them allows.
BUCKETS: Mapping[int | str, int] = {1: 1, 2: 2, 3: 3, 4: 4, "auto": 4}


class Runtime(NamedTuple):
    """How a model runs.

    Attributes:
        last_block: "full", or "class_token": in evaluation mode the last block computes queries,
            projection and MLP for the prefix tokens only, and merges or prunes nothing that only
            the head could have seen. Exact, because a class-token head reads nothing else. Calls
            that want all tokens (`return_info`, features, feature maps) run the block in full.
        linear: "plain", torch's default; "packed" or "onednn", other matrix products of this CPU;
            or "auto", whichever a measurement on this machine says is fastest. Equal to rounding.
            "packed" keeps a second copy of the weights of linear layers, without gradients alone.
        buckets: Groups of images of similar length that a batch may be run in, 1 to 4, where a
            method keeps a different number of tokens in every image: none of them is padded to the
            longest of the batch then. "auto" allows four. As many as pay by what rows cost; in
            evaluation on a CPU alone. Equal to rounding.
        own_kernels: Use this package's choice of attention kernels also where nothing has been
            reduced yet. A dense model then runs as the reduced parts of others do, for fair
            comparisons; without it, the output with nothing reduced is exactly timm's.
    """

    last_block: str = "full"
    linear: Mode = "plain"
    own_kernels: bool = False
    buckets: int | str = "auto"


def make_runtime(anatomy: Anatomy, now: Runtime, changes: Mapping[str, Any]) -> Runtime:
    """A model's options with some of them changed.

    Args:
        anatomy: Of the model.
        now: Its options so far.
        changes: Fields of `Runtime`.

    Raises:
        ZooError: If one is unknown, or invalid for this model.
    """
    changes = dict(changes)
    if "fast_linear" in changes:  # what `linear` was called
        changes.setdefault("linear", former(changes.pop("fast_linear")))
    for name in changes:
        if name not in Runtime._fields:
            raise ZooError(
                f"unknown runtime option {name!r}; there are {', '.join(Runtime._fields)}"
            )
    chosen = now._replace(**changes)
    if chosen.last_block not in LAST_BLOCKS:
        raise ZooError(
            f"last_block must be one of {', '.join(LAST_BLOCKS)}, got {chosen.last_block!r}"
        )
    if isinstance(chosen.buckets, bool) or chosen.buckets not in tuple(BUCKETS):
        raise ZooError(
            f"buckets must be one of {', '.join(map(str, BUCKETS))}, got {chosen.buckets!r}"
        )
    if chosen.linear not in MODES:
        raise ZooError(f"linear must be one of {', '.join(MODES)}, got {chosen.linear!r}")
    if not isinstance(chosen.own_kernels, bool):
        raise ZooError(f"own_kernels must be true or false, got {chosen.own_kernels!r}")
    if chosen.last_block == "class_token":
        reason = why_all_tokens(anatomy)
        if reason:
            raise ZooError(f"last_block=class_token is not possible here: {reason}")
    return chosen


def former(fast_linear: object) -> Mode:
    """What `fast_linear`, as the option was called, means by `linear`.

    Raises:
        ZooError: If it means nothing.
    """
    if fast_linear == "auto":
        return "auto"
    if isinstance(fast_linear, str | bool) and fast_linear in FORMER:
        return FORMER[fast_linear]
    raise ZooError(f"fast_linear must be one of off, auto, on, got {fast_linear!r}")


def why_all_tokens(anatomy: Anatomy) -> str:
    """Who needs more of the last block than its prefix tokens; empty if nobody does."""
    m, reducer = anatomy.backbone, anatomy.reducer
    if anatomy.alone is not None:
        return "the backbone runs itself"
    if reason := anatomy.tower.why_all_tokens(m):
        return reason
    last = anatomy.tower.blocks(m)[-1]
    if block_adapter(last).mlp_branch is None:
        return f"the last block is a {type(last).__name__}"
    if len(anatomy.plugins):
        names = ", ".join(p.name for p in anatomy.plugins)
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

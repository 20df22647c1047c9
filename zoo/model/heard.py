"""Who waits in vain: hooks on modules that are never called, and a `forward` that never runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from zoo.adapters.blocks import block_adapter
from zoo.adapters.hooks import awaited

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT

_TOLD: WeakSet[nn.Module] = WeakSet()
# Names are the same in every forward pass, and looking for them costs as much as a small block.
_ABOVE: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


def warn_unheard(model: ReducedViT) -> None:
    """Say once per model which hooks and replaced `forward`s the wrapper passes by.

    Blocks, attentions and everything inside them are heard, see `zoo.adapters.hooks`.

    Args:
        model: About to run block by block.
    """
    backbone, blocks = model.backbone, model.tower.blocks(model.backbone)
    own = {"backbone": backbone, "reducer": model.reducer}
    own |= _around(backbone, blocks)
    own |= {f"plugins[{i}]": plugin for i, plugin in enumerate(model.plugins)}
    if "forward" in vars(backbone):  # attached: the backbone is called itself
        del own["backbone"]
    for name, module in own.items():
        if module is not None and awaited(module):
            _warn(model, f"the hooks on {name} are not called: the wrapper runs its parts")
    for i, block in enumerate(blocks):
        for part in block_adapter(block).unheard(block):
            if awaited(part):
                kind = type(part).__name__
                _warn(model, f"the hooks on a {kind} of block {i} may not be called")
        if "forward" in vars(block) or "forward" in vars(block_adapter(block).attn(block)):
            _warn(model, f"the forward that was put into block {i} may not be called")


def _around(backbone: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Parts of a backbone that hold its blocks, by name: the wrapper runs what is in them."""
    if backbone not in _ABOVE:
        inside = {id(block) for block in blocks}
        steps = [n.split(".") for n, part in backbone.named_modules() if id(part) in inside]
        above = {".".join(parts[:n]) for parts in steps for n in range(1, len(parts))}
        _ABOVE[backbone] = {f"backbone.{n}": backbone.get_submodule(n) for n in sorted(above)}
    found = _ABOVE[backbone].items()
    return {name: part for name, part in found if "forward" not in vars(part)}


def _warn(model: ReducedViT, what: str) -> None:
    if model not in _TOLD:
        _TOLD.add(model)
        warnings.warn(
            f"{what}. Hook the model, a block or an attention instead; tokens behind every block "
            'are in model(images, return_info="trace"), attention in zoo.attention_maps(model, '
            "images)",
            stacklevel=2,
        )

"""The two halves of transformer blocks, so that tokens can change in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from zoo.adapters.attention import projection
from zoo.adapters.families import load_families
from zoo.errors import UnsupportedModel

#: Runs an attention module on its normalised input; returns the output and anything else.
Attend = Callable[[nn.Module, Tensor], tuple[Tensor, Any]]


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """What enters an MLP, some of it blank."""
    return x if mask is None else x * mask


def _as_timm(block: Callable[..., Tensor], x: Tensor, extra: dict[str, Any]) -> Tensor:
    return block(x, **extra)


class BlockAdapter(NamedTuple):
    """How to run one block class.

    Attributes:
        attn_branch: `(block, x, attend) -> (y, seen)`: what the attention adds to the residual
            stream, and whatever `attend` saw.
        mlp_half: `(block, x) -> x`, the rest of the block.
        rope: Whether the block's own `forward` takes a rotary table.
        linear_macs: `(block, tokens, prefix) -> int`: multiply-accumulates of `mlp_half` for so
            many tokens, prefix included; None counts the linear layers of `mlp`.
        attn_input: `(block, x) -> x`: what the attention gets of the residual stream.
        mlp_branch: `(block, x) -> f`: what `mlp_half` adds to the residual stream through
            `block.drop_path2`, layer scale included; None where it adds no one thing.
        mlp_masked: `(block, x, mask) -> f`: as `mlp_branch`, what enters the MLP itself `masked`;
            None where it has no one input.
        attn: `block -> module`: the attention.
        mlp: `block -> module`: where the linear layers of the MLP are.
        mlp_drop: `block -> module`: what the branch goes through on its way into the stream, or
            None.
        masks: Whether the block's own `forward` takes a size bias `(B, 1, 1, N)` as `attn_mask`.
        call: `(block, x, extra) -> x`: how its library calls the block, or its `forward`; what is
            extra has timm's names, `rope` and `attn_mask`.
        inside: Whether tokens may leave inside the attention. Not where the MLP reads the same
            tokens: what happens between the two then happens behind both.
        unheard: `block -> modules`: those whose work is done without calling them.
    """

    attn_branch: Callable[[Any, Tensor, Attend], tuple[Tensor, Any]]
    mlp_half: Callable[[Any, Tensor], Tensor]
    rope: bool
    linear_macs: Callable[[Any, int, int], int] | None = None
    attn_input: Callable[[Any, Tensor], Tensor] = lambda block, x: block.norm1(x)
    mlp_branch: Callable[[Any, Tensor], Tensor] | None = None
    mlp_masked: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    attn: Callable[[Any], Any] = lambda block: block.attn
    mlp: Callable[[Any], nn.Module] = lambda block: block.mlp
    mlp_drop: Callable[[Any], nn.Module | None] = lambda block: block.drop_path2
    masks: bool = True
    call: Callable[[Callable[..., Tensor], Tensor, dict[str, Any]], Tensor] = _as_timm
    inside: bool = True
    unheard: Callable[[Any], Sequence[nn.Module]] = lambda block: ()


_BLOCKS: dict[object, BlockAdapter] = {}


def register_block(cls: type[nn.Module], adapter: BlockAdapter) -> None:
    """Support a block class. Subclasses that override `forward` are not covered."""
    _BLOCKS[cls.forward] = adapter


def supported_forwards() -> dict[object, str]:
    """The `forward` of every supported block class, with the name of the class."""
    return {
        forward: str(getattr(forward, "__qualname__", "?")).split(".")[0] for forward in _BLOCKS
    }


def block_adapter(block: nn.Module) -> BlockAdapter:
    """Adapter of a block, after checking that its attention is supported too.

    Raises:
        UnsupportedModel: If one of the two classes is not.
    """
    adapter = _BLOCKS.get(type(block).forward)
    if adapter is None:
        load_families(type(block))
        adapter = _BLOCKS.get(type(block).forward)
    if adapter is None:
        raise UnsupportedModel(
            f"block class {type(block).__name__} is not supported; supported are Block, "
            "ResPostBlock, EvaBlock and EvaBlockPostNorm of timm, EncoderBlock of torchvision, and "
            "ResidualAttentionBlock and CustomResidualAttentionBlock of open_clip"
        )
    projection(adapter.attn(block))
    return adapter

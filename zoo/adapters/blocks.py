"""The two halves of timm's transformer blocks, so that tokens can change in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from zoo.adapters.attention import projection, through
from zoo.errors import UnsupportedModel

#: Runs an attention module on its normalised input; returns the output and anything else.
Attend = Callable[[nn.Module, Tensor], tuple[Tensor, Any]]


class BlockAdapter(NamedTuple):
    """How to run one block class.

    Attributes:
        attn_branch: `(block, x, attend) -> (y, seen)`: what the attention adds to the residual
            stream, and whatever `attend` saw.
        mlp_half: `(block, x) -> x`, the rest of the block.
        rope: Whether the block's own `forward` takes a rotary table.
        linear_macs: `(block, tokens, prefix) -> int`: multiply-accumulates of `mlp_half` for so
            many tokens, prefix included; None counts the linear layers of `block.mlp`.
        attn_input: `(block, x) -> x`: what the attention gets of the residual stream.
    """

    attn_branch: Callable[[nn.Module, Tensor, Attend], tuple[Tensor, Any]]
    mlp_half: Callable[[nn.Module, Tensor], Tensor]
    rope: bool
    linear_macs: Callable[[nn.Module, int, int], int] | None = None
    attn_input: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block.norm1(x)


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
        raise UnsupportedModel(
            f"block class {type(block).__name__} is not supported; supported are Block, "
            "ResPostBlock, EvaBlock and EvaBlockPostNorm of timm"
        )
    projection(block.attn)
    return adapter


def _itself(b: nn.Module, x: Tensor) -> Tensor:
    return x


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody waits for one of these modules to be called."""
    return bool(torch.nn.modules.module._global_forward_hooks) or any(
        m._forward_hooks or m._forward_pre_hooks for m in modules
    )


def _block_attn(b: nn.Module, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.attn, b.norm1(x))
    return through(b.drop_path1, through(b.ls1, out)), signals


def _block_mlp(b: nn.Module, x: Tensor) -> Tensor:
    return x + through(b.drop_path2, through(b.ls2, b.mlp(b.norm2(x))))


def _post_attn(b: nn.Module, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.attn, x)
    return through(b.drop_path1, b.norm1(out)), signals


def _post_mlp(b: nn.Module, x: Tensor) -> Tensor:
    return x + through(b.drop_path2, b.norm2(b.mlp(x)))


def _eva_attn(b: nn.Module, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, signals = attend(b.attn, b.norm1(x))
    if b.gamma_1 is not None:
        out = b.gamma_1 * out
    return through(b.drop_path1, out), signals


def _eva_mlp(b: nn.Module, x: Tensor) -> Tensor:
    out = b.mlp(b.norm2(x))
    if b.gamma_2 is not None:
        out = b.gamma_2 * out
    return x + through(b.drop_path2, out)


register_block(Block, BlockAdapter(_block_attn, _block_mlp, rope=False))
register_block(ResPostBlock, BlockAdapter(_post_attn, _post_mlp, rope=False, attn_input=_itself))
register_block(EvaBlock, BlockAdapter(_eva_attn, _eva_mlp, rope=True))
register_block(EvaBlockPostNorm, BlockAdapter(_post_attn, _post_mlp, rope=True, attn_input=_itself))

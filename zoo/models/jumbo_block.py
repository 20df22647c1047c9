"""Jumbo's block: the wide token passes through attention as J tokens and its MLP as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reduction.tokens import take_rows
from zoo.adapters.blocks import Attend, BlockAdapter, register_block
from zoo.errors import ZooError

MLP_KINDS = ("shared", "unshared", "none")
POOLS = ("jumbo", "")


def placed(device: Any, dtype: Any) -> dict[str, Any]:
    """Arguments of timm's layers for weights somewhere else; those of timm 1.0.20 take none."""
    given = {"device": device, "dtype": dtype}
    return {name: value for name, value in given.items() if value is not None}


class LowRank(nn.Module):
    """A low-rank linear map, zero at the start: `up(down(x))`.

    Args:
        width_in: Input width.
        width_out: Output width.
        rank: Width in between.
        device: Of the weights.
        dtype: Of the weights.
    """

    def __init__(
        self, width_in: int, width_out: int, rank: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, width_out, bias=False, device=device, dtype=dtype)
        self.init_weights()

    def init_weights(self) -> None:
        """Zero the second factor; timm calls this after initialising both as linear layers."""
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., width_in)` to `(..., width_out)`."""
        return self.up(self.down(x))


class PatchDrop(nn.Module):
    """Drop random patches while training, an own choice for each image.

    `int(rate * N)` patches leave, as in the first release of the official code; the others come
    out in random order. Prefix tokens stay. `rate` may be changed between steps.

    Args:
        rate: Share of the patches to drop, in [0, 1).
        prefix: Number of prefix tokens.
    """

    def __init__(self, rate: float, prefix: int) -> None:
        super().__init__()
        self.rate = rate
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        """Drop tokens of `(B, P+N, C)`."""
        patches = x[:, self.prefix :]
        batch, n, _ = patches.shape
        drop = int(self.rate * n) if self.training else 0
        if not drop:
            return x
        rest = torch.rand(batch, n, device=x.device).argsort(dim=1)[:, drop:]
        return torch.cat([x[:, : self.prefix], take_rows(patches, rest)], dim=1)

    def extra_repr(self) -> str:
        """Return the rate, for printing."""
        return f"rate={self.rate}"


class JumboBlock(Block):
    """Attention over J + N tokens, then one MLP for the wide token and one for the patches.

    With `w` the J wide slots laid end to end, `(B, J*C)`, and `p` the patches `(B, N, C)`:

        x = x + Attention(LN1(x))       w = w + JumboMLP(LN3(w))       p = p + MLP(LN2(p))

    Args:
        dim: Width C.
        num_heads: Attention heads.
        jumbo_tokens: J.
        shared_mlp: The MLP `J*C -> J*C` that all blocks share. It belongs to the model.
        own_mlp: Builds an MLP of this block's own instead. With neither, the wide token changes
            in attention only.
        lora_rank: Rank of this block's own addition to the shared MLP; 0 is none.
        drop_path: Rate of each of the three drop paths.
        norm_layer: Layer norm, of width C for tokens and J*C for the wide token.
        device: Of the weights.
        dtype: Of the weights.
        **kwargs: More arguments of timm's Block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        jumbo_tokens: int,
        shared_mlp: Mlp | None = None,
        own_mlp: Callable[[], Mlp] | None = None,
        lora_rank: int = 0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = placed(device, dtype)
        norm: Any = norm_layer  # timm says a type and takes a partial
        super().__init__(dim, num_heads, drop_path=drop_path, norm_layer=norm, **dd, **kwargs)
        self.jumbo_tokens = jumbo_tokens
        # A tuple keeps the shared module out of this block's own parameters and state dict, while
        # copying and pickling the model still find that it is one and the same.
        self._shared = (shared_mlp,)
        self.jumbo_mlp = None if own_mlp is None else own_mlp()
        mlp = self.wide_mlp
        if mlp is not None:
            self.norm3 = norm_layer(jumbo_tokens * dim, **dd)
            self.drop_path3 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.jumbo_lora = None
        if lora_rank and mlp is not None:
            fc1: Any = mlp.fc1
            wide, hidden = fc1.in_features, fc1.out_features
            self.jumbo_lora = nn.ModuleDict(
                {
                    "fc1": LowRank(wide, hidden, lora_rank, **dd),
                    "fc2": LowRank(hidden, wide, lora_rank, **dd),
                }
            )

    @property
    def wide_mlp(self) -> Mlp | None:
        """The MLP of the wide token: this block's own, the shared one, or none."""
        return self._shared[0] if self.jumbo_mlp is None else self.jumbo_mlp

    def forward(  # type: ignore[override]  # timm added is_causal later
        self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the block on `(B, J+N, C)`, wide slots first."""
        x = x + self.drop_path1(self.attn(self.norm1(x), attn_mask=attn_mask, **kwargs))
        return self.mlp_half(x)

    def mlp_half(self, x: Tensor) -> Tensor:
        """Everything after the attention."""
        slots, patches = x[:, : self.jumbo_tokens], x[:, self.jumbo_tokens :]
        patches = patches + self.drop_path2(self.mlp(self.norm2(patches)))
        if self.wide_mlp is not None:
            wide = slots.flatten(1)
            wide = wide + self.drop_path3(self._wide(self.norm3(wide)))
            slots = wide.view(slots.shape)
        return torch.cat([slots, patches], dim=1)

    def _wide(self, x: Tensor) -> Tensor:
        mlp = self.wide_mlp
        assert mlp is not None
        if self.jumbo_lora is None:
            return mlp(x)
        hidden = mlp.act(mlp.fc1(x) + self.jumbo_lora["fc1"](x))
        return mlp.fc2(hidden) + self.jumbo_lora["fc2"](hidden)

    def linear_macs(self, tokens: int, prefix: int) -> int:
        """Multiply-accumulates of `mlp_half` for so many tokens, wide slots included."""
        wide = [m for m in (self.wide_mlp, self.jumbo_lora) if m is not None]
        return _weights(self.mlp) * (tokens - prefix) + sum(_weights(m) for m in wide)


def _weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _attn_branch(b: Any, x: Tensor, attend: Attend) -> tuple[Tensor, Any]:
    out, seen = attend(b.attn, b.norm1(x))
    return b.drop_path1(out), seen


register_block(
    JumboBlock,
    BlockAdapter(_attn_branch, JumboBlock.mlp_half, rope=False, linear_macs=JumboBlock.linear_macs),
)


def check_options(slots: int, jumbo_mlp: str, lora: int, pool: str, classes: int) -> None:
    """Refuse arguments of a Jumbo that are out of range.

    Raises:
        ZooError: Saying what was expected.
    """
    if slots < 1:
        raise ZooError(f"jumbo_tokens must be 1 or more, got {slots}")
    if jumbo_mlp not in MLP_KINDS:
        raise ZooError(f"jumbo_mlp must be one of {MLP_KINDS}, got {jumbo_mlp!r}")
    if lora < 0 or (lora and jumbo_mlp != "shared"):
        raise ZooError(
            f"jumbo_lora is the rank of an addition to a shared MLP (0: none), got {lora} with "
            f"jumbo_mlp={jumbo_mlp!r}"
        )
    check_pool(pool, classes)


def check_pool(pool: str, classes: int) -> None:
    """Refuse an unknown pooling, or a head without pooling.

    Raises:
        ZooError: Saying what was expected.
    """
    if pool not in POOLS:
        raise ZooError(
            f"a Jumbo pools with global_pool='jumbo', or not at all with '', got {pool!r}"
        )
    if classes and not pool:
        raise ZooError(f"a head of {classes} classes needs global_pool='jumbo', got ''")

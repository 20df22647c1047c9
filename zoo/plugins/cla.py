"""Heads that read the class token of several layers: CLA, and the older IFA.

Shapes: B batch, C width, G layers that are read, K classes, m the multiplier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reduction.schedules.base import Schedule
from reduction.tokens import Tokens
from zoo.adapters.tower import class_tokens, tower_of
from zoo.errors import ZooError
from zoo.plugins.base import Plugin, register_plugin
from zoo.plugins.stages import CLCA_CARD, stage_blocks

#: Parts of a timm model that come after its blocks, which these heads do without.


class LayerConvHead(nn.Module):
    """CLA's classifier: `PW(GELU(BN(DW(BN(x)))))`.

    The depth-wise convolution spans all G layers, so it leaves one position.

    Args:
        width: C.
        layers: G.
        classes: K.
        multiplier: m, features per channel after the depth-wise convolution.
    """

    def __init__(self, width: int, layers: int, classes: int, multiplier: int) -> None:
        super().__init__()
        inner = multiplier * width
        self.norm1 = nn.BatchNorm1d(width)
        self.dwconv = nn.Conv1d(width, inner, layers, stride=layers, groups=width)
        self.norm2 = nn.BatchNorm1d(inner)
        self.act = nn.GELU()
        self.pwconv = nn.Conv1d(inner, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify `(B, C, G)`.

        Raises:
            ZooError: If a batch of one image comes in training mode.
        """
        if self.training and x.shape[0] == 1:
            raise ZooError(
                "the batch norm of plugin 'cla' needs two images or more in training, got a batch "
                "of one; choose a data.batch_size that does not leave one image over"
            )
        x = self.act(self.norm2(self.dwconv(self.norm1(x))))
        return self.pwconv(x).squeeze(-1)

    def macs(self) -> int:
        """Multiply-accumulates for one image: both convolutions have one output position."""
        return self.dwconv.weight.numel() + self.pwconv.weight.numel()


class LayerMixHead(nn.Module):
    """IFA's classifier: one weight per layer, ReLU, layer norm, linear.

    Args:
        width: C.
        layers: G.
        classes: K.
    """

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.mix = nn.Linear(layers, 1)
        self.act = nn.ReLU()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify `(B, C, G)`."""
        return self.fc(self.norm(self.act(self.mix(x).squeeze(-1))))

    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        width = self.fc.in_features
        return self.mix.in_features * width + self.fc.weight.numel()


@register_plugin("cla")
class CLA(Plugin):
    """Cross-Layer Aggregation: classify from the class tokens of several layers.

    The class token is read after each reduction block and after the last block, without the final
    norm. The backbone's final norm and classifier are not used. Where several slots are one wide
    class token (Jumbo), the head is as wide as they are together (ours).

    Args:
        multiplier: m of the depth-wise convolution. 0 builds the older head of plugin `ifa`.
        blocks: Reduction blocks, from 0. None: those of the schedule, see `stage_blocks`.

    Raises:
        ZooError: If an argument is out of range, or (when attached) the model has no class token.

    References:
        Rios et al., ICASSP 2025, arXiv 2501.00243; official code github.com/arkel23/CLCA (MIT).
    """

    card = CLCA_CARD
    page = "clca"
    replaces_head: ClassVar[bool] = True

    def __init__(self, multiplier: int = 2, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        if isinstance(multiplier, bool) or not isinstance(multiplier, int) or multiplier < 0:
            raise ZooError(f"multiplier must be a whole number from 0, got {multiplier!r}")
        self.multiplier = multiplier
        self.blocks = None if blocks is None else list(blocks)
        self.layers: tuple[int, ...] = ()
        self.class_tokens = 1
        self.net: LayerConvHead | LayerMixHead | None = None

    def setup(self, backbone: Any, schedule: Schedule | None = None) -> None:
        """Choose the layers and create the head."""
        if not class_tokens(backbone):
            raise ZooError(
                f"plugin {self.name!r} classifies by class tokens, which this model does not have; "
                "plugin 'clc' (the cache alone) works without"
            )
        self.blocks = stage_blocks(self.name, self.blocks, schedule, backbone)
        tower = tower_of(backbone)
        self.layers = (*self.blocks, len(tower.blocks(backbone)) - 1)
        self.class_tokens = class_tokens(backbone)
        width = self.class_tokens * tower.width(backbone)
        shape = width, len(self.layers), tower.classes(backbone)
        if self.net is None or self._shape() != shape:
            like = next(backbone.parameters())
            self.net = self._build(*shape).to(like.device, like.dtype)

    def _build(self, width: int, layers: int, classes: int) -> LayerConvHead | LayerMixHead:
        if classes < 1:
            raise ZooError(f"plugin {self.name!r} is a classifier, but the model has no classes")
        if self.multiplier == 0:
            return LayerMixHead(width, layers, classes)
        return LayerConvHead(width, layers, classes, self.multiplier)

    def _shape(self) -> tuple[int, int, int]:
        if isinstance(self.net, LayerMixHead):
            return self.net.fc.in_features, self.net.mix.in_features, self.net.fc.out_features
        assert isinstance(self.net, LayerConvHead)
        conv, last = self.net.dwconv, self.net.pwconv
        return conv.in_channels, conv.kernel_size[0], last.out_channels

    def reset_classifier(self, num_classes: int) -> None:
        """Start over with another number of classes."""
        width, layers, _ = self._shape()
        like = next(self.parameters())
        self.net = self._build(width, layers, num_classes).to(like.device, like.dtype)

    def after(self, block: int, t: Tokens, memory: Any) -> tuple[Tokens, Any]:
        """Keep the class token of a layer that is read."""
        if block not in self.layers:
            return t, memory
        return t, (*memory, t.x[:, : self.class_tokens].flatten(1))

    def head(self, backbone: Any, t: Tokens, memory: Any) -> Tensor:
        """Classify from the kept class tokens, in ascending order of layers."""
        assert self.net is not None
        return self.net(torch.stack(memory, dim=-1))

    def macs(self, backbone: Any) -> int:
        """Multiply-accumulates of the head for one image."""
        assert self.net is not None
        return self.net.macs()

    def unused(self, backbone: Any) -> set[str]:
        """The backbone's final norm, pooling and classifier."""
        behind = tower_of(backbone).after_blocks(backbone)
        return {n for n, _ in backbone.named_parameters() if n.startswith(behind)}


@register_plugin("ifa")
class IFA(CLA):
    """The head that came before CLA: one weight per layer, ReLU, norm, linear.

    An ablation in the official code (its depth multiplier 0), not part of the method.

    Args:
        blocks: As in `CLA`.

    References:
        Official code github.com/arkel23/CLCA (MIT).
    """

    def __init__(self, blocks: Sequence[int] | None = None) -> None:
        super().__init__(multiplier=0, blocks=blocks)

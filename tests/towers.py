"""What must hold for a tower of any library, with tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.adapters.attention import attend
from zoo.adapters.blocks import block_adapter
from zoo.model.stream import flow, leave


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model with random numbers everywhere, so that no part of it is without effect."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def flat(answer: Any) -> Tensor:
    """All numbers of an answer in one row."""
    if isinstance(answer, Tensor):
        return answer.flatten()
    return torch.cat([flat(part) for part in answer])


def gaps(model: nn.Module, images: Tensor) -> Iterator[float]:
    """Largest differences between a model and its wrapper with nothing reduced.

    In training and evaluation, with gradients and without; the wrapper as it is called, and going
    through all of its stages.
    """
    for train in (True, False):
        wrapped = zoo.wrap(model, None).train(train)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                answers = []
                for run in (model, wrapped, lambda x, w=wrapped: leave(w, flow(w, x))):
                    torch.manual_seed(1)  # for dropout
                    answers.append(flat(run(images)))
            yield from ((answers[0] - other).abs().max().item() for other in answers[1:])


def block_gap(block: Any, x: Tensor) -> float:
    """Largest difference between a block and its two halves with all signals collected.

    With gradients, where torch's attention has no kernel of its own.
    """
    adapter = block_adapter(block)
    need = frozenset({"k", "v", "x_norm", "cls_row", "column"})
    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    branch, _ = adapter.attn_branch(block, x, lambda a, y: attend(a, y, prefix=1, need=need))
    return (adapter.mlp_half(block, x + branch) - expected).abs().max().item()

"""What one call does: inference, a training step, a step of DiffRate's search."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def inference(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Step:
    """Forward pass without gradients."""
    kind, mixed = images.device.type, dtype != torch.float32

    def step() -> Tensor:
        with torch.inference_mode(), torch.autocast(kind, dtype=dtype, enabled=mixed):
            return model(images)

    return step


def linear_layers(model: Any, batch: int) -> Step:
    """The linear layers of all blocks alone, with as many rows as the model would give them.

    What they take is what no reducer can save: their rate falls with the number of rows, and every
    weight has to come from memory however few rows it meets.
    """
    calls = []
    for block, plan in zip(model.backbone.blocks, model.plan(), strict=True):
        layers = ((block.attn.qkv, plan.attention), (block.attn.proj, plan.attention))
        layers += ((block.mlp.fc1, plan.mlp), (block.mlp.fc2, plan.mlp))
        for layer, tokens in layers:
            x = torch.randn(batch, tokens, layer.in_features)
            calls.append((x, layer.weight, layer.bias))

    def step() -> None:
        with torch.inference_mode():
            for x, weight, bias in calls:
                F.linear(x, weight, bias)

    return step


def cuda_graph(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Step:
    """Forward pass recorded once as a CUDA graph and replayed."""
    step = inference(model, images, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def training(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Step:
    """Forward, backward and one fused AdamW update; the model changes, its time does not."""
    model.train()
    kind, mixed = images.device.type, dtype != torch.float32
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(wanted, lr=1e-6, fused=True)
    labels = torch.arange(images.shape[0], device=images.device)

    def step() -> None:
        with torch.autocast(kind, dtype=dtype, enabled=mixed):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def diffrate_search(model: Any, images: Tensor) -> Step:
    """Forward and backward of the search for rates: backbone frozen, tokens masked."""
    rows, columns = model.grid
    model.requires_grad_(False)
    model.reducer.begin_search(rows * columns, model.depth).requires_grad_(True)
    model.train()
    labels = torch.arange(images.shape[0], device=images.device)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        for parameter in model.reducer.rates.parameters():
            parameter.grad = None

    return step

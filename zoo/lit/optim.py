"""Any optimiser that timm knows, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.errors import UnknownName, ZooError

# torch's own optimisers that have a fused kernel on the CPU and on CUDA.
_FUSED = {"adamw", "adam", "sgd", "nesterov", "momentum"}


def create_optimizer(
    model: nn.Module,
    opt: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    fused: bool | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Create a timm optimiser; biases, norms and the model's own exceptions are not decayed.

    Args:
        model: The model whose trainable parameters it updates.
        opt: timm name, e.g. `adamw`, `lamb`, `muon`, `sgd`.
        lr: Peak learning rate.
        weight_decay: Of weight matrices.
        layer_decay: Factor of the learning rate per layer below the head (0.65 to 0.9 are usual
            in fine-tuning); None is the same rate everywhere.
        fused: One kernel for all parameters; None means where the optimiser has one.
        **options: More arguments of the optimiser, e.g. `betas`.

    Returns:
        The optimiser.

    Raises:
        UnknownName: timm has no such optimiser, with the nearest names.
        ZooError: `lr` is not above 0, or the optimiser does not take an argument.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if str(opt).lower() not in known:
        raise UnknownName("optimiser", opt, known)
    if not lr > 0:
        raise ZooError(f"optim.lr must be above 0, got {lr}")
    if fused is None:
        devices = {p.device.type for p in model.parameters()}
        fused = str(opt).lower() in _FUSED and devices <= {"cpu", "cuda"}
    if fused:
        options["fused"] = True
    try:
        return create_optimizer_v2(
            model, opt=opt, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **options
        )
    except TypeError as error:
        raise ZooError(f"optimiser {opt!r} does not take these options: {error}") from error

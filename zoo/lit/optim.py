"""Any optimiser that timm knows, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
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
    lr_factors: Mapping[str, float] | None = None,
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
        lr_factors: Factors of the learning rate by pattern of the parameter names, such as
            `{"backbone.*": 0.01}`; the first pattern that fits counts.
        **options: More arguments of the optimiser, e.g. `betas`.

    Returns:
        The optimiser.

    Raises:
        UnknownName: timm has no such optimiser, with the nearest names.
        ZooError: `lr` is not above 0, the optimiser does not take an argument, or a pattern fits
            no parameter.
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
    if lr_factors:
        if layer_decay is not None:
            raise ZooError("give either optim.layer_decay or optim.lr_factors, not both")
        options["param_group_fn"] = _groups(lr, weight_decay, lr_factors)
    try:
        return create_optimizer_v2(
            model, opt=opt, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **options
        )
    except TypeError as error:
        raise ZooError(f"optimiser {opt!r} does not take these options: {error}") from error


def _groups(
    lr: float, weight_decay: float, factors: Mapping[str, float]
) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """Groups of parameters by factor of the learning rate and by decay."""

    def split(model: nn.Module) -> list[dict[str, Any]]:
        exempt = set(getattr(model, "no_weight_decay", set)())
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for pattern in factors:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ZooError(
                    f"optim.lr_factors: {pattern!r} fits none of the trained parameters; their "
                    f"names begin with {sorted({n.split('.')[0] + '.' for n in named})}"
                )
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in named.items():
            factor = next((f for p, f in factors.items() if fnmatchcase(name, p)), 1.0)
            plain = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            groups.setdefault((factor, 0.0 if plain else weight_decay), []).append(parameter)
        return [
            {"params": parameters, "lr": lr * factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ]

    return split

"""What is measured: methods, the schedules of the papers, and how models are built from both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import nn

import zoo
from zoo.errors import ZooError
from zoo.model.reduced import ReducedViT
from zoo.run.controls import lower_sizes

_STAGES: dict[str, Any] = {"name": "keep_rate", "rate": 0.7, "blocks": [3, 6, 9]}
_EVERY: dict[str, Any] = {
    "name": "keep_rate",
    "rate": 0.9,
    "of": "current",
    "rounding": "ceil",
    "blocks": "all",
}
_R13: dict[str, Any] = {"name": "constant_r", "r": 13}

#: Schedules that a method is usually measured with; others get three stages of 0.7.
SCHEDULES: dict[str, dict[str, Any]] = {
    "tome": _R13,
    "tofu": _R13,
    "pitome": _EVERY,
}
#: Smaller models of a geometry, trained as long: name, and cost as a part of the larger one's.
SMALLER = {"vit_fashion": ("vit_fashion_small", 0.5)}
_SHORT = {"deit_small": "deit_small_patch16_224", "deit_base": "deit_base_patch16_224"}
_SEARCHED = {"deit_small_patch16_224": "deit_small_2.9", "deit_base_patch16_224": "deit_base_11.5"}


def backbone_name(name: str) -> str:
    """timm's name of a backbone, also for the short ones of the configurations."""
    return _SHORT.get(name, name)


def schedule_of(method: str, backbone: str) -> dict[str, Any]:
    """The schedule of a method on a backbone, as a mapping."""
    if method == "diffrate" and backbone in _SEARCHED:
        folder = Path(__file__).parents[1] / "configs" / "schedule" / "diffrate"
        node = yaml.safe_load((folder / f"{_SEARCHED[backbone]}.yaml").read_text())
        keys = ("keep", "prune", "prefix")
        return {"name": "per_block", **{k: node[k] for k in keys}}
    return SCHEDULES.get(method, _R13 if method == "diffrate" else _STAGES)


def parse_schedule(text: str) -> dict[str, Any]:
    """A schedule from the command line: `constant_r:r=13`, `keep_rate:rate=0.5,blocks=[3,6]`.

    Raises:
        ZooError: If it cannot be read.
    """
    name, _, rest = text.partition(":")
    try:
        arguments = yaml.safe_load("{" + rest.replace("=", ": ") + "}") or {}
    except yaml.YAMLError as error:
        raise ZooError(f"schedule {text!r}: expected NAME:KEY=VALUE,KEY=VALUE") from error
    return {"name": name, **arguments}


def plain_backbone(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """timm's model with random weights, in evaluation mode.

    Weights do not change the time, but their scale decides whether tokens differ at all: biases and
    norms are drawn too, or all tokens of a random image would look alike.
    """
    import zoo.models  # noqa: F401  (registers this package's own architectures)

    torch.manual_seed(seed)
    model = timm.create_model(backbone_name(name), **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def controls(name: str, arguments: Mapping[str, Any], fraction: float) -> dict[str, nn.Module]:
    """What a reduced model of a cost competes with: smaller images, and a smaller model.

    Args:
        name: timm's name of the model that is reduced.
        arguments: Its own, beside the name.
        fraction: Of its GMACs; the images have as many patches of its patches, as near as it goes.

    Returns:
        Dense backbones with random weights, by what tells them from the model.
    """
    whole = zoo.wrap(plain_backbone(name, **arguments), None)
    side, patch = (f(whole.backbone)[-1] for f in (whole.tower.input_size, whole.tower.patch_size))
    found = {
        f"{pixels} px": plain_backbone(name, **{**arguments, "img_size": pixels})
        for pixels in lower_sizes(side, patch, [fraction])
    }
    small, cost = SMALLER.get(name, ("", 0.0))
    if abs(cost - fraction) < 0.01:
        found[small] = plain_backbone(small)
    return found


def reduced(
    backbone: nn.Module, method: str | None, schedule: Any = None, **runtime: Any
) -> ReducedViT:
    """A backbone with a method, or without one for the dense model in the same wrapper."""
    torch.manual_seed(1)  # learned parts
    model = zoo.wrap(backbone, method, schedule if method else None).eval()
    return model.set_runtime(**runtime)

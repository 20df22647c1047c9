"""The public functions, re-exported by `import zoo`."""

from __future__ import annotations

from typing import Any

from torch import nn

import reduction
from zoo import backbones
from zoo.build import create_model as create_model
from zoo.build import wrap as wrap
from zoo.checkpoint import load as _load
from zoo.cost.profile import profile as _profile
from zoo.cost.types import Profile
from zoo.measure.calibrate import calibrate as calibrate
from zoo.model.maps import AttentionMap as AttentionMap
from zoo.model.maps import attention_maps as attention_maps
from zoo.model.reduced import ReducedViT
from zoo.model.runtime import Runtime


def load(path_or_hub_name: str, **overrides: Any) -> ReducedViT:
    """Load a model with weights: a folder, a Lightning checkpoint, a shipped name, or the hub.

    Args:
        path_or_hub_name: Model folder, `.ckpt`, a shipped name such as "vit_digits", or
            `hf-hub:org/name`.
        **overrides: `reducer`, `schedule` or `plugins` to use instead of the saved ones; arguments
            of the backbone; `last_block` and `fast_linear`, which are never saved, see `wrap`.

    Raises:
        BadCheckpoint: If the file is missing, truncated, unsafe, or of another architecture.
    """
    runtime = {k: overrides.pop(k) for k in Runtime._fields if k in overrides}
    return _load(path_or_hub_name, **overrides).set_runtime(**runtime)


def profile(model: nn.Module, **options: Any) -> Profile:
    """Count parameters, multiply-accumulates and tokens of a model, without running it.

    Args:
        model: A `ReducedViT` or a supported timm model.
        **options: See `zoo.cost.profile.profile`.
    """
    return _profile(model, **options)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the backbones, of timm and of this package, that can be wrapped.

    Args:
        pattern: Shell pattern such as `"deit*"`.
    """
    return backbones.works(pattern)


def list_methods() -> list[str]:
    """Registry names of all reducers."""
    return reduction.list_methods()

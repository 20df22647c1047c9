"""The public functions, re-exported by `import zoo`."""

from __future__ import annotations

from typing import Any

from torch import nn

import reduction
from reduction.selection.registry import SelectorLike, create_selector
from zoo import backbones
from zoo.attaching.in_place import attach as attach
from zoo.attaching.in_place import attached as attached
from zoo.attaching.in_place import detach as detach
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
from zoo.model.selecting import SelectingTower as SelectingTower
from zoo.visual.see import visualize as visualize


def load(path_or_hub_name: str, **overrides: Any) -> ReducedViT:
    """Load a model with weights: a folder, a Lightning checkpoint, a shipped name, or the hub.

    Args:
        path_or_hub_name: Model folder, `.ckpt`, a shipped name such as "vit_digits", or
            `hf-hub:org/name`.
        **overrides: `reducer`, `schedule` or `plugins` to use instead of the saved ones; arguments
            of the backbone; `last_block`, `linear`, `buckets`, `own_kernels`, which are never
            saved, see `ReducedViT.set_runtime`.

    Raises:
        BadCheckpoint: If the file is missing, truncated, unsafe, or of another architecture.
    """
    runtime = {k: overrides.pop(k) for k in (*Runtime._fields, "fast_linear") if k in overrides}
    return _load(path_or_hub_name, **overrides).set_runtime(**runtime)


def selector(
    tower: nn.Module,
    method: SelectorLike = "visionzip",
    keep: int | float | None = 64,
    *,
    block: int = -2,
    norm: bool = False,
    projector: nn.Module | None = None,
    merger: nn.Module | None = None,
    group: int = 1,
    group_order: str = "raster",
    **options: Any,
) -> SelectingTower:
    """A vision tower whose output is the K tokens that a selector leaves.

    For a language model behind a projector, or a search index. See `reduction.select` for what is
    chosen and `SelectingTower` for how it runs.

    Args:
        tower: A model that `zoo.wrap` takes, or one that it returned, with a reducer inside.
        method: Registry name, mapping `{"name": ..., **options}`, or instance.
        keep: Tokens K, or a share in (0, 1) of those that the tower has left; None where an
            adaptive method decides.
        block: Whose output is chosen from; negative ones count from the end.
        norm: Apply the tower's final norm to that output first.
        projector: From the tower's width to the language model's, `(B, N, C)` to `(B, N, D)`.
        merger: Makes one token of each group of patches, `(B, N, C)` to `(B, N / group, D)`.
        group: Patches in each of its tokens.
        group_order: Order of the patches: "raster", or "runs", group after group.
        **options: Constructor arguments of the method.

    Returns:
        A module: images `(B, 3, H, W)` to tokens `(B, K, C)`.

    Raises:
        ZooError: If a name is unknown, the tower unsupported, or the parts do not go together.

    Examples:
        >>> import torch, zoo
        >>> tower = zoo.selector(zoo.load("vit_digits"), "scope", keep=16)
        >>> tower(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 16, 96])
        >>> tower.retained_count()
        16
    """
    model = tower if isinstance(tower, ReducedViT) else wrap(tower, None)
    chooses = create_selector(method, **options)
    return SelectingTower(model, chooses, keep, block, norm, projector, merger, group, group_order)


def list_selectors() -> list[str]:
    """Registry names of all selectors."""
    return reduction.list_selectors()


def profile(model: nn.Module, **options: Any) -> Profile:
    """Count parameters, multiply-accumulates and tokens of a model, without running it.

    Args:
        model: A `ReducedViT` or a supported timm model.
        **options: See `zoo.cost.profile.profile`.
    """
    return _profile(model, **options)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the backbones that can be wrapped: of timm and this package, and of the others.

    The latter begin with the name of their library, as in "open_clip:ViT-B-32".

    Args:
        pattern: Shell pattern such as `"deit*"`.
    """
    return [*backbones.works(pattern), *backbones.elsewhere(pattern)]


def list_methods() -> list[str]:
    """Registry names of all reducers."""
    return reduction.list_methods()

"""What a wrapper is to others: its recipe, and what timm's tools expect of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from reduction.mixins.learned import Learned
from zoo.adapters.standalone import as_standalone
from zoo.adapters.tower import tower_of
from zoo.errors import ZooError
from zoo.libraries.build import description
from zoo.model.evaluating import evaluating
from zoo.model.placed import left_out
from zoo.model.stream import flow, leave

if TYPE_CHECKING:
    from reduction.base import Reducer
    from reduction.schedules.base import Schedule


def _tensors(answer: Any) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


class TimmContract(nn.Module):
    """timm's methods and attributes, for a module that holds a `backbone`."""

    # nn.Module's own hints say Tensor | Module of every attribute.
    backbone: Any
    plugins: Any
    reducer: Reducer | None
    schedule: Schedule | None
    backbone_args: dict[str, Any]
    forward_intermediates: Any

    def unwrap(self) -> nn.Module:
        """The untouched model."""
        return self.backbone

    def verify(self, images: Tensor, tolerance: float = 0.0) -> float:
        """Compare the wrapper with nothing reduced against the backbone itself.

        Args:
            images: `(B, 3, H, W)`.
            tolerance: Largest difference that passes.

        Returns:
            The largest difference of the logits.

        Raises:
            ZooError: If it is above the tolerance.
        """
        with evaluating(self), torch.no_grad():
            dense: Any = type(self)(self.backbone)  # type: ignore[call-arg]
            # Block by block: with nothing to do the wrapper would ask the backbone itself.
            mine = dense(images) if dense.checked(images) else leave(dense, flow(dense, images))
            with left_out(self.backbone):
                whole = tower_of(self.backbone).whole(self.backbone, images)
        pairs = zip(_tensors(mine), _tensors(whole), strict=True)
        gap = max((a - b).abs().max().item() for a, b in pairs)
        if not gap <= tolerance:
            raise ZooError(f"expected a difference of at most {tolerance}, got {gap:.3g}")
        return gap

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything but the weights: what has to be written down to build the model again."""
        cfg = getattr(self.backbone, "pretrained_cfg", None) or {}
        own, tower = as_standalone(self.backbone), tower_of(self.backbone)
        settings = tower.settings(self.backbone) if own is None else own.settings()
        return {
            "backbone": {
                **({} if tower.library == "timm" else {"library": tower.library}),
                "name": cfg.get("architecture") or type(self.backbone).__name__,
                "tag": cfg.get("tag") or None,
                "num_classes": self.num_classes,
                "args": {**self.backbone_args, **settings},
            },
            "reducer": None if self.reducer is None else self.reducer.config(),
            "schedule": None if self.schedule is None else self.schedule.config(),
            "plugins": [p.config() for p in self.plugins],
        }

    def training_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of every head of the model, for the mean of their losses.

        Most models have one head, and this is a tuple of what `forward` returns.
        """
        own = as_standalone(self.backbone)
        return (self(images),) if own is None else own.training_logits(images)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's data and weight settings of the backbone."""
        return self.pretrained_cfg

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Same as `default_cfg`, under timm's newer name."""
        tower = tower_of(self.backbone)
        if tower.library == "timm":
            return getattr(self.backbone, "pretrained_cfg", None) or {}
        return {**description(self.backbone), "input_size": tower.input_size(self.backbone)}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return tower_of(self.backbone).classes(self.backbone)

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return tower_of(self.backbone).features(self.backbone)

    @property
    def feature_info(self) -> Any:
        """timm's account of the feature maps of every block."""
        tower, m = tower_of(self.backbone), self.backbone
        if tower.library == "timm":
            return m.feature_info
        each = {"num_chs": tower.width(m), "reduction": max(tower.patch_size(m))}
        return [{"module": f"blocks.{i}", **each} for i in range(len(tower.blocks(m)))]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
        restore: str | None = None,
    ) -> Any:
        """Features of chosen blocks by DINO's name for them, see `forward_intermediates`.

        Args:
            x: Images `(B, 3, H, W)`.
            n: So many last blocks, or which.
            reshape: Give maps `(B, C, rows, columns)` in place of `(B, rows * columns, C)`.
            return_prefix_tokens: Give `(features, prefix tokens)` in place of each.
            norm: Apply the final norm.
            attn_mask: Must be None.
            restore: As in `forward_intermediates`.
        """
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
            restore=restore,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what features of chosen blocks do not need; what timm's feature wrapper calls.

        All blocks stay: a schedule says for each of them what it keeps, and would say something
        else for fewer. `stop_early` spares their time. Of models of other libraries than timm the
        norm stays, too.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            The chosen blocks.
        """
        tower, m = tower_of(self.backbone), self.backbone
        taken, _ = take_indices(len(tower.blocks(m)), indices)
        if tower.library != "timm":
            if prune_head and tower.classifier(m) is not None:
                self.reset_classifier(0)
            return taken
        if prune_norm:
            m.norm = nn.Identity()
        if prune_head:
            m.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The backbone's classifier."""
        return tower_of(self.backbone).classifier(self.backbone)  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the backbone's classifier, and those of reducer and plugins."""
        tower_of(self.backbone).reset_classifier(self.backbone, num_classes, global_pool)
        if isinstance(self.reducer, Learned):
            self.reducer.reset_classifier(num_classes)
        for plugin in self.plugins:
            plugin.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training."""
        tower_of(self.backbone).set_checkpointing(self.backbone, enable)

    def no_weight_decay(self) -> set[str]:
        """Parameter names that optimisers should not decay."""
        own = tower_of(self.backbone).undecayed(self.backbone)
        names = {f"backbone.{name}" for name in own}
        for i, plugin in enumerate(self.plugins):
            names |= {f"plugins.{i}.{name}" for name in plugin.no_weight_decay()}
        return names

    def unused_parameters(self) -> set[str]:
        """Names of parameters that get no gradient, mostly because a plugin took their place."""
        names = {f"backbone.{name}" for p in self.plugins for name in p.unused(self.backbone)}
        own: set[str] = self.reducer.unused() if isinstance(self.reducer, Learned) else set()
        return names | {f"reducer.{name}" for name in own}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer-wise learning rates."""
        groups = tower_of(self.backbone).groups(self.backbone, coarse)
        return {key: _prefixed(value) for key, value in groups.items()}


def take_indices(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The blocks that timm would take, and the last of them.

    Raises:
        ZooError: If there is no such block.
    """
    try:
        taken, last = feature_take_indices(depth, indices)  # type: ignore[arg-type]  # any sequence
    except (AssertionError, ValueError):
        raise ZooError(
            f"indices must be a number of last blocks, 1 to {depth}, or a list of blocks, "
            f"{-depth} to {depth - 1}; got {indices!r}"
        ) from None
    return taken, last


_ANCHOR = r"(?<![\[\\])\^"


def _prefixed(pattern: Any) -> Any:
    if isinstance(pattern, str):
        # timm anchors every alternative of `^cls_token|pos_embed|...` by matching from the start.
        return rf"^backbone\.(?:{re.sub(_ANCHOR, '', pattern)})"
    return [(_prefixed(p[0]), *p[1:]) for p in pattern]

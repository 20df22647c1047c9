"""The parts of a model and the facts about them, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from reduction.base import Reducer
from reduction.counts import Dims, Spec, Step
from reduction.mixins.entry import AtEmbedding
from reduction.mixins.gating import Gates
from reduction.tokens import OF_THE_MLP
from zoo.adapters.attention import parts_of
from zoo.adapters.blocks import block_adapter
from zoo.adapters.standalone import Standalone, as_standalone, check_alone
from zoo.adapters.tower import Tower, check_backbone, tower_of
from zoo.errors import NoClassToken, UnsupportedModel, ZooError
from zoo.plugins.base import Plugin


class Anatomy(NamedTuple):
    """A backbone, what reduces its tokens, and what acts around its blocks.

    Counting, planning and solving budgets read this and never the model, so a schedule is known
    before there is a model.

    Attributes:
        backbone: A supported timm model.
        reducer: The method, or None.
        plugins: Parts that act around the blocks.
    """

    backbone: Any
    reducer: Reducer | None = None
    plugins: Sequence[Plugin] = ()

    @property
    def tower(self) -> Tower:
        """How backbones of this family are run."""
        return tower_of(self.backbone)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.tower.blocks(self.backbone))

    @property
    def prefix(self) -> int:
        """Number of prefix tokens P."""
        return self.tower.prefix(self.backbone)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid `(rows, columns)` at the backbone's own image size."""
        return self.tower.grid(self.backbone)

    @property
    def patches(self) -> int:
        """Patches at the backbone's own image size."""
        rows, columns = self.grid
        return rows * columns

    @property
    def alone(self) -> Standalone | None:
        """The backbone, if it runs itself."""
        return as_standalone(self.backbone)

    def attention(self, block: int) -> Any:
        """The attention module of a block."""
        own = self.tower.blocks(self.backbone)[block]
        return block_adapter(own).attn(own)

    def dims(self, block: int) -> Dims:
        """Widths of a block."""
        parts = parts_of(self.attention(block))
        classes = max(1, self.tower.class_tokens(self.backbone))
        macs = _patch_macs(self.tower.stem(self.backbone))
        return Dims(parts.width, parts.heads, parts.head_dim, classes, macs)

    def spec(self, steps: Sequence[Step | None]) -> Spec:
        """What learned parts are sized by.

        Args:
            steps: The reduction of each block.
        """
        parts, tower, m = parts_of(self.attention(0)), self.tower, self.backbone
        return Spec(
            width=tower.width(m),
            heads=int(parts.heads),
            head_dim=int(parts.head_dim),
            depth=self.depth,
            prefix=self.prefix,
            grid=self.grid,
            classes=tower.classes(m),
            steps=tuple(steps),
            reads=tower.reads(m),
            **_pixels(m),
        )


def _patch_macs(stem: nn.Module) -> int:
    """What it takes to embed one patch; 0 where the embedding is no single projection."""
    found = [m for m in stem.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return int(found[0].weight.numel()) if len(found) == 1 else 0


def _pixels(m: Any) -> dict[str, tuple[float, ...]]:
    """How pixels were normalised, where the backbone publishes it."""
    published = getattr(m, "pretrained_cfg", None) or {}
    found = {name: published.get(name) for name in ("mean", "std")}
    return {k: tuple(map(float, v)) for k, v in found.items() if v is not None}


def check_parts(
    backbone: nn.Module, reducer: Reducer | None = None, plugins: Sequence[Plugin] = ()
) -> None:
    """Refuse a backbone that cannot be run block by block, and parts that it cannot take.

    Raises:
        UnsupportedModel: If the backbone, a block or an attention class has no adapter, or runs
            itself and parts were asked for.
    """
    check_backbone(backbone)
    tower = tower_of(backbone)
    if plugins and not tower.tensors:
        raise UnsupportedModel(
            f"plugin {plugins[0].name!r} knows models of timm alone, and this is a "
            f"{tower.title}; timm has the same architecture: zoo.list_models()"
        )
    asked = {f"reducer {getattr(reducer, 'name', '')!r}": reducer is not None}
    asked |= {f"plugin {p.name!r}": True for p in plugins}
    check_alone(backbone, asked)


def check_blocks(blocks: Sequence[nn.Module], reducer: Reducer) -> None:
    """Refuse a reducer that acts where some block has no place for it.

    Raises:
        UnsupportedModel: Naming the class of the block.
    """
    for block in blocks:
        adapter, kind = block_adapter(block), type(block).__name__
        if reducer.site == "attn" and not adapter.inside:
            raise UnsupportedModel(
                f"reducer {reducer.name!r} takes tokens out inside the attention, but in a {kind} "
                "the MLP reads the same tokens beside it; choose a method that acts before or "
                "behind the block, such as 'tome' or 'evit'"
            )
        if reducer.needs & OF_THE_MLP and adapter.mlp_branch is None:
            raise UnsupportedModel(
                f"block class {kind} has no one MLP whose answer reducer {reducer.name!r} could "
                "look at; choose a method that does not read it"
            )
        if isinstance(reducer, Gates) and adapter.mlp_masked is None:
            raise UnsupportedModel(
                f"reducer {reducer.name!r} switches parts of the MLP, and block class {kind} has "
                "no one MLP; choose another method"
            )


def check_together(anatomy: Anatomy) -> None:
    """Refuse a reducer and plugins that cannot work together or on this backbone.

    Asked after the plugins were set up, which may decide how many tokens they add.

    Raises:
        ZooError: Naming what does not fit, and what would.
    """
    reducer, plugins, depth = anatomy.reducer, anatomy.plugins, anatomy.depth
    heads = [p.name for p in plugins if p.replaces_head]
    if len(heads) > 1:
        raise ZooError(f"plugins {heads} all bring a classifier; choose one of them")
    if reducer is None:
        return
    for plugin in plugins:
        if not any(plugin.added(b, depth) for b in range(-1, depth)):
            continue
        pair = f"reducer {reducer.name!r} with plugin {plugin.name!r}"
        if reducer.added_tokens == "refuse":
            raise ZooError(
                f"{pair}: this method keeps its own account of the tokens and takes none that a "
                "plugin adds; plugin 'cla' adds none"
            )
        if plugin.protected and reducer.site == "attn":
            raise ZooError(
                f"{pair}: tokens cannot be protected from a method that removes them inside the "
                "attention; use protected=false"
            )
    check_blocks(anatomy.tower.blocks(anatomy.backbone), reducer)
    one_piece = anatomy.tower.why_one_piece(anatomy.backbone)
    if isinstance(reducer, AtEmbedding) and one_piece:
        raise UnsupportedModel(
            f"reducer {reducer.name!r} makes tokens of larger parts of an image, by patches and "
            f"positions, and {one_piece}; choose another method"
        )
    if reducer.needs_class_token and not anatomy.tower.class_tokens(anatomy.backbone):
        instead = _without_class_token(reducer)
        other = "".join(
            f"; use {name}={value!r} ({_WITHOUT_CLASS_TOKEN[name, value]})"
            for name, value in instead.items()
        )
        raise NoClassToken(
            f"reducer {reducer.name!r} scores tokens by the class token, which this model does "
            f"not have{other}",
            instead,
        )


_WITHOUT_CLASS_TOKEN = {
    ("score_from", "column_mean"): "attention received from all tokens",
    ("score", "column"): "attention received from all tokens",
    ("start_from", "uniform"): "all tokens begin alike",
}


def _without_class_token(reducer: Reducer) -> dict[str, str]:
    """The argument with which a method does without a class token, if it has one."""
    known = inspect.signature(type(reducer)).parameters
    return dict([pair for pair in _WITHOUT_CLASS_TOKEN if pair[0] in known][:1])

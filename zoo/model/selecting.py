"""A tower that hands on K of its tokens, chosen by what it computed anyway.

Stands in the place of a vision tower in front of a projector and a language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reduction.errors import ZooError
from reduction.mixins.adaptive import Adaptive
from reduction.selection.base import Selection, Selector
from reduction.selection.given import Given, given
from reduction.selection.registry import asked, pick, signals_of
from reduction.tokens import Tokens, take_rows
from zoo.adapters.blocks import block_adapter
from zoo.adapters.split_qkv import without_values
from zoo.model.empty import for_any_batch
from zoo.model.reduced import ReducedViT
from zoo.model.stream import Outflow, flow

#: Signals of attention over all tokens, which a merged token has the sum of; keys are averaged.
_SHARES = frozenset({"cls_row", "column"})


class SelectingTower(nn.Module):
    """A vision tower whose output is the K tokens that a selector leaves.

    The blocks behind the one whose output is chosen from are not run. Of the attention only what
    the selector reads is computed: a row, a column or keys, and never a whole map.

    Args:
        tower: The model, with a reducer inside or without.
        selector: What chooses.
        keep: Tokens K, or a share of those that the tower has left; None where an adaptive selector
            decides.
        block: Whose output is chosen from; negative ones count from the end.
        norm: Apply the tower's final norm to that output first.
        projector: What brings tokens to the width of the language model, `(B, N, C)` to
            `(B, N, D)`. Selectors that officially read its output do so, others choose before it.
        merger: What makes one token of each group of patches, `(B, N, C)` to `(B, N / group, D)`;
            then groups are chosen.
        group: Patches in each of its tokens.
        group_order: See `reduction.select`.

    Raises:
        ZooError: If the parts do not go together.
    """

    projector: nn.Module | None
    merger: nn.Module | None

    def __init__(
        self,
        tower: ReducedViT,
        selector: Selector,
        keep: int | float | None,
        block: int = -2,
        norm: bool = False,
        projector: nn.Module | None = None,
        merger: nn.Module | None = None,
        group: int = 1,
        group_order: str = "raster",
    ) -> None:
        super().__init__()
        depth = tower.depth
        if tower.anatomy.alone is not None:
            raise ZooError(
                f"{type(tower.backbone).__name__} runs itself: there is no block whose tokens "
                "could be chosen from"
            )
        if isinstance(block, bool) or not isinstance(block, int) or not -depth <= block < depth:
            least = -min(2, depth)
            raise ZooError(f"block must be one of {depth}, such as {least}, got {block!r}")
        if any(p.added(b, depth) for p in tower.plugins for b in range(-1, depth)):
            raise ZooError("a selector does not go with a plugin that adds tokens")
        if isinstance(tower.reducer, Adaptive):
            raise ZooError(
                f"reducer {tower.reducer.name!r} keeps another number of tokens in every image; a "
                "selector needs the same number"
            )
        if (merger is None) != (group == 1):
            raise ZooError(f"groups need both merger and group, got group={group!r}")
        if merger is not None and tower.reducer is not None:
            raise ZooError("groups of patches need all patches: no reducer inside the tower")
        if selector.raster and tower.reducer is not None:
            raise ZooError(
                f"selector {selector.name!r} looks at neighbours on the image, which a reducer "
                "inside the tower does not leave in their places"
            )
        if selector.extra_rows and not tower.tower.class_tokens(tower.backbone):
            if selector.name in ("visionzip", "prunesid"):
                raise ZooError(
                    f"selector {selector.name!r} would hand on a class token, which this tower "
                    "does not have; leave class_token and compat out"
                )
        self.tower = tower
        self.selector = selector
        self.keep = keep
        self.block = block % depth if block < 0 else block
        self.norm = norm
        self.projector = projector
        self.merger = merger
        self.group = group
        self.group_order = group_order
        asked(selector, 2, keep)  # refuses what is no number of tokens

    @property
    def signals(self) -> tuple[tuple[str, int], ...]:
        """What is read of the tower's attention, and of which block."""
        m = self.tower.backbone
        has_class = self.tower.tower.class_tokens(m) > 0
        return signals_of(self.selector, self.tower.depth, has_class, self.block)

    def retained_count(self, height: int | None = None, width: int | None = None) -> int:
        """How many tokens come out for an image, before there is one.

        Of an adaptive selector with crops or padding, the rows of its answer.

        Args:
            height: Of the image in pixels; None is the tower's own size.
            width: Of the image; None is a square.

        Raises:
            ZooError: If the selector decides by itself.
        """
        if self.keep is None:
            raise ZooError(f"{self.selector.name}: how many remain follows from the image")
        tower, grid = self.tower, self.tower.grid
        if height is not None:
            size = (1, tower.tower.input_size(tower.backbone)[0], height, width or height)
            images = torch.empty(size, device="meta")
            tower.tower.check_images(tower.backbone, images)
            grid = tower.tower.grid_of(tower.backbone, images)
        n = (tower.plan(grid)[self.block].leaving - tower.prefix) // self.group
        keep = asked(self.selector, n, self.keep)
        assert keep is not None
        side = int(self.group**0.5)
        rows = (grid[0] // side, grid[1] // side)
        whole = tower.reducer is None
        return n if keep >= n else self.selector.rows(n, keep, rows if whole else None)

    def token_count(self) -> int:
        """Tokens that are chosen from, at the tower's own image size."""
        return (self.tower.plan()[self.block].leaving - self.tower.prefix) // self.group

    def forward(self, images: Tensor) -> Tensor:
        """The K tokens, `(B, K, C)`, or of the width that the projector puts out.

        Args:
            images: `(B, 3, H, W)`.
        """
        return self.select(images).features

    @for_any_batch
    def select(self, images: Tensor) -> Selection:
        """The K tokens and what became of the patches.

        Args:
            images: `(B, 3, H, W)`.

        Returns:
            Indices and slots are of patches (of groups, with a merger), also where a reducer in the
            tower has left other tokens: a merged one stands where its position is.
        """
        inputs, t = self.given(images)
        found = pick(self.selector, inputs, self.keep)
        if self.projector is not None and not self._projects_first:
            found = found._replace(features=self.projector(found.features))
        return found if self.tower.reducer is None else _on_patches(found, t, self.selector)

    def given(self, images: Tensor) -> tuple[Given, Tokens]:
        """What the selector chooses from, and the tokens of the tower that it is made of.

        Args:
            images: `(B, 3, H, W)`.

        Raises:
            ZooError: They are no images of one shape, such as a padded batch.
        """
        if not isinstance(images, Tensor) or images.dim() != 4:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ZooError(
                f"a selector expects images (B, C, H, W) of one shape, got {got}; images of a "
                "padded batch differ in tokens, and only the tower itself takes them"
            )
        tower = self.tower
        tower.checked(images)
        wanted = self.signals
        hear: dict[int, frozenset[str]] = {}
        for name, block in wanted:
            if block <= self.block:
                hear[block] = hear.get(block, frozenset()) | {_field(name)}
        with tower.linear():
            out = flow(
                tower,
                images,
                track=tower.reducer is not None,
                until=self.block,
                hear=hear,
            )
            signals = {
                name: _carried(out, block, _field(name), tower.prefix)
                for name, block in wanted
                if block <= self.block
            }
            signals |= self._behind(out.t, [name for name, block in wanted if block > self.block])
        t = out.t
        x = tower.tower.norm(tower.backbone, t.x) if self.norm else t.x
        patches = x[:, t.prefix :]
        if tower.tower.class_tokens(tower.backbone):
            signals["class_token"] = x[:, 0]
        if self.merger is not None:
            patches = self.merger(patches)
        if self._projects_first:
            assert self.projector is not None
            patches = self.projector(patches)
            if "class_token" in signals:
                signals["class_token"] = self.projector(signals["class_token"].unsqueeze(1))[:, 0]
        elif self.merger is not None:
            signals.pop("class_token", None)  # the merger has no answer for it
        inputs = given(
            patches,
            signals,
            t.grid,
            self.group,
            self.group_order,
            self.keep if isinstance(self.keep, float) else None,
            square=False,
        )
        return inputs, t

    @property
    def _projects_first(self) -> bool:
        return self.projector is not None and self.selector.projected

    def _behind(self, t: Tokens, names: list[str]) -> dict[str, Tensor]:
        """Queries and keys that the next block would compute of these tokens."""
        if not names:
            return {}
        blocks = self.tower.tower.blocks(self.tower.backbone)
        block: Any = blocks[min(self.block + 1, len(blocks) - 1)]
        adapter = block_adapter(block)
        q, k, _ = without_values(adapter.attn(block), adapter.attn_input(block, t.x))
        return {name: {"q": q, "k": k}[name] for name in names}

    def extra_repr(self) -> str:
        """What chooses, for printing."""
        return f"selector={self.selector.name}, keep={self.keep}, block={self.block}"


def _field(name: str) -> str:
    return name.removesuffix("_shallow")


def _carried(out: Outflow, block: int, field: str, prefix: int) -> Tensor:
    """A signal of a block, over the tokens that are there at the end.

    Args:
        out: Of the pass.
        block: Whose attention.
        field: Which of `Signals`.
        prefix: Prefix tokens P.
    """
    before, seen = out.heard[block]
    signal = seen.need(field)
    if out.t.source is None:
        return signal
    along = -2 if field == "k" else -1
    # A method that acts before or inside the attention shows it fewer tokens than entered.
    entered = signal.shape[along] == before.x.shape[1]
    source = before.source if entered else _behind_of(out, signal.shape[along])
    assert source is not None
    rows = signal.movedim(-2, -1) if field == "k" else signal
    head, tail = rows[..., :prefix], rows[..., prefix:]
    tail = _moved(tail, source, out.t.source, out.t.n, field in _SHARES)
    rows = torch.cat([head, tail], -1)
    return rows.movedim(-1, -2) if field == "k" else rows


def _behind_of(out: Outflow, length: int) -> Tensor:
    if length != out.t.x.shape[1] or out.t.source is None:
        raise ZooError(
            "the reducer changes tokens inside the block that the selector listens to, and again "
            "behind it; choose other blocks for its schedule"
        )
    return out.t.source


def _moved(row: Tensor, source: Tensor, goal: Tensor, n: int, share: bool) -> Tensor:
    """Values of tokens, by way of the patches in them, as values of other tokens.

    Args:
        row: `(B, ..., M)`.
        source: Token of M that stands for each patch, `(B, N0)`; -1 for none.
        goal: Token of n that stands for each patch; -1 for none.
        n: Tokens at the end.
        share: A token's value is shared out among its patches and added up again; otherwise every
            patch has it, and the mean is taken.
    """
    held = (source >= 0) & (goal >= 0)
    shape = row.shape
    row = row.reshape(shape[0], -1, shape[-1])
    exact = row.to(torch.promote_types(row.dtype, torch.float32))

    def tally(place: Tensor, many: int, which: Tensor) -> Tensor:
        zero = torch.zeros(place.shape[0], many, dtype=exact.dtype, device=row.device)
        return zero.scatter_add(1, place.clamp_min(0), which.to(exact.dtype)).clamp_min(1)

    if share:
        exact = exact / tally(source, shape[-1], source >= 0).unsqueeze(1)
    each = exact.gather(2, source.clamp_min(0).unsqueeze(1).expand(-1, row.shape[1], -1))
    each = each * held.unsqueeze(1)
    place = goal.clamp_min(0).unsqueeze(1).expand(-1, row.shape[1], -1)
    total = each.new_zeros(*each.shape[:2], n).scatter_add(2, place, each)
    if not share:
        total = total / tally(goal, n, held).unsqueeze(1)
    return total.reshape(*shape[:-1], n)


def _on_patches(found: Selection, t: Tokens, selector: Selector) -> Selection:
    """A choice among merged tokens, said of patches; rows in the order of their patches.

    Args:
        found: Over the tokens of `t`.
        t: With origin and source.
        selector: Whose choice.
    """
    assert t.origin is not None and t.source is not None
    patches = t.source.shape[1]
    none = torch.full_like(t.origin[:, :1], -1)
    origin = torch.cat([t.origin, none], 1)
    index = origin.gather(1, torch.where(found.indices < 0, t.n, found.indices))
    order = origin.gather(1, torch.where(found.order < 0, t.n, found.order))
    slot = torch.cat([found.slot, none], 1)
    slot = slot.gather(1, torch.where(t.source < 0, t.n, t.source))
    features = found.features
    if not selector.official:
        # Rows without a patch stay where they are: first a class token, last a sum and padding.
        rows = torch.arange(index.shape[1], device=index.device).expand_as(index)
        place = torch.where(index < 0, torch.where(rows == 0, -1, patches + rows), index)
        line = place.argsort(dim=1)
        features, index = take_rows(features, line), index.gather(1, line)
        moved = torch.zeros_like(line).scatter(1, line, rows)
        slot = torch.where(slot < 0, -1, moved.gather(1, slot.clamp_min(0)))
    return Selection(features, index, order, slot, found.valid)

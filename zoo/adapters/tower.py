"""What every family of backbones answers: how one is entered, run block by block, and left.

A family is one file with a subclass of `Tower`, registered for the classes that it runs exactly as
they run themselves. Towers hold nothing: the backbone is an argument of every method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.tokens import Tokens
from zoo.adapters.blocks import block_adapter
from zoo.adapters.families import load_families
from zoo.adapters.foreign import why_no_model, why_shell, why_unsupported
from zoo.adapters.standalone import as_standalone
from zoo.errors import UnsupportedModel, ZooError

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Embedded(NamedTuple):
    """What a backbone hands to its first block.

    Attributes:
        x: Tokens `(B, P+N, C)`, before the pre-norm; None once the first block has them.
        rope: Rotary table `(N, 2d)`, `(H, N, 2d)` or batched `(B, 1, N, 2d)`; with a leading
            depth when `mixed`; None without rotary embedding.
        mixed: Whether every block has its own table.
        more: What else the backbone hands to the `forward` of every block, by its name there: a
            bias that the blocks share, for one.
    """

    x: Any
    rope: Tensor | None
    mixed: bool
    more: Mapping[str, Any] = _NOTHING


class Sized(NamedTuple):
    """Images of one size, out of a batch of several.

    Attributes:
        places: Where in the batch they were, `(b,)`.
        images: `(b, C, H, W)`.
    """

    places: Tensor
    images: Tensor


class Tower:
    """How the backbones of one family are run.

    Attributes:
        title: The family in words, for messages and listings.
        library: Whose models these are, as recipes name it.
        tensors: Whether a model, called with images, answers with a tensor.
    """

    title: ClassVar[str]
    library: ClassVar[str] = "timm"
    tensors: ClassVar[bool] = True

    def check(self, m: Any) -> None:
        """Refuse a model of the class that is put together so that it cannot be run.

        Raises:
            UnsupportedModel: With the reason.
        """

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""
        raise NotImplementedError

    def prefix(self, m: Any) -> int:
        """Number of prefix tokens P."""
        raise NotImplementedError

    def class_tokens(self, m: Any) -> int:
        """Leading tokens that together act as the class token: 1, or 0 in a model without one."""
        raise NotImplementedError

    def width(self, m: Any) -> int:
        """C, features per token."""
        raise NotImplementedError

    def classes(self, m: Any) -> int:
        """Number of classes, 0 for a model without classifier."""
        raise NotImplementedError

    def reads(self, m: Any) -> str:
        """What the classifier reads: "class", or "patches" where it pools them."""
        raise NotImplementedError

    def grid(self, m: Any) -> tuple[int, int]:
        """Patch grid `(rows, columns)` at the backbone's own image size."""
        raise NotImplementedError

    def patch_size(self, m: Any) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        raise NotImplementedError

    def grid_of(self, m: Any, images: Tensor) -> tuple[int, int]:
        """Patch grid `(rows, columns)` of a batch of images."""
        raise NotImplementedError

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images that a backbone was built for."""
        raise NotImplementedError

    def check_images(self, m: Any, images: Tensor) -> None:
        """Refuse images that the patch embedding cannot take, in words.

        Raises:
            ZooError: If the shape, channels or size do not fit.
        """
        raise NotImplementedError

    def by_size(self, m: Any, given: Any) -> Sequence[Sized]:
        """A batch that is no tensor of images, as images of one size each.

        Raises:
            ZooError: If the family takes nothing else, or not this.
        """
        raise ZooError(
            f"expected images, a tensor of shape (B, C, H, W), got {type(given).__name__}"
        )

    def embed(self, m: Any, images: Tensor) -> Embedded:
        """Patch and position embedding, prefix tokens included."""
        raise NotImplementedError

    def biased(self, m: Any) -> bool:
        """Whether `bias` has an answer."""
        return False

    def bias(self, m: Any, embedded: Embedded, block: int, t: Tokens, changed: bool) -> Any:
        """What the attention of a block adds to its logits because of where tokens are.

        Args:
            m: The backbone.
            embedded: From `embed`.
            block: Index of the block.
            t: Its tokens now.
            changed: Whether tokens are no longer in their first places.

        Returns:
            `(1 or B, H, P+N, P+N)`, see `zoo.adapters.bias`; None for nothing.
        """
        return None

    def raster(self, m: Any, images: Tensor, grid: tuple[int, int], **options: Any) -> Tensor:
        """The pixels of the patches and no others, `(B, C, rows * height, columns * width)`.

        Args:
            m: The backbone.
            images: What it was given: with a margin that is in no patch, or to be padded.
            grid: Patch grid `(rows, columns)`.
            options: Of the call.
        """
        height, width = (n * p for n, p in zip(grid, self.patch_size(m), strict=True))
        x = images[..., :height, :width]
        missing = height - x.shape[2], width - x.shape[3]
        return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x

    def why_one_piece(self, m: Any) -> str:
        """Why there are no `patches` and `positions`; empty where there are."""
        return f"the embedding of a {type(m).__name__} is not known to come apart into these"

    def patches(self, m: Any, images: Tensor) -> Tensor:
        """Patches without a position, `(B, N, C)`, of images of any size that patches divide."""
        raise NotImplementedError

    def positions(self, m: Any, grid: tuple[int, int]) -> Tensor:
        """What is added to patches that lie in such a grid, `(1, N, C)`."""
        raise NotImplementedError

    def pre_norm(self, m: Any, x: Tensor) -> Tensor:
        """The norm before the first block, where there is one."""
        return x

    def whole(self, m: Any, images: Tensor) -> Tensor:
        """What the model itself makes of images, as `leave` answers."""
        return m(images)  # type: ignore[no-any-return]

    def as_timm(self, m: Any) -> Any:
        """The model, or what has timm's names for its norm and its head, for those who answer."""
        return m

    def norm(self, m: Any, x: Tensor) -> Tensor:
        """The norm behind the last block."""
        raise NotImplementedError

    def norm_maps(self, m: Any, x: Tensor) -> Tensor:
        """The norm that features of single blocks go through where it is asked for."""
        return self.norm(m, x)

    def why_all_tokens(self, m: Any) -> str:
        """Why the head needs more than the prefix tokens; empty where it reads nothing else."""
        return f"the classifier of a {type(m).__name__} is not known to read the class token alone"

    def settings(self, m: Any) -> dict[str, Any]:
        """Arguments that build a model like this one again, read off the model itself.

        Of timm's models they are known to whoever built them, and nothing is read here.
        """
        return {}

    def stem(self, m: Any) -> nn.Module:
        """What makes tokens of images."""
        raise NotImplementedError

    def stem_of_layers(self, m: Any) -> bool:
        """Whether the stem has several layers, with maps of different sizes."""
        return False

    def position_macs(self, m: Any) -> int:
        """Multiply-accumulates of layers that make position biases, and see no image."""
        return 0

    def head_macs(self, m: Any, tokens: int) -> tuple[int, int]:
        """Linear and attention multiply-accumulates of pooling and classifier.

        Args:
            m: The backbone.
            tokens: What enters, prefix included.
        """
        raise NotImplementedError

    def classifier(self, m: Any) -> Any:
        """The layer that classifies, or several; None where nothing does."""
        return None

    def reset_classifier(self, m: Any, classes: int, pool: str | None = None) -> None:
        """Put a new classifier in place of the old one.

        Raises:
            ZooError: If this kind of model has none.
        """
        raise ZooError(f"a {self.title} has no classifier that could be replaced")

    def features(self, m: Any) -> int:
        """Width of what the classifier reads."""
        return self.width(m)

    def checkpointing(self, m: Any) -> bool:
        """Whether blocks run again in the backward pass."""
        return bool(getattr(m, "grad_checkpointing", False))

    def class_embedding(self, m: Any) -> Tensor | None:
        """What the class token starts as, broadcastable to `(1, 1, C)`; None where nobody knows."""
        return None

    def places_prefix(self, m: Any) -> bool:
        """Whether prefix tokens have a position embedding of their own."""
        return False

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """Starts of the names of parameters behind the last block: its norm, pooling, heads."""
        return ()

    def set_checkpointing(self, m: Any, enable: bool) -> None:
        """Switch that."""
        m.grad_checkpointing = enable

    def undecayed(self, m: Any) -> set[str]:
        """Names of parameters that optimisers should not decay, where the model names some."""
        return set(m.no_weight_decay()) if hasattr(m, "no_weight_decay") else set()

    def groups(self, m: Any, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, as timm's `group_matcher` gives them."""
        raise ZooError(f"a {self.title} has no groups of layers")

    def weighs(self, m: Any) -> bool:
        """Whether `leave` has to know how many patches each token stands for."""
        return self.reads(m) == "patches"

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
        """Pool and classify tokens that went through `norm`; averages weigh tokens by size.

        Args:
            m: The backbone.
            t: Tokens after the final norm.
            pre_logits: Stop before the classifier.
        """
        raise NotImplementedError

    def classify(self, m: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`leave` for tokens of size one, `(B, P+N, C)`."""
        return self.leave(m, Tokens.start(x, self.prefix(m)), pre_logits)


#: Under this key stands the tower of backbones that run themselves: what is asked of them is
#: sizes and images.
STANDALONE = "standalone"
_TOWERS: dict[object, Tower] = {}


def _key(cls: type) -> object:
    """What makes a class run as it does: a subclass that overrides one of these is another one."""
    return getattr(cls, "forward_features", None), getattr(cls, "forward", None)


def register_tower(cls: type[nn.Module] | str, tower: Tower) -> None:
    """Support a class of backbones, and its subclasses that keep its forward."""
    _TOWERS[cls if isinstance(cls, str) else _key(cls)] = tower


def find_tower(m: nn.Module) -> Tower | None:
    """The tower of a backbone, None if its class is not supported."""
    cls = type(m)
    alone, key = as_standalone(m) is not None, _key(cls)
    if key not in _TOWERS:
        load_families(cls)
    return _TOWERS.get(STANDALONE if alone and key not in _TOWERS else key)


def tower_of(m: nn.Module) -> Tower:
    """The tower of a backbone.

    Raises:
        UnsupportedModel: Naming the class and what is supported.
    """
    tower = find_tower(m)
    if tower is None:
        if reason := why_no_model(m):
            raise UnsupportedModel(reason)
        inner = next((n for n, child in m.named_children() if _supported(child)), None)
        raise UnsupportedModel(why_unsupported(m, inner))
    return tower


def _supported(m: nn.Module) -> bool:
    return find_tower(m) is not None


def check_backbone(m: nn.Module) -> None:
    """Refuse a model that the wrapper would run differently from itself.

    A standalone backbone runs itself, so it is never refused.

    Raises:
        UnsupportedModel: Naming the class and what is supported.
    """
    if as_standalone(m) is not None:
        return
    tower = tower_of(m)
    tower.check(m)
    for block in tower.blocks(m):
        if shell := why_shell(block, in_place=False):
            raise UnsupportedModel(shell.replace("the model is", "a block is", 1))
        block_adapter(block)


def class_tokens(m: nn.Module) -> int:
    """Leading tokens that together act as the class token; 0 where there is none."""
    tower = find_tower(m)
    return 0 if tower is None else tower.class_tokens(m)


def has_class_token(m: nn.Module) -> bool:
    """Whether token 0 is a class token, or part of one."""
    return class_tokens(m) > 0


def rope_for(embedded: Embedded, block: int, t: Tokens, positions_changed: bool) -> Tensor | None:
    """Rotary table of the tokens that are there now.

    Args:
        embedded: From `Tower.embed`.
        block: Index of the block.
        t: Current tokens.
        positions_changed: Whether tokens are no longer in their first places.

    Returns:
        A table broadcastable to `(B, H, N, 2d)`, or None. A token without position (origin -1)
        is not rotated.
    """
    rope = embedded.rope
    if rope is None:
        return None
    rope = rope[block] if embedded.mixed else rope
    if not positions_changed:
        return rope
    assert t.origin is not None
    if rope.dim() == 4:
        raise ZooError("patch dropout together with a reducer is not supported for rotary models")
    half = rope.shape[-1] // 2
    still = rope.new_zeros(rope.shape[:-2] + (1, rope.shape[-1]))
    still[..., half:] = 1.0
    table = torch.cat([rope, still], dim=-2)
    index = torch.where(t.origin < 0, table.shape[-2] - 1, t.origin)
    rows = table[..., index, :]  # (B, N, 2d) or (H, B, N, 2d)
    return rows.unsqueeze(1) if rows.dim() == 3 else rows.transpose(0, 1)

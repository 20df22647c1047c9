"""A reservoir of class tokens that corrects zero-shot answers over a stream of images (TCA).

Experimental: the answers of an image depend on the images before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Options(NamedTuple):
    """How it remembers and corrects; the defaults are those of the release for ImageNet.

    Attributes:
        size: Images kept per class.
        weight: Of the correction, in units of the logits.
        sharpness: How fast it falls with the distance of class tokens.
        scale: Of the weights of the blocks: the smaller, the more the last ones count.
    """

    size: int = 3
    weight: float = 3.0
    sharpness: float = 5.0
    scale: float = 0.1


class Reservoir:
    """Of every class, the images whose answers were sure and that differ from each other.

    Args:
        classes: How many there are.
        options: See `Options`; None are the defaults.

    References:
        Wang et al., ICCV 2025, arXiv 2410.14729, second half; its first is the reducer `tca`.
    """

    def __init__(self, classes: int, options: Options | None = None) -> None:
        self.options = options or Options()
        self._kept: list[list[_Item]] = [[] for _ in range(classes)]

    def __len__(self) -> int:
        return sum(map(len, self._kept))

    def see(self, logits: Tensor, feature: Tensor, tokens: Tensor) -> Tensor:
        """Take in one image, and correct its answer by what is remembered, itself included.

        Args:
            logits: Of its classes `(K,)`, as they stand in the softmax.
            feature: Its embedding `(D,)`.
            tokens: Its class token behind every block, `(L, C)`.

        Returns:
            Logits `(K,)`.
        """
        logits = logits.float()
        chances = logits.softmax(-1)
        unsure = float(torch.special.entr(chances).sum())
        item = _Item(unsure, normalize(feature.float(), dim=-1), tokens.float())
        self._push(int(logits.argmax()), item)
        return logits + self.options.weight * self._affinity(item.tokens, len(logits))

    def _push(self, of_class: int, item: _Item) -> None:
        kept = [*self._kept[of_class], item]
        if len(kept) > self.options.size:
            x = torch.stack([each.feature for each in kept])
            alike = (x @ x.T).fill_diagonal_(0.0).sum(1) / max(1, len(kept) - 1)
            cost = torch.tensor([each.unsure for each in kept], device=x.device) + alike
            del kept[int(cost.argmax())]
        self._kept[of_class] = sorted(kept, key=lambda each: each.unsure)

    def _affinity(self, tokens: Tensor, classes: int) -> Tensor:
        """Sum over the remembered images of each class of how near their class tokens are."""
        places = [c for c, kept in enumerate(self._kept) for _ in kept]
        known = torch.stack([each.tokens for kept in self._kept for each in kept])
        blocks = torch.linspace(0, 1, len(tokens), device=tokens.device) / self.options.scale
        near = (normalize(known, dim=-1) * normalize(tokens, dim=-1)).sum(-1)  # (items, L)
        near = torch.exp(-self.options.sharpness * (1 - near @ blocks.softmax(-1)))
        return near.new_zeros(classes).index_add(0, torch.tensor(places, device=near.device), near)

    def anchors(self) -> Tensor | None:
        """Mean class tokens of every class `(K, L, C)`; None until each has more than one image."""
        if any(len(kept) < 2 for kept in self._kept):
            return None
        means = [torch.stack([each.tokens for each in kept]).mean(0) for kept in self._kept]
        return torch.stack(means)


class _Item(NamedTuple):
    unsure: float
    feature: Tensor
    tokens: Tensor

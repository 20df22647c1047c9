"""DiffRate's own cost formula, for comparing with the numbers that paper prints.

It counts multiply-accumulates like everything here, but the patch embedding once per token, class
token included, and no matching. `zoo.cost.analytic` counts real models; this is arithmetic on a
table of widths, and covers the hierarchical CAFormer that no adapter covers.

References:
    DiffRate, ICCV 2023, arXiv 2305.17997; official code github.com/OpenGVLab/DiffRate (no licence
    file; the formula is restated from a specification).
"""

from __future__ import annotations

from collections.abc import Sequence

# CAFormer at 224 pixels: per stage, tokens, width, blocks, input width and kernel of the
# downsampling in front of it; the first two stages are convolutional, the last two attend.
_CAFORMER = (
    (3136, 64, 3, 3, 7),
    (784, 128, 12, 64, 3),
    (196, 320, 18, 128, 3),
    (49, 512, 3, 320, 3),
)


def attention_block_macs(entering: int, leaving: int, width: int) -> int:
    """One transformer block with reduction between attention and an MLP of ratio 4."""
    return 4 * entering * width**2 + 2 * entering**2 * width + 8 * leaving * width**2


def effective_counts(start: int, *lists: Sequence[int]) -> list[int]:
    """Tokens after each block when each list is an upper limit: `min(n, p[i], m[i])`."""
    counts = []
    for limits in zip(*lists, strict=True):
        start = min(start, *limits)
        counts.append(start)
    return counts


def vit_macs(tokens: Sequence[int], start: int, width: int, patch: int, classes: int = 1000) -> int:
    """A plain ViT in DiffRate's convention.

    Args:
        tokens: Tokens after each block, class token included.
        start: Tokens at the start, class token included.
        width: C.
        patch: Patch size in pixels.
        classes: Number of classes.
    """
    total = start * width * 3 * patch**2 + width * classes
    for leaving in tokens:
        total += attention_block_macs(start, leaving, width)
        start = leaving
    return total


def caformer_s36_macs(merge_kept: Sequence[int] | None = None, classes: int = 1000) -> int:
    """CAFormer-S36 at 224 pixels in DiffRate's convention.

    Args:
        merge_kept: Tokens kept in each of the 18 attention blocks of stage 3 and the 3 of stage 4,
            which starts from the full grid again. None is the dense model.
        classes: Number of classes.

    Raises:
        ValueError: If there are not 21 counts.
    """
    if merge_kept is not None and len(merge_kept) != 21:
        raise ValueError(f"expected 21 counts (18 + 3 attention blocks), got {len(merge_kept)}")
    total = 8 * _CAFORMER[-1][1] * classes
    for stage, (n, width, blocks, width_in, kernel) in enumerate(_CAFORMER):
        total += n * width * kernel**2 * width_in
        if stage < 2:
            total += blocks * (12 * n * width**2 + 2 * 49 * n * width)
            continue
        limits = None if merge_kept is None else merge_kept[:18] if stage == 2 else merge_kept[18:]
        counts = [n] * blocks if limits is None else effective_counts(n, limits)
        entering = n
        for leaving in counts:
            total += attention_block_macs(entering, leaving, width)
            entering = leaving
    return total

"""CubistMerge: merge neighbours row by row and column by column, so that the grid stays one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reduction.assignment import Merge, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, is_list, one_of
from reduction.counts import Step
from reduction.errors import ZooError
from reduction.functional.lines import Thinned, thin
from reduction.functional.rasters import shape_of, shapes
from reduction.registry import register
from reduction.tokens import Signals, Tokens

SIMILARITIES = ("cosine", "distance")


@register("cubistmerge")
class CubistMerge(Reducer):
    """Spatial-preserving merging: the tokens lie in a raster of rows and columns afterwards, too.

    Before a block every row loses the same number of tokens, then every column of what is left.
    Only odd places leave; each joins the left or right (upper or lower) neighbour that it resembles
    more, those with the highest similarity first. A merged token has, feature by feature, the entry
    of the largest magnitude among its members, and the place of the neighbour that stays.

    How many rows and columns leave follows from what the schedule keeps, as equal as possible
    (ours), unless `rows` and `columns` say so.

    Args:
        rows: Rows that leave where the schedule reduces, or a list with one number for each time;
            the schedule then only says where. None: from the schedule.
        columns: Columns that leave, likewise; both are given, or neither.
        similarity: "cosine", or "distance" (Euclidean, small is similar).
        compat_last_writer: Where two tokens join the same one, lose the one that the official code
            loses: it writes both and the later write stays.

    Raises:
        ZooError: If an argument is out of range, or only one of `rows` and `columns` is given.

    References:
        Gong and Lis, arXiv 2509.21764; official code is a fork of ToMe (CC-BY-NC 4.0; this
        implementation is written from a specification, not from that code).
    """

    card = Card(
        title="CubistMerge: Spatial-Preserving Token Merging for Diverse ViT Backbones",
        authors="Gong and Lis",
        venue="arXiv",
        year=2025,
        arxiv="2509.21764",
        code=None,
        licence=None,
        kind="merge",
        training="none",
        note="Tokens stay in a raster; two that join the same one are both heard, which the "
        "official code does not do.",
    )
    site = "pre"
    no_thresholds = "its grid stays rectangular, so every image loses as many"
    family = "geometric"
    added_tokens = "spare"

    def __init__(
        self,
        rows: int | Sequence[int] | None = None,
        columns: int | Sequence[int] | None = None,
        similarity: str = "cosine",
        compat_last_writer: bool = False,
    ) -> None:
        super().__init__()
        if (rows is None) != (columns is None):
            raise ZooError(f"give both rows and columns or neither, got {rows!r} and {columns!r}")
        self.rows = _removed("rows", rows)
        self.columns = _removed("columns", columns)
        self.similarity = one_of("similarity", similarity, SIMILARITIES)
        self.compat_last_writer = boolean("compat_last_writer", compat_last_writer)

    def max_drop(self, n: int) -> int:
        # Half of every row and of every column; with odd sides, less.
        return n - (n + 3) // 4

    def count(self, n: int, step: Step) -> int:
        rows, columns = self.smaller(n, step)[1]
        return rows * columns

    def smaller(self, n: int, step: Step) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape of a raster of n tokens before and behind a step.

        Raises:
            ZooError: If n is no number of tokens that this method leaves of the patch grid.
        """
        known = self._given(step.grid)
        rows, columns = now = shape_of(n, known)
        least = rows - rows // 2, columns - columns // 2
        if self.rows is not None:
            following = known[known.index(now) + 1 :] or [now]
            return now, (max(following[0][0], least[0]), max(following[0][1], least[1]))
        if step.keep >= n:
            return now, now
        fits = [s for s in known[known.index(now) :] if s[0] >= least[0] and s[1] >= least[1]]
        small = [s for s in fits if s[0] * s[1] <= step.keep]
        return now, (small or fits[-1:])[0]

    def _given(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Shapes that a grid can come to."""
        if self.rows is None or self.columns is None:
            return shapes(grid)
        known = [grid]
        listed = [len(v) for v in (self.rows, self.columns) if is_list(v)]
        for i in range(min(listed) if listed else sum(grid)):
            rows, columns = known[-1]
            r = self.rows if isinstance(self.rows, int) else self.rows[i]
            c = self.columns if isinstance(self.columns, int) else self.columns[i]
            known.append((rows - min(r, rows // 2), columns - min(c, columns // 2)))
        return list(dict.fromkeys(known))

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        (rows, columns), (fewer_rows, fewer_columns) = self.smaller(t.n, step)
        batch, n = t.x.shape[0], t.n
        x = t.patches.reshape(batch * rows, columns, -1)
        across = self._thin(x, columns - fewer_columns)
        x = _turned(across.x, rows)
        down = self._thin(x, rows - fewer_rows)
        x = _turned(down.x, fewer_columns).reshape(batch, fewer_rows * fewer_columns, -1)
        # Column and row that every place ends up in, and where every new token comes from.
        column = across.slot.view(batch, rows, columns)
        row = down.slot.view(batch, fewer_columns, rows)
        row = row.transpose(1, 2).gather(2, column)
        slot = (row * fewer_columns + column).view(batch, n)
        up = down.kept.view(batch, fewer_columns, fewer_rows).transpose(1, 2)
        left = across.kept.view(batch, rows, fewer_columns).gather(1, up)
        leader = (up * columns + left).reshape(batch, -1)
        # Of the features a mean would be taken, which nobody wants: one is enough to carry along.
        out = apply(t._replace(x=t.x[..., :1]), Merge(slot, leader))
        whole = torch.cat([t.x[:, : t.prefix], x], dim=1)
        return out._replace(x=whole, grid=(fewer_rows, fewer_columns))

    def _thin(self, x: Tensor, r: int) -> Thinned:
        return thin(x, r, self.similarity, self.compat_last_writer)


def _removed(name: str, value: int | Sequence[int] | None) -> int | list[int] | None:
    if is_list(value):
        return [count(name, v, 0) for v in value]
    return count(name, value, 0, null=True)  # type: ignore[return-value]


def _turned(x: Tensor, lines: int) -> Tensor:
    """Lines `(B * L, m, C)` as the lines across them, `(B * m, L, C)`."""
    return x.view(-1, lines, *x.shape[1:]).transpose(1, 2).reshape(-1, lines, x.shape[2])

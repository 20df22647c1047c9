"""Expedit: cluster a raster into a coarser one, and bring it back for dense outputs."""

from __future__ import annotations

import torch

from reduction.assignment import Mix, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, one_of, positive
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.rasters import shape_of, shapes
from reduction.functional.restoring import knn_weights, note_restore
from reduction.functional.superpixels import clusters, means
from reduction.mixins.restoring import Restores
from reduction.registry import register
from reduction.tokens import Signals, Tokens

RESTORES = ("knn", "copy")


@register("expedit")
class Expedit(Restores, Reducer):
    """Token clustering layer of Expedit: the tokens become the centres of a coarser raster.

    Behind a block, centres start as the averages of a coarse grid's cells. A few times, every patch
    spreads over the centres of cells near its own by a softmax of `-temperature * distance^2`, and
    the centres become the weighted means. The raster stays one, row by row.

    Args:
        iterations: Rounds.
        temperature: Factor on the squared distances.
        window: Cells on a side of the neighbourhood.
        rows: Rows of the coarse raster; None follows from what the schedule keeps, with the sides
            in proportion (ours).
        columns: Columns, likewise; both are given or neither, and the schedule then only says
            where.
        restore: How dense features come back: "knn", from the centres that a patch was closest to
            at the clustering (the paper's); "copy", from the closest one.
        neighbors: Centres of "knn".
        compat_l2: Divide the weights of "knn" by their Euclidean norm, as the official code; their
            sum is then not one.

    Raises:
        ZooError: If an argument is out of range, or only one of `rows` and `columns` is given.

    References:
        Liang et al., NeurIPS 2022, arXiv 2210.01035; official code
        github.com/Expedit-LargeScale-Vision-Transformer (Apache-2.0).
    """

    card = Card(
        title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
        authors="Liang et al.",
        venue="NeurIPS",
        year=2022,
        arxiv="2210.01035",
        code="https://github.com/Expedit-LargeScale-Vision-Transformer",
        licence="Apache-2.0",
        kind="soft merge",
        training="none",
        note="For dense outputs: one clustering in the middle, undone by its `restore`.",
    )
    site = "post"
    added_tokens = "spare"

    def __init__(
        self,
        iterations: int = 5,
        temperature: float = 0.02,
        window: int = 5,
        rows: int | None = None,
        columns: int | None = None,
        restore: str = "knn",
        neighbors: int = 20,
        compat_l2: bool = False,
    ) -> None:
        super().__init__()
        self.iterations = count("iterations", iterations)
        self.temperature = positive("temperature", temperature)
        self.window = count("window", window)
        self.rows = count("rows", rows, null=True)
        self.columns = count("columns", columns, null=True)
        if (rows is None) != (columns is None):
            raise ZooError(f"give both rows and columns or neither, got {rows!r} and {columns!r}")
        self.restore = one_of("restore", restore, RESTORES)
        self.neighbors = count("neighbors", neighbors)
        self.compat_l2 = boolean("compat_l2", compat_l2)

    def coarse(self, n: int, step: Step) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape of a raster of n tokens before and behind a step.

        Raises:
            ZooError: If n is no number of tokens that this method leaves of the patch grid.
        """
        known = shapes(step.grid, proportional=True)
        if self.rows is not None and self.columns is not None:
            asked = (min(self.rows, step.grid[0]), min(self.columns, step.grid[1]))
            return shape_of(n, [step.grid, asked]), asked
        now = shape_of(n, known)
        return now, next(s for s in known if s[0] * s[1] <= step.keep)

    def count(self, n: int, step: Step) -> int:
        rows, columns = self.coarse(n, step)[1]
        return rows * columns

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        now, coarse = self.coarse(t.n, step)
        found = clusters(t.patches, now, coarse, self.iterations, self.temperature, self.window)
        share = found.shares
        mass = (share * t.patch_size.unsqueeze(1)).sum(2)
        out = apply(t, Mix(means(share), mass=mass, leader=share.argmax(2)))
        out = out._replace(grid=coarse)
        if t.source is None:
            return out
        with torch.no_grad():
            x, centres = t.patches, found.centres
            back = knn_weights(x, centres, self.neighbors, self.temperature, l2=self.compat_l2)
            own = back.argmax(2).gather(1, t.source.clamp_min(0))
        out = out._replace(source=torch.where(t.source >= 0, own, -1))
        return note_restore(t, out, back) if self.restore == "knn" else out

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        (h, w), (rows, columns) = self.coarse(n, step)
        start = h * w * rows + rows * w * columns
        # Distances and weighted means of every round; those of the last are the new tokens.
        return (start + 2 * self.iterations * n * rows * columns) * dims.width

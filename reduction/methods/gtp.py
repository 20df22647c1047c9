"""GTP: drop the least attended tokens after handing part of them to their neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.assignment import Keep, Merge, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, count, finite, one_of, share
from reduction.counts import Dims, Step
from reduction.errors import ZooError
from reduction.functional.attention import class_row_of
from reduction.functional.graphs import neighbour_graph
from reduction.functional.portable import kth_smallest, stable_order
from reduction.mixins.attention import AttentionInput, AttentionOutput, OwnAttention
from reduction.mixins.following import Remembers
from reduction.registry import register
from reduction.tokens import Signals, Tokens, take_rows

SELECTIONS = (
    "mixed_attn_max",
    "mixed_attn_mean",
    "sum_attn_max",
    "cls_attn_max",
    "cls_attn_mean",
    "img_attn_max",
    "img_attn_mean",
    "diag_attn_max",
    "diag_attn_mean",
    "cos_sim_max",
    "cos_sim_mean",
)
PROPAGATIONS = ("graph", "mean", "none")
GRAPHS = ("mixed", "spatial", "semantic")


def importance(selection: str, prefix: int, map_: Tensor | None, row: Tensor | None) -> Tensor:
    """Score of each reducible token, `(B, N)`.

    Args:
        selection: One of `SELECTIONS`.
        prefix: Number of prefix tokens P.
        map_: Attention `(B, H, P+N, P+N)`; not needed for "cls_attn_*" when `row` is given.
        row: The class token's row `(B, H, P+N)`.
    """
    kind, _, over = selection.rpartition("_")

    def heads(x: Tensor) -> Tensor:
        x = x[..., prefix:]
        return x.amax(1) if over == "max" else x.mean(1)

    if kind == "cls_attn":
        assert row is not None
        return heads(row)
    assert map_ is not None
    if kind == "cos_sim":
        # The sum over all partners is one product with the sum of their directions.
        u = F.normalize(map_, dim=-1)
        return heads(-(u * u.sum(2, keepdim=True)).sum(-1))
    received = heads(map_.sum(2))
    if kind == "img_attn":
        return received
    own = heads(map_.diagonal(dim1=2, dim2=3))
    if kind == "diag_attn":
        return own
    return own + received if kind == "sum_attn" else own * received


@register("gtp")
class GTP(OwnAttention, Remembers, Reducer):
    """Graph-based Token Propagation.

    Once, from the embedded patches, a graph is made: spatial neighbours on the grid, semantic ones
    by cosine, or both; `W` is its symmetrically normalised matrix. Between attention and MLP of
    each block the tokens of lowest importance leave, and each kept token takes a share of its
    neighbours among them:

        x_kept <- x_kept + alpha * W[kept, left] x_left

    `W` is never normalised again. The attention map can be made sparse, and the importance is then
    taken from the sparse map.

    Args:
        selection: Importance. "mixed_attn": attention that a token pays itself times what it
            receives from all tokens; "sum_attn" adds them; "img_attn" what it receives alone;
            "diag_attn" what it pays itself; "cls_attn" what the class token pays it; "cos_sim" how
            little its row of attention resembles others (inferred, never compared with official
            tensors). "_max" or "_mean" over heads.
        propagation: "graph"; "mean" appends the mean of the leaving tokens instead; "none" is
            plain pruning.
        graph: "mixed" (spatial or semantic neighbours), "spatial" or "semantic".
        neighbours: Semantic neighbours of each patch. Not symmetric.
        alpha: Share that is handed on. The authors' best for DeiT-B: 0.1 to 0.3.
        sparsity: Share of the entries of each head's attention map that is kept in blocks that
            reduce; the others are set to zero without normalising again. 1 keeps the fused kernel
            where the importance allows it.
        token_scale: Hand on sizes like features, and add their logarithm to the attention logits.
            They do not add up to the number of patches.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Xu et al., WACV 2024, arXiv 2311.03035; official code github.com/Ackesnal/GTP-ViT
        (Apache-2.0; this implementation is written from a specification, not from that code).
    """

    card = Card(
        title="GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation",
        authors="Xu et al.",
        venue="WACV",
        year=2024,
        arxiv="2311.03035",
        code="https://github.com/Ackesnal/GTP-ViT",
        licence="Apache-2.0",
        kind="prune + propagate",
        training="none",
        note="The default importance needs the whole attention map in blocks that reduce.",
    )
    site = "mid"
    family = "constant_r"
    added_tokens = "spare"

    def __init__(
        self,
        selection: str = "mixed_attn_max",
        propagation: str = "graph",
        graph: str = "mixed",
        neighbours: int = 8,
        alpha: float = 0.1,
        sparsity: float = 1.0,
        token_scale: bool = False,
    ) -> None:
        super().__init__()
        self.selection = one_of("selection", selection, SELECTIONS)
        self.propagation = one_of("propagation", propagation, PROPAGATIONS)
        self.graph = one_of("graph", graph, GRAPHS)
        self.neighbours = count("neighbours", neighbours, 0)
        self.alpha = share("alpha", alpha)
        if not (finite(sparsity) and 0 < sparsity <= 1):
            raise ZooError(f"sparsity is the share of entries kept, in (0, 1], got {sparsity!r}")
        self.sparsity = sparsity
        self.token_scale = boolean("token_scale", token_scale)
        if graph == "semantic" and neighbours == 0 and propagation == "graph":
            raise ZooError("a semantic graph without neighbours is empty; use propagation='none'")
        self.prop_attn = token_scale
        row_only = self.needs_class_token and sparsity == 1
        self.needs = frozenset({"cls_row" if row_only else "attn", "origin"})

    @property
    def needs_class_token(self) -> bool:
        return self.selection.startswith("cls_attn")

    @property
    def _propagates(self) -> bool:
        return self.propagation == "graph" and self.alpha != 0

    @property
    def _semantic(self) -> bool:
        """Whether every image has a graph of its own, from a product of all patches with all."""
        return self.graph != "spatial" and self.neighbours > 0

    def begin(self, t: Tokens) -> Tokens:
        if not self._propagates:
            return t
        # The graph needs the grid, which the first reduction knows.
        return t._replace(memory={**t.memory, "embedded": t.patches.detach()})

    def inside(self, t: Tokens) -> bool:
        return self.sparsity < 1

    def attend(self, a: AttentionInput, t: Tokens, step: Step | None) -> AttentionOutput | None:
        n = t.prefix + t.n  # a plain number, of which a tracer takes no share in float32
        zeros = int(n * n * (1 - self.sparsity))
        if step is None or zeros < 1:
            return None
        map_ = a.logits().softmax(-1)
        least = kth_smallest(map_.detach().float().flatten(2), zeros)
        sparse = torch.where(map_ >= least[..., None, None], map_, 0.0)
        out = a.dropped(sparse) @ a.v
        # Many scores of the sparse map are exactly zero; the full one decides among them.
        rest = importance(
            self.selection, t.prefix, map_.detach(), class_row_of(map_.detach(), a.class_tokens)
        )
        signals = Signals(cls_row=class_row_of(sparse, a.class_tokens), attn=sparse)
        return AttentionOutput(out, signals, t._replace(memory={**t.memory, "rest": rest}))

    def count(self, n: int, step: Step) -> int:
        if step.keep >= n:
            return n
        return step.keep + (self.propagation == "mean")

    @torch.no_grad()
    def _order(self, t: Tokens, s: Signals, rest: Tensor | None) -> Tensor:
        """Tokens by descending importance, `(B, N)`."""
        row = s.cls_row
        if row is None and s.attn is not None:
            row = class_row_of(s.attn, 1)
        score = importance(self.selection, t.prefix, s.attn, row)
        if rest is None:
            return stable_order(score, descending=True)
        order = stable_order(rest[:, : t.n], descending=True)
        again = stable_order(score.gather(1, order), descending=True)
        return order.gather(1, again)

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        memory = dict(t.memory)
        order = self._order(t, s, memory.pop("rest", None))
        t = t._replace(memory=memory)
        kept, left = order[:, : step.keep], order[:, step.keep :]
        if self.propagation == "mean":
            return apply(t, self._append_mean(kept, left))
        if not self._propagates:
            return apply(t, Keep(kept))
        graph = t.memory.get("graph")
        if graph is None:
            graph = self._graph(t, step.grid)
            t = t._replace(memory={"graph": graph})
        assert t.origin is not None
        rows, columns = t.origin.gather(1, kept), t.origin.gather(1, left)
        if self._semantic:
            share = take_rows(graph, rows)
        else:
            share = graph[0].index_select(0, rows.flatten()).view(*rows.shape, -1)
        share = share.gather(2, columns.unsqueeze(1).expand(-1, step.keep, -1)) * self.alpha
        gain = torch.bmm(share.to(t.x.dtype), take_rows(t.patches, left))
        out = apply(t, Keep(kept))
        out = out._replace(x=_add_behind(out.x, gain, t.prefix))
        if self.token_scale:
            scale = (share * t.patch_size.gather(1, left).unsqueeze(1)).sum(2)
            out = out._replace(size=_add_behind(out.size, scale, t.prefix), unit=False)
        return out

    def _graph(self, t: Tokens, grid: tuple[int, int]) -> Tensor:
        # A reducer that meets its first tokens in the middle of a model has only those.
        x = t.memory.get("embedded", t.patches)[:, : grid[0] * grid[1]]
        count = self.neighbours if self._semantic else 0
        return neighbour_graph(x, grid, count, spatial=self.graph != "semantic")

    @staticmethod
    def _append_mean(kept: Tensor, left: Tensor) -> Merge:
        keep, n = kept.shape[1], kept.shape[1] + left.shape[1]
        rows = torch.arange(keep, device=kept.device).expand_as(kept)
        slot = kept.new_full((kept.shape[0], n), keep).scatter(1, kept, rows)
        coef = torch.where(slot == keep, 1.0 / left.shape[1], 1.0)
        return Merge(slot, torch.cat([kept, left[:, :1]], dim=1), coef=coef)

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        if not self._propagates:
            return 0
        handed_on = step.keep * (n - step.keep) * dims.width
        patches = step.grid[0] * step.grid[1]
        # The first reduction, the only one that sees all patches, makes the graph.
        return handed_on + (patches**2 * dims.width if self._semantic and n == patches else 0)


def _add_behind(x: Tensor, gain: Tensor, prefix: int) -> Tensor:
    """Add to everything but the prefix."""
    if not prefix:
        return x + gain
    return torch.cat([x[:, :prefix], x[:, prefix:] + gain], dim=1)

"""DToMe: merge what is more alike than a threshold, which unlabelled images have set."""

from __future__ import annotations

from torch import Tensor

from reduction.assignment import Merge, apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, number, positive
from reduction.counts import Dims, Step
from reduction.functional.joining import above, best_of_batch, joined, partners
from reduction.functional.matching import head_sum, split_sizes
from reduction.mixins.calibrating import Calibrates, note_threshold
from reduction.registry import register
from reduction.tokens import Signals, Tokens


@register("dtome")
class DToMe(Calibrates, Reducer):
    """Dynamic Token Merging of DyMU: ToMe with one threshold per block instead of a count.

    Between attention and MLP tokens alternate between two sets as in ToMe, and every one of the
    first set that resembles one of the second by more than the block's threshold (cosine of the
    keys, mean over heads) joins it, in a size-weighted mean. How many do depends on the image.

    Thresholds come from unlabelled images, `zoo.calibrate`: the most similar pairs of a whole batch
    merge, and a threshold is the similarity of the first pair that does not, averaged over batches.
    Before that they are 1 and the method merges what the schedule says, as ToMe.

    Args:
        limit: Merge further pairs until no more tokens are left than the schedule says (ours).
            Calibration switches it off.
        max_r_per_instance_ratio: At most this many times the calibrated count merge in an image.
        compat_eps: Added to sizes that means divide by in calibration; officially 1e-4.
        prop_attn: Proportional attention.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Wang et al., arXiv 2504.17040; official code github.com/MikeWangWZHL/dymu; written from a
        specification.
    """

    card = Card(
        title="DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs",
        authors="Wang et al.",
        venue="arXiv",
        year=2025,
        arxiv="2504.17040",
        code="https://github.com/MikeWangWZHL/dymu",
        licence="MIT, parts CC-BY-NC 4.0",
        kind="merge",
        training="none; thresholds from unlabelled images",
        note="Counts depend on the image once thresholds are calibrated; every image as if alone.",
    )
    site = "mid"
    needs = frozenset({"k"})
    family = "constant_r"
    every_block = True

    def __init__(
        self,
        limit: bool = True,
        max_r_per_instance_ratio: float | None = None,
        compat_eps: float = 0.0,
        prop_attn: bool = True,
    ) -> None:
        super().__init__()
        self.limit = boolean("limit", limit)
        self.max_r_per_instance_ratio = positive(
            "max_r_per_instance_ratio", max_r_per_instance_ratio, null=True
        )
        self.compat_eps = number("compat_eps", compat_eps, 0)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.no_thresholds_yet()

    def max_drop(self, n: int) -> int:
        return n // 2 if self.limit else n - 1  # thresholds alone: nothing is asked for

    def count(self, n: int, step: Step) -> int:
        return min(n, step.keep) if self.limit else n

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        if self.calibrating is None:
            return super().reduce(t, s, step)
        r = min(self.calibrating[step.block], (t.n + t.prefix - 1) // 2)
        if not r:
            return t
        p = partners(t, self._metric(t, s))
        ratio = self.max_r_per_instance_ratio
        most = None if ratio is None else int(ratio * self.calibrating[step.block])
        merged, threshold = best_of_batch(p, r, most)
        a = joined(t, p, merged, None, untouched=False, eps=self.compat_eps)
        return note_threshold(apply(t, a), step.block, step.depth, threshold)

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        assert self.thresholds is not None
        p = partners(t, self._metric(t, s))
        keep = step.keep if self.limit else None
        most = self.most(step.block, self.max_r_per_instance_ratio)
        merged = above(p, self.thresholds[step.block], keep, most)
        return joined(t, p, merged, keep, by_similarity=not t.prefix)

    def _metric(self, t: Tokens, s: Signals) -> Tensor:
        return head_sum(s.need("k")[:, :, t.prefix :].detach())

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * dims.head_dim

"""DToMe: merge what is more alike than a threshold, which unlabelled images have set."""

from __future__ import annotations

from reduction.assignment import apply
from reduction.base import Card, Reducer
from reduction.checks import boolean, number, one_of, positive
from reduction.counts import Dims, Step
from reduction.functional.energy import ENERGIES, energy
from reduction.functional.joining import Decision, Partners, joined, partners
from reduction.functional.matching import head_sum, split_sizes, unit
from reduction.mixins.calibrating import Calibrates
from reduction.registry import register
from reduction.tokens import Signals, Tokens

METRICS = ("key", "feature")


@register("dtome")
class DToMe(Calibrates, Reducer):
    """Dynamic Token Merging of DyMU: ToMe with one threshold per block instead of a count.

    Between attention and MLP tokens alternate between two sets as in ToMe, and every one of the
    first set that resembles one of the second by more than the block's threshold (cosine of the
    keys, mean over heads) joins it, in a size-weighted mean. How many do depends on the image.

    Thresholds come from unlabelled images, `zoo.calibrate`: the most similar pairs of a whole batch
    merge, and a threshold is the similarity of the first pair that does not, averaged over batches.
    Before that they are 1 and the method merges what the schedule says, as ToMe.

    Other ways of pairing take thresholds as well (ours): tokens may be compared by their features,
    and the two sets may alternate by PiToMe's energy instead of by place.

    Args:
        limit: Merge further pairs until no more tokens are left than the schedule says (ours).
            Calibration switches it off.
        max_r_per_instance_ratio: At most this many times the calibrated count merge in an image.
        compat_eps: Added to sizes that means divide by in calibration; officially 1e-4.
        prop_attn: Proportional attention.
        metric: What is compared: "key", or "feature" (the residual stream).
        order: Over what the two sets alternate: "sequence", or "energy": patches by falling energy
            as in `pitome`.
        margin: Of that energy, as there.
        energy: Likewise.

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
    family = "constant_r"
    every_block = True

    def __init__(
        self,
        limit: bool = True,
        max_r_per_instance_ratio: float | None = None,
        compat_eps: float = 0.0,
        prop_attn: bool = True,
        metric: str = "key",
        order: str = "sequence",
        margin: float = 0.75,
        energy: str = "elu",
    ) -> None:
        super().__init__()
        self.limit = boolean("limit", limit)
        self.max_r_per_instance_ratio = positive(
            "max_r_per_instance_ratio", max_r_per_instance_ratio, null=True
        )
        self.compat_eps = number("compat_eps", compat_eps, 0)
        self.prop_attn = boolean("prop_attn", prop_attn)
        self.metric = one_of("metric", metric, METRICS)
        self.needs = frozenset({"k"}) if metric == "key" else frozenset()
        self.order = one_of("order", order, ("sequence", "energy"))
        self.margin = number("margin", margin)
        self.energy = one_of("energy", energy, ENERGIES)
        self.no_thresholds_yet()

    def max_drop(self, n: int) -> int:
        return n // 2 if self.limit else n - 1  # thresholds alone: nothing is asked for

    def count(self, n: int, step: Step) -> int:
        return min(n, step.keep) if self.limit else n

    def unite(self, t: Tokens, s: Signals, step: Step, d: Decision) -> Tokens:
        """Size-weighted means; officially rows lie in another order in calibration."""
        if self.calibrating is not None:
            return apply(t, joined(t, *d, untouched=False, eps=self.compat_eps))
        return apply(t, joined(t, *d, by_similarity=not t.prefix))

    def partners(self, t: Tokens, s: Signals, step: Step) -> Partners:
        metric = t.patches.detach()
        if self.metric == "key":
            metric = head_sum(s.need("k")[:, :, t.prefix :].detach())
        if self.order == "sequence":
            return partners(t, metric)
        u = unit(metric)
        similarity = u @ u.transpose(1, 2)
        live = None if t.mask is None else t.mask[:, t.prefix :]
        margin = self.margin - self.margin * step.block / step.depth
        return partners(t, metric, energy(similarity, margin, self.energy, live))

    def macs(self, n: int, prefix: int, step: Step, dims: Dims) -> int:
        width = dims.head_dim if self.metric == "key" else dims.width
        if self.order == "energy":
            return (n * n + (n + 1) // 2 * (n // 2)) * width
        senders, receivers = split_sizes(n, prefix)
        return senders * receivers * width

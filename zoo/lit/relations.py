"""TRG: distillation by the relations among tokens, which tokens of a reduced student keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reduction.mixins.training import Outcome
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT

_ORDERS = ("student", "teacher")


class Pairs(NamedTuple):
    """Tokens of a student, and what a teacher makes of the same patches.

    Attributes:
        student: `(B, N, C)`.
        teacher: Mean over the patches that each stands for, `(B, N, D)`.
        real: Which of them stand for a patch at all, `(B, N)` bool.
    """

    student: Tensor
    teacher: Tensor
    real: Tensor


class TokenRelations(nn.Module):
    """Cross-entropy, and relations among tokens as a dense teacher has them.

    Three graphs are compared, between the student's tokens behind its final norm and the teacher's:
    each image's similarities (`inner`), neighbours among tokens of the whole batch (`local`), and
    which token is which among all of them (`global`). The student's tokens are paired through the
    source map: a token goes with the mean of the teacher's over the patches that it stands for,
    and patches that were dropped take no part.

    Args:
        teacher: Dense model: `vit_digits`, a model folder, a checkpoint, `hf-hub:ORG/NAME`, or a
            timm name, for its pretrained weights. None is the student's own backbone with nothing
            reduced, as it is before training.
        label_smoothing: Share of the target that all classes get.
        tokens: How many are drawn from a batch for `local` and `global`.
        neighbours: Edges of a token in its graph.
        sigma: Width of the edges' weights, of tokens of length one.
        order: Of the divergence between graphs: "student" is KL(student || teacher).
        temperature: Of `global`, at the start and at the end of training.
        inner_weight: Of `inner`.
        local_weight: Of `local`.
        global_weight: Of `global`.
        logit_weight: Of the divergence of the two answers; 0 where their classes differ.
        logit_temperature: Of it.

    Raises:
        ZooError: If an argument is out of range.

    References:
        Zhang et al., arXiv 2306.12442, without official code; the pairing is ours.
    """

    def __init__(
        self,
        teacher: str | None = None,
        label_smoothing: float = 0.1,
        tokens: int = 256,
        neighbours: int = 8,
        sigma: float = 1.0,
        order: str = "student",
        temperature: Sequence[float] = (0.5, 0.1),
        inner_weight: float = 1.0,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        logit_weight: float = 1.0,
        logit_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if order not in _ORDERS:
            raise ZooError(f"loss.order must be one of {_ORDERS}, got {order!r}")
        if len(temperature) != 2 or not min(temperature) > 0:
            raise ZooError(f"loss.temperature: expected two numbers above 0, got {temperature}")
        for name, value, least in (
            *(("tokens", tokens, 2), ("neighbours", neighbours, 1)),
            *(("sigma", sigma, 1e-6), ("logit_temperature", logit_temperature, 1e-6)),
            *(("inner_weight", inner_weight, 0), ("local_weight", local_weight, 0)),
            *(("global_weight", global_weight, 0), ("logit_weight", logit_weight, 0)),
        ):
            if not value >= least:
                raise ZooError(f"loss.{name} must be at least {least}, got {value}")
        self.teacher = teacher
        self.tokens, self.neighbours, self.sigma, self.order = tokens, neighbours, sigma, order
        self.temperature = tuple(temperature)
        self.inner_weight, self.local_weight = inner_weight, local_weight
        self.global_weight, self.logit_weight = global_weight, logit_weight
        self.logit_temperature = logit_temperature
        self.classification = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.projection: nn.Module = nn.Identity()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The classification alone: `(B, K)` and labels `(B,)` or `(B, K)`."""
        return self.classification(logits, labels)  # type: ignore[no-any-return]

    def fit(self, student: ReducedViT, teacher: ReducedViT) -> None:
        """Make what turns tokens of one model to the width of the other.

        Raises:
            ZooError: The two do not see the same patches, or do not answer alike.
        """
        for name, model in (("student", student), ("teacher", teacher)):
            if model.anatomy.alone is not None:
                raise ZooError(
                    f"loss=trg compares tokens, and the {name}, a "
                    f"{type(model.backbone).__name__}, runs itself; choose a plain vision "
                    "transformer, or another loss"
                )
        if teacher.reducer is not None:
            raise ZooError("loss.teacher: expected a dense model, and this one has a reducer")
        sizes = [m.tower.input_size(m.backbone) for m in (student, teacher)]
        if student.grid != teacher.grid or sizes[0] != sizes[1]:
            shown = [f"{m.grid[0]}x{m.grid[1]} patches of {s[1]}x{s[2]} pixels in {s[0]} channels"
                     for m, s in zip((student, teacher), sizes, strict=True)]  # fmt: skip
            raise ZooError(
                f"loss.teacher: expected {shown[0]}, as the student has, got {shown[1]}; tokens "
                "are compared place by place"
            )
        if self.logit_weight and student.num_classes != teacher.num_classes:
            raise ZooError(
                f"loss.teacher has {teacher.num_classes} classes, the student "
                f"{student.num_classes}: their answers cannot be compared; type loss.logit_weight=0"
            )
        if self.global_weight:
            widths = (student.tower.width(student.backbone), teacher.tower.width(teacher.backbone))
            self.projection = nn.Linear(*widths, bias=False)
            if widths[0] == widths[1]:
                nn.init.eye_(self.projection.weight)

    def relations(self, student: Outcome, teacher: Outcome, done: float) -> dict[str, Tensor]:
        """The losses of one batch by name, weights included.

        Args:
            student: With its source map.
            teacher: Of the same images.
            done: Share of the training that is over.

        Raises:
            ZooError: No token of the student is left with a patch.
        """
        pairs = paired(student, teacher)
        found = {}
        if self.inner_weight:
            found["inner"] = self.inner_weight * inner(pairs)
        if self.local_weight or self.global_weight:
            s, t = self._drawn(pairs)
            if self.local_weight:
                found["local"] = self.local_weight * self._local(s, t)
            if self.global_weight:
                found["global"] = self.global_weight * self._global(s, t, done)
        if self.logit_weight:
            heat = self.logit_temperature
            p = (teacher.logits.float() / heat).log_softmax(-1)
            q = (student.logits.float() / heat).log_softmax(-1)
            gap = F.kl_div(q, p, reduction="batchmean", log_target=True)
            found["logits"] = self.logit_weight * heat**2 * gap
        return found

    def _drawn(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Tokens of both sides from all over the batch, `(n, C)` and `(n, D)`."""
        s, t = pairs.student[pairs.real], pairs.teacher[pairs.real]
        if len(s) < 2:
            raise ZooError(
                "loss=trg: no token of the batch is left that stands for a patch, so there is "
                "nothing to compare; choose a method with a source map, or another loss"
            )
        if len(s) > self.tokens:
            index = torch.randperm(len(s), device=s.device)[: self.tokens]
            s, t = s[index], t[index]
        return s, t

    def _graph(self, x: Tensor) -> Tensor:
        """Weights of the edges `(n, n)`: those to the nearest few, zero for all others."""
        x = F.normalize(x, dim=-1)
        distance = (2 - 2 * x @ x.T).clamp_min(0)
        away = distance.detach().clone().fill_diagonal_(float("inf"))
        near = away.topk(min(self.neighbours, len(x) - 1), largest=False).indices
        edges = torch.zeros_like(away, dtype=torch.bool).scatter(1, near, True)
        return torch.where(edges, torch.exp(-distance / (2 * self.sigma)), 0.0)

    def _local(self, s: Tensor, t: Tensor) -> Tensor:
        p, q = self._graph(s).log_softmax(-1), self._graph(t).log_softmax(-1)
        first, second = (p, q) if self.order == "student" else (q, p)
        return F.kl_div(second, first, reduction="sum", log_target=True)

    def _global(self, s: Tensor, t: Tensor, done: float) -> Tensor:
        start, end = self.temperature
        heat = start + (end - start) * min(1.0, max(0.0, done))
        own = F.normalize(self.projection(s), dim=-1)
        similar = own @ F.normalize(t, dim=-1).T / heat
        return F.cross_entropy(similar, torch.arange(len(s), device=s.device))


def paired(student: Outcome, teacher: Outcome) -> Pairs:
    """Each token of a student with the mean of the teacher's over its patches.

    Raises:
        ZooError: Nobody kept the student's source map.
    """
    t = student.final
    if t.source is None:
        raise ZooError("expected a pass with return_info=True, which keeps the source map")
    whole = teacher.final.patches.float()
    width = whole.shape[-1]
    # Patches that were dropped go to a slot of their own behind all others.
    slot = torch.where(t.source < 0, t.n, t.source)
    total = whole.new_zeros(len(whole), t.n + 1, width)
    total = total.scatter_add(1, slot.unsqueeze(-1).expand(-1, -1, width), whole)
    count = whole.new_zeros(slot.shape[0], t.n + 1)
    count = count.scatter_add(1, slot, torch.ones_like(slot, dtype=count.dtype))[:, :-1]
    real = count > 0
    if t.mask is not None:
        real = real & t.mask[:, t.prefix :]
    if t.policy is not None:
        real = real & (t.policy[:, t.prefix :].detach() > 0.5)
    mean = total[:, :-1] / count.clamp_min(1).unsqueeze(-1)
    return Pairs(t.patches.float(), mean, real)


def inner(pairs: Pairs) -> Tensor:
    """Mean squared difference of the two maps of similarities within each image."""
    both = pairs.real.unsqueeze(2) & pairs.real.unsqueeze(1)
    maps = []
    for x in (pairs.student, pairs.teacher):
        similar = x @ x.transpose(1, 2) / x.shape[-1] ** 0.5
        similar = similar.masked_fill(~pairs.real.unsqueeze(1), -1e30)
        maps.append(similar.softmax(-1))
    gap = (maps[0] - maps[1]).square().masked_fill(~both, 0.0)
    return gap.sum() / both.sum().clamp_min(1)

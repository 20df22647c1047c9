"""Find how many tokens each block keeps, so that a model stays closest to its dense self."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reduction.errors import UnreachableBudget
from reduction.mixins.adaptive import Adaptive
from reduction.schedules.base import Schedule
from reduction.schedules.per_block import PerBlock
from zoo.cost.analytic import gmacs, patch_and_head_gmacs
from zoo.errors import ZooError
from zoo.model.answers import check_finite
from zoo.model.attached import as_reduced
from zoo.model.evaluating import evaluating
from zoo.model.reduced import ReducedViT

OBJECTIVES = ("kl", "features")
_LEVELS = (0.0, 0.5, 1.0, 2.0, 4.0)  # what a block may remove, relative to the mean over blocks


class Found(NamedTuple):
    """Result of a search.

    Attributes:
        schedule: The best counts.
        score: Their distance to the dense model on the calibration images.
        start: Counts of the schedule that the search began with.
        start_score: Its distance.
        gmacs: Cost with the best counts.
        start_gmacs: Cost with those of the beginning.
        evaluations: Schedules that were run, those read from the cache included.
        complete: False if time ran out first.
    """

    schedule: PerBlock
    score: float
    start: list[int]
    start_score: float
    gmacs: float
    start_gmacs: float
    evaluations: int
    complete: bool


class ScheduleSearch:
    """Coordinate search over the blocks, then mutation, at a fixed cost.

    A candidate says how the removed tokens are shared out among the blocks; how many there are
    follows from the cost. So every candidate meets the budget. The search begins with the model's
    own schedule, equal removal in all blocks, in three stages, and rising and falling removal;
    then sets one block after the other to nothing, half, once, twice and four times the mean, as
    long as that helps; then mutates the best few. All choices follow from the seed, so a search
    that is started again with the same cache walks the same path and computes only what is new.

    Args:
        model: A model with a reducer of fixed counts and its schedule, e.g. a solved target.
        images: Calibration batches `(B, 3, H, W)`; no labels are needed.
        objective: "kl": mean Kullback-Leibler divergence of the answers from the dense model's;
            "features": mean squared error of what enters the classifier, relative to its size.
        evaluations: Schedules to run at most.
        seconds: Time limit; None: none.
        seed: Of the mutations.
        cache: File of what was evaluated, to resume from; None: nothing is kept.
        target: GMACs; None: what the model's schedule costs.

    Raises:
        ZooError: If the reducer cannot change its counts, the objective is unknown, or the cache
            is of another search.
    """

    def __init__(
        self,
        model: ReducedViT,
        images: Sequence[Tensor],
        objective: str = "kl",
        evaluations: int = 300,
        seconds: float | None = None,
        seed: int = 0,
        cache: str | Path | None = None,
        target: float | None = None,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ZooError(f"objective must be one of {OBJECTIVES}, got {objective!r}")
        if evaluations < 1 or (seconds is not None and not seconds > 0):
            raise ZooError(
                "evaluations must be 1 or more and seconds above 0, got "
                f"{evaluations!r} and {seconds!r}"
            )
        if not images:
            raise ZooError("the search needs calibration images, got none")
        model = as_reduced(model)
        check_searchable(model)
        if objective == "kl" and not model.num_classes:
            raise ZooError("a model without classes has no answers to compare; objective=features")
        self.model, self.images, self.objective = model, list(images), objective
        self.limit, self.seconds, self.seed = int(evaluations), seconds, int(seed)
        assert model.schedule is not None
        self.fixed = patch_and_head_gmacs(model.backbone)
        self.start = self._counts(model.schedule)
        self.target = self._cost(self.start) if target is None else float(target)
        self.scores: dict[tuple[int, ...], float] = {}
        self.cache = None if cache is None else Path(cache)
        self._known: dict[tuple[int, ...], float] = {}
        if self.cache is not None:
            self._known = self._read(self.cache)

    # -- what a schedule costs and how far it is from dense ----------------------------------------

    def _schedule(self, keep: Sequence[int]) -> PerBlock:
        return PerBlock(list(keep), strict=False)

    def _counts(self, schedule: Schedule) -> list[int]:
        return [p.leaving - self.model.prefix for p in self.model.plan(schedule=schedule)]

    def _cost(self, keep: Sequence[int]) -> float:
        return gmacs(
            self.model.anatomy,
            self._schedule(keep),
            fixed=self.fixed,
            last_block=self.model.runtime.last_block,
        ).total

    @torch.no_grad()
    def _answers(self, model: ReducedViT) -> list[Tensor]:
        model.eval()
        found: list[Tensor] = []
        for x in self.images:
            if self.objective == "kl":
                answers = model(x).float().log_softmax(-1)
            else:
                _, info = model(x, return_info=True)
                final = info.final._replace(x=model.tower.norm(model.backbone, info.final.x))
                answers = model.tower.leave(model.backbone, final, pre_logits=True)
                answers = (answers[0] if isinstance(answers, tuple) else answers).float()
            # No schedule is the best one for a model that answers with NaN.
            check_finite(answers, sum(map(len, found)))
            found.append(answers)
        return found

    def _distance(self, answers: Sequence[Tensor]) -> float:
        total = images = 0.0
        for dense, mine in zip(self._dense, answers, strict=True):
            if self.objective == "kl":
                part = (dense.exp() * (dense - mine)).sum(-1)
            else:
                part = (dense - mine).square().sum(-1) / dense.square().sum(-1)
            total, images = total + float(part.double().sum()), images + len(part)
        return total / images

    def _score(self, keep: Sequence[int]) -> float:
        key = tuple(keep)
        if key not in self.scores:
            if key in self._known:
                self.scores[key] = self._known[key]
            else:
                before = self.model.schedule
                self.model.schedule = self._schedule(keep)
                try:
                    self.scores[key] = self._distance(self._answers(self.model))
                finally:
                    self.model.schedule = before
                self._append({"keep": list(key), "score": self.scores[key]})
        return self.scores[key]

    # -- candidates --------------------------------------------------------------------------------

    def counts(self, shares: Sequence[float]) -> list[int]:
        """Counts per block that remove tokens in these shares and just meet the cost.

        Raises:
            UnreachableBudget: If not even the strongest reduction of this kind does.
        """
        n0 = self.model.grid[0] * self.model.grid[1]
        whole = sum(shares)
        if not whole > 0:
            raise UnreachableBudget("shares must be positive somewhere")

        def keep(strength: float) -> list[int]:
            gone, out = 0.0, []
            for share in shares:
                gone += strength * share / whole
                out.append(max(1, n0 - int(gone)))
            return self._counts(self._schedule(out))

        low, high = 0.0, float(n0 * len(shares))
        if self._cost(keep(high)) > self.target:
            raise UnreachableBudget("these shares cannot meet the cost")
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self._cost(keep(middle)) <= self.target else (middle, high)
        return self._fill(keep(high))

    def _fill(self, keep: list[int]) -> list[int]:
        """Spend what rounding left over, on the latest and cheapest counts first."""
        for block in reversed(range(len(keep))):
            above = self.model.grid[0] * self.model.grid[1] if block == 0 else keep[block - 1]
            if keep[block] < above:
                more = [*keep[:block], keep[block] + 1, *keep[block + 1 :]]
                if self._cost(more) <= self.target:
                    keep = more
        return keep

    def _starts(self) -> Iterator[list[float]]:
        depth = len(self.start)
        yield [1.0] * depth
        yield [float(b in {depth // 4, depth // 2, 3 * depth // 4}) for b in range(depth)]
        yield [float(b + 1) for b in range(depth)]
        yield [float(depth - b) for b in range(depth)]

    def run(self, progress: bool = False) -> Found:
        """Search.

        Args:
            progress: Show a progress bar.
        """
        with evaluating(self.model):
            return self._search(progress)

    def _search(self, progress: bool) -> Found:
        from tqdm.auto import tqdm

        self._dense = self._answers(ReducedViT(self.model.backbone))
        began = time.monotonic()
        pool: list[tuple[float, list[float] | None, list[int]]] = []

        def late() -> bool:
            return self.seconds is not None and time.monotonic() - began > self.seconds

        bar = tqdm(total=self.limit, desc="search", unit="schedule", disable=not progress)

        def consider(shares: list[float] | None, keep: list[int]) -> float:
            score = self._score(keep)
            pool.append((score, shares, keep))
            pool.sort(key=lambda entry: entry[0])
            del pool[8:]
            bar.update(len(self.scores) - bar.n)
            bar.set_postfix(best=f"{pool[0][0]:.4g}")
            return score

        start_score, complete = consider(None, self.start), True
        for shares, keep in self._candidates(pool):
            complete = not late()
            if not complete or len(self.scores) >= self.limit:
                break
            consider(shares, keep)
        bar.close()
        score, _, keep = pool[0]
        return Found(
            self._schedule(keep),
            score,
            self.start,
            start_score,
            self._cost(keep),
            self._cost(self.start),
            len(self.scores),
            complete,
        )

    def _candidates(
        self, pool: list[tuple[float, list[float] | None, list[int]]]
    ) -> Iterator[tuple[list[float], list[int]]]:
        """Shares and counts to try next, given the best so far; ends when nothing new comes up."""
        rng = random.Random(self.seed)
        for shares in self._starts():
            yield from self._reachable(shares)
        improved = True
        while improved:
            improved = False
            for block in range(len(self.start)):
                for level in _LEVELS:
                    best = self._best_shares(pool)
                    if best is None:
                        return
                    before = pool[0][0]
                    mean = sum(best) / len(best)
                    yield from self._reachable([*best[:block], level * mean, *best[block + 1 :]])
                    improved |= pool[0][0] < before
        stale = 0
        while stale < 100:
            # What leads nowhere new is followed by bolder steps.
            spread = 0.5 * (1 + stale / 20)
            known = len(self.scores)
            parents = [shares for _, shares, _ in pool if shares is not None]
            one, two = rng.choice(parents), rng.choice(parents)
            child = [
                rng.choice((a, b)) * (2 ** rng.gauss(0, spread) if rng.random() < 0.3 else 1.0)
                for a, b in zip(one, two, strict=True)
            ]
            yield from self._reachable(child)
            stale = 0 if len(self.scores) > known else stale + 1

    def _reachable(self, shares: list[float]) -> Iterator[tuple[list[float], list[int]]]:
        try:
            yield shares, self.counts(shares)
        except UnreachableBudget:
            return

    @staticmethod
    def _best_shares(
        pool: list[tuple[float, list[float] | None, list[int]]],
    ) -> list[float] | None:
        return next((shares for _, shares, _ in pool if shares is not None), None)

    # -- the cache ---------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """What a score depends on: weights, reducer, plugins, images, objective."""
        digest = hashlib.sha256(json.dumps([self.model.recipe, self.objective]).encode())
        for tensor in (*self.model.state_dict().values(), *self.images):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def _read(self, path: Path) -> dict[tuple[int, ...], float]:
        mine = self.fingerprint()
        if not path.exists():
            self._append({"search": mine})
            return {}
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            # An interrupted run may have left half a line at the end.
            entries = [json.loads(line) for line in lines[:-1]]
            with_last = entries + _maybe(lines[-1:])
            known = {tuple(e["keep"]): float(e["score"]) for e in with_last[1:]}
            theirs = with_last[0]["search"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ZooError(f"{path}: not the cache of a search ({error}); delete it") from error
        if theirs != mine:
            raise ZooError(
                f"{path}: of a search with other weights, images, reducer or objective; choose "
                "another file, or delete it"
            )
        if len(with_last) < len(lines):
            path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
        return known

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.cache is None:
            return
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _maybe(lines: Sequence[str]) -> list[Any]:
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return []


def check_searchable(model: ReducedViT) -> None:
    """Refuse models whose counts cannot be changed.

    Raises:
        ZooError: There is no reducer, it is adaptive, or its learned parts belong to the counts.
    """
    reducer = model.reducer
    if reducer is None or model.schedule is None:
        raise ZooError("the search finds counts for a method; choose one, e.g. reducer=tome")
    if isinstance(reducer, Adaptive):
        raise ZooError(
            f"reducer {reducer.name!r} chooses its counts for each image; there is no schedule to "
            "search for"
        )
    parts = {name: p.shape for name, p in reducer.named_parameters()}
    if parts and _parts_elsewhere(model) != parts:
        raise ZooError(
            f"reducer {reducer.name!r} has learned parts that belong to its counts; search with a "
            "method whose parts do not, e.g. reducer=tome"
        )


def _parts_elsewhere(model: ReducedViT) -> dict[str, torch.Size]:
    n0 = model.grid[0] * model.grid[1]
    keep = [max(1, n0 - 2 * (b + 1)) for b in range(model.depth)]
    other = ReducedViT(
        model.backbone, copy.deepcopy(model.reducer), PerBlock(keep, strict=False)
    ).reducer
    assert other is not None
    return {name: p.shape for name, p in other.named_parameters()}

"""The task `select`: what a selector leaves of images, against two controls.

The controls are tokens drawn by lot, several times, and the whole image at a lower resolution for
the same number of tokens. Published tables often lack both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reduction.selection.base import Selector
from reduction.selection.registry import asked, create_selector
from zoo.adapters.standalone import as_standalone
from zoo.cost.profile import profile
from zoo.data.images import Images
from zoo.errors import ZooError
from zoo.measure.knn import knn_classes
from zoo.measure.retrieval import retrieve
from zoo.measure.selection import Choice, Seen, look
from zoo.measure.similar import centred_cosine
from zoo.model.selecting import SelectingTower
from zoo.results.rows import wilson_interval
from zoo.run.build import build_model, instantiate
from zoo.run.extract import Selection, select
from zoo.run.features import dense_tower, gallery_images
from zoo.run.variants import at_size, nothing_reduced

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT


def measure_selection(
    cfg: DictConfig,
    model: ReducedViT,
    data: ImageData,
    device: torch.device,
    dtype: torch.dtype,
    limit: int | None = None,
) -> dict[str, Any]:
    """Returns the field `select` of a row.

    Args:
        cfg: configs/eval.yaml, composed.
        model: The tower, with a reducer inside or without.
        data: Its data, attached.
        device: Where to run.
        dtype: Precision of autocast.
        limit: How many images of the tested split, every class by its share.

    Raises:
        NotFinite: A token is NaN or infinity.
        ZooError: No selector is chosen, an image has no label, or the parts do not go together.
    """
    if cfg.get("selector") is None:
        raise ZooError("task=select needs a selector; type selector=NAME, e.g. selector=visionzip")
    if as_standalone(model.backbone) is not None:
        raise ZooError(
            f"task=select: a {type(model.backbone).__name__} runs itself, and there is no block "
            "whose tokens could be chosen from"
        )
    return {"select": _Bench(cfg, model, data, device, dtype, limit).measure()}


class _Bench:
    """One selector on one tower, at several numbers of tokens."""

    def __init__(
        self,
        cfg: DictConfig,
        model: ReducedViT,
        data: ImageData,
        device: torch.device,
        dtype: torch.dtype,
        limit: int | None,
    ) -> None:
        self.cfg, self.model, self.data = cfg, model, data
        self.device, self.dtype, self.limit = device, dtype, limit
        self.selector: Selector = instantiate(dict(cfg.selector), "selector")
        if getattr(self.selector, "crops", None) is not None:
            raise ZooError("task=select takes images one by one; leave selector.crops out")
        self.block, self.norm = int(cfg.select.block), bool(cfg.select.norm)
        self.tower = self._tower(model)
        self.n = self.tower.token_count()
        self.keeps = self._numbers()
        seeds = int(cfg.select.seeds)
        self.draws = [create_selector("random", seed=seed) for seed in range(seeds)]
        self.dense_gallery = cfg.gallery == "dense"

    def _tower(self, model: ReducedViT) -> SelectingTower:
        return SelectingTower(model, self.selector, 1, self.block, self.norm)

    def _numbers(self) -> list[int]:
        """Tokens K, each once, the most first.

        Raises:
            ZooError: One of them is none.
        """
        keep = self.cfg.select.keep
        wanted = list(keep) if not isinstance(keep, int | float) else [keep]
        found = {asked(self.selector, self.n, value) for value in wanted}
        numbers = sorted((k for k in found if k is not None and k < self.n), reverse=True)
        if not numbers:
            raise ZooError(
                f"select.keep={keep}: the tower has {self.n} tokens, and nothing would be left out"
            )
        return numbers

    def measure(self) -> dict[str, Any]:
        """The field of the row."""
        ours = {f"{k}": (self.selector, k) for k in self.keeps}
        lots = {f"{k} {i}": (d, k) for k in self.keeps for i, d in enumerate(self.draws)}
        queries = select(self.data, "test", self.limit, int(self.cfg.features.seed))
        seen = self._look(self.tower, queries, {**ours, **lots})
        dense, dense_data = dense_tower(self.cfg, self.model, self.data)
        reduced = dense is not self.model
        same = queries._replace(data=dense_data)
        whole = self._look(self._tower(dense), same, {})[""] if reduced else seen[""]
        gallery = gallery_images(self.cfg, dense_data if self.dense_gallery else self.data)
        if self.dense_gallery:
            tower = self._tower(dense) if reduced else self.tower
            theirs = {"": self._look(tower, gallery, {})[""]}
        else:
            theirs = self._look(self.tower, gallery, {**ours, **lots})
        judge = _Judge(self.cfg, self.data.label, whole, self.dense_gallery, gallery.part)
        if reduced and not self.dense_gallery:
            own = gallery_images(self.cfg, dense_data)
            judge.dense(self._look(self._tower(dense), own, {})[""])
        else:
            judge.dense(theirs[""])
        rows = []
        for k in self.keeps:
            draws = [judge.judged(seen[f"{k} {i}"], theirs.get(f"{k} {i}")) for i in self._seeds]
            rows.append(
                {
                    "keep": k,
                    "selector": judge.judged(seen[f"{k}"], theirs.get(f"{k}")),
                    "random": _spread(draws),
                    "resolution": self._lower(k, queries, judge),
                }
            )
        return {
            "selector": self.selector.config(),
            "block": self.tower.block,
            "norm": self.norm,
            "n_tokens": self.n,
            "n_images": len(seen[""].mean_error),
            "gallery": str(self.cfg.gallery),
            "n_gallery": len(theirs[""].mean_error),
            "seeds": len(self.draws),
            "dense": judge.of_dense,
            "by_keep": rows,
        }

    @property
    def _seeds(self) -> range:
        return range(len(self.draws))

    def _look(
        self, tower: SelectingTower, which: Selection, choices: Mapping[str, Choice]
    ) -> dict[str, Seen]:
        data = which.data
        images = data.dataset(which.part)
        return look(
            tower,
            choices,
            data.chosen_dataloader(which.part, which.places),
            self.device,
            self.dtype,
            which.limit,
            images.file if isinstance(images, Images) else None,
        )

    def _lower(self, keep: int, queries: Selection, judge: _Judge) -> dict[str, Any] | None:
        """The whole image, so small that the tower has about as many tokens; None where it cannot.

        Nothing is reduced then: it is what the tokens of a selector compete with.
        """
        from zoo.data import build_data

        tower, m = self.model.tower, self.model.backbone
        patch, size = tower.patch_size(m), tower.input_size(m)[1:]
        side = max(1, round(keep**0.5))
        if patch[0] != patch[1] or size[0] != size[1] or side * patch[0] >= size[0]:
            return None
        cfg = nothing_reduced(at_size(self.cfg, side * patch[0]))
        small = build_model(cfg).eval()
        data = build_data(cfg)
        data.attach(small, check=False)
        data.setup("test")
        chosen = self._tower(small)
        seen = self._look(chosen, queries._replace(data=data), {})[""]
        theirs = None
        if not self.dense_gallery:
            theirs = self._look(chosen, gallery_images(cfg, data), {})[""]
        found = judge.judged(seen, theirs)
        for key in ("coverage_mean", "coverage_worst"):
            found.pop(key)  # of other patches
        pixels = {"img_size": side * patch[0], "n_tokens": chosen.token_count()}
        return {**pixels, "gmacs": profile(small).gmacs, **found}


class _Judge:
    """Neighbours and retrieval, for whatever is left of the images."""

    def __init__(
        self, cfg: DictConfig, label: str, whole: Seen, dense_gallery: bool, part: str
    ) -> None:
        self.k, self.temperature = int(cfg.knn.k), float(cfg.knn.temperature)
        self.label, self.whole, self.dense_gallery = label, whole, dense_gallery
        self.among_themselves = part == "test"

    def dense(self, gallery: Seen) -> None:
        """Set what all others are compared with."""
        self.gallery = gallery
        for labels in (self.whole.features.labels, gallery.features.labels):
            bad = (labels < 0).nonzero()
            if len(bad):
                raise ZooError(
                    f"{self.label}: image {int(bad[0])} of those measured, counted from 0, has no "
                    "label, and task=select needs one for every image"
                )
        self.classes = self._classes(self.whole, gallery)
        self.centre = gallery.features.x.double().mean(0)
        self.of_dense = self._quality(self.whole, gallery, self.classes)

    def judged(self, seen: Seen, gallery: Seen | None) -> dict[str, Any]:
        """Numbers of one choice.

        Args:
            seen: The tested images.
            gallery: Of the same choice; None is the dense one's.
        """
        gallery = self.gallery if gallery is None or self.dense_gallery else gallery
        classes = self._classes(seen, gallery)
        same = int((classes == self.classes).sum())
        cosine = centred_cosine(seen.features.x, self.whole.features.x, self.centre)
        return {
            **self._quality(seen, gallery, classes),
            "agreement": 100 * same / len(classes),
            "centred_cosine": float(cosine.mean()),
            "coverage_mean": float(seen.mean_error.mean()),
            "coverage_worst": float(seen.worst_error.mean()),
        }

    def _quality(self, seen: Seen, gallery: Seen, classes: Tensor) -> dict[str, Any]:
        right, total = int((classes == seen.features.labels).sum()), len(classes)
        features, theirs = seen.features, gallery.features
        found = retrieve(
            features.x, theirs.x, features.labels, theirs.labels, self._own(seen, gallery)
        )
        return {
            "knn_top1": 100 * right / total,
            "knn_ci95": list(wilson_interval(right, total)),
            "recall1": 100 * found.hits[0] / max(1, found.queries),
            "map": 100 * found.mean_precision,
        }

    def _classes(self, seen: Seen, gallery: Seen) -> Tensor:
        x, labels = gallery.features.x, gallery.features.labels
        own = self._own(seen, gallery)
        return knn_classes(seen.features.x, x, labels, self.k, self.temperature, own)

    def _own(self, seen: Seen, gallery: Seen) -> Tensor | None:
        """Place of every image in a gallery that it is in itself."""
        if not self.among_themselves:
            return None
        where = {place: i for i, place in enumerate(gallery.features.places.tolist())}
        return torch.tensor([where.get(place, -1) for place in seen.features.places.tolist()])


def _spread(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of every number over several draws."""
    found: dict[str, Any] = {}
    for key, value in draws[0].items():
        if isinstance(value, int | float):
            values = [float(draw[key]) for draw in draws]
            found[key] = fmean(values)
            found[f"{key}_spread"] = pstdev(values)
    return found

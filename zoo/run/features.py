"""Tasks on features, for models with and without a classifier.

`knn`, `linear_probe` and `retrieval` look the images of the tested split up in a gallery, which is
the training split; `zeroshot` compares them with text. Features are computed once for all tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.adapters.standalone import as_standalone
from zoo.data.draw import stratified
from zoo.errors import ZooError
from zoo.measure.features import Features
from zoo.measure.knn import knn_classes
from zoo.measure.linear_probe import fit_probe
from zoo.measure.processes import ALONE, Processes
from zoo.measure.retrieval import RECALLS, Found, retrieve
from zoo.measure.similar import centred_cosine
from zoo.results.answers import packed
from zoo.results.rows import wilson_interval
from zoo.run.extract import Extractor, Selection, select
from zoo.run.fidelity import full_size_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT

#: Tasks that look images up in a gallery, and all tasks on features.
GALLERY_TASKS = ("knn", "linear_probe", "retrieval")
FEATURE_TASKS = (*GALLERY_TASKS, "zeroshot")
_PARTS = {"train": "gallery", "val": "val", "test": "test"}


@torch.inference_mode()
def measure_features(
    cfg: DictConfig,
    model: ReducedViT,
    data: ImageData,
    tasks: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    limit: int | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Returns the fields of a row that tasks on features fill.

    Args:
        cfg: configs/eval.yaml, composed.
        model: The model.
        data: Its data, attached.
        tasks: Of `FEATURE_TASKS`; others are passed over.
        device: Where to run.
        dtype: Precision of autocast.
        limit: How many images of the tested split, every class by its share.
        processes: Among which the images are shared out; what is done with their features is done
            in each.

    Raises:
        NotFinite: A feature is NaN or infinity.
        ZooError: There are no images, an image has no label, or the options do not fit.
    """
    extract = Extractor(cfg, device, dtype, processes)
    queries = select(data, "test", limit, int(cfg.features.seed))
    found: dict[str, Any] = {}
    if set(tasks) & set(GALLERY_TASKS):
        found.update(_Lookup(cfg, model, queries, extract, tasks).measure())
    if "zeroshot" in tasks:
        from zoo.run.zeroshot import measure_zeroshot

        found.update(measure_zeroshot(cfg, model, queries, extract))
    if "accuracy" in tasks:  # which has counted its own
        found.pop("n_images")
    return found


class _Lookup:
    """Queries and the gallery that they are looked up in."""

    def __init__(
        self,
        cfg: DictConfig,
        model: ReducedViT,
        queries: Selection,
        extract: Extractor,
        tasks: Sequence[str],
    ) -> None:
        self.cfg, self.extract, self.tasks = cfg, extract, tasks
        self.device = extract.device if extract.device.type == "cuda" else torch.device("cpu")
        dense = cfg.gallery == "dense"
        self.owner, data = dense_tower(cfg, model, queries.data) if dense else (model, queries.data)
        self.who = "the dense model" if dense else "the model"
        self.label = queries.data.label
        self.ours = self._on_device(extract(model, queries))
        self.same = queries._replace(data=data)  # the same pictures, as the owner takes them
        self.theirs = self._of_same() if dense else None
        relevance = cfg.retrieval.relevance
        kinds = [relevance] if isinstance(relevance, str) else list(relevance)
        self.relevance = kinds if "retrieval" in tasks else []
        self.among_themselves = False
        self.exclude: Tensor | None = None
        self.answers: dict[str, str] = {}
        if {"knn", "linear_probe"} & set(tasks) or "class" in self.relevance:
            chosen = gallery_images(cfg, data)
            self.split: str | None = data.splits[chosen.part]
            self.gallery = self._of_owner(chosen)
            self._leave_out(chosen)
        else:  # pictures are looked up among their own other parts
            self.split, self.gallery = None, self._crops()

    def _leave_out(self, gallery: Selection) -> None:
        """No image is looked up in a gallery with itself."""
        self.among_themselves = gallery.part == self.same.part
        if self.among_themselves:
            where = {place: i for i, place in enumerate(self.gallery.places.tolist())}
            own = [where.get(place, -1) for place in self.ours.places.tolist()]
            self.exclude = torch.tensor(own, device=self.device)

    def _crops(self) -> Features:
        return self._of_same(float(self.cfg.retrieval.crop))

    def _of_owner(self, which: Selection) -> Features:
        return self._on_device(self.extract(self.owner, which, who=self.who))

    def _of_same(self, crop: float | None = None) -> Features:
        """Of the tested pictures, image by image beside `ours`."""
        found = self._of_owner(self.same._replace(crop=crop))
        if not torch.equal(found.places, self.ours.places):
            raise ZooError(f"{self.label}: images changed while they were measured on; run again")
        return found

    def _on_device(self, features: Features) -> Features:
        return Features(*(part.to(self.device) for part in features))

    def measure(self) -> dict[str, Any]:
        """Fields of the row."""
        cfg = self.cfg
        found: dict[str, Any] = {
            "n_images": len(self.ours.x),
            "gallery": str(cfg.gallery),
            "gallery_split": self.split,
            "n_gallery": None if self.split is None else len(self.gallery.x),
        }
        if self.theirs is not None and self.theirs.x.shape == self.ours.x.shape:
            centre = self.gallery.x.double().mean(0)
            cosines = centred_cosine(self.ours.x, self.theirs.x, centre)
            worst = int(cosines.argmin())
            found["centred_cosine"] = {
                "mean": float(cosines.mean()),
                "worst": float(cosines[worst]),
                "worst_image": int(self.ours.places[worst]),
            }
        if "knn" in self.tasks:
            found["knn"] = self.knn()
        if "linear_probe" in self.tasks:
            found["linear_probe"] = self.linear_probe()
        if "retrieval" in self.tasks:
            found["retrieval"] = self.retrieval()
        if self.answers:
            found["answers"] = self.answers
        return found

    def knn(self) -> dict[str, Any]:
        """Nearest neighbours."""
        self._check_labels("knn")
        k, temperature = int(self.cfg.knn.k), float(self.cfg.knn.temperature)

        def classes(x: Tensor) -> Tensor:
            gallery, labels, _ = self.gallery
            return knn_classes(x, gallery, labels, k, temperature, self.exclude)

        return {"k": k, "temperature": temperature, **self._judged(classes, "knn")}

    def linear_probe(self) -> dict[str, Any]:
        """Logistic regression."""
        if self.among_themselves:
            raise ZooError(
                "linear_probe learns from the gallery, which with gallery_split="
                f"{self.cfg.gallery_split} is what it is tested on; type gallery_split=train"
            )
        self._check_labels("linear_probe")
        options = self.cfg.linear_probe
        labels = self.gallery.labels
        count = round(float(options.held_out) * len(labels))
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        held_out[stratified(labels.tolist(), count, int(self.cfg.features.seed))] = True
        probe = fit_probe(
            self.gallery.x,
            labels,
            held_out.to(self.device),
            list(options.c),
            int(options.iterations),
        )
        return {
            "c": probe.c,
            "scores": {f"{c:g}": score for c, score in probe.scores.items()},
            "held_out": count,
            **self._judged(probe.classes),
        }

    def _judged(self, classes: Any, task: str = "") -> dict[str, Any]:
        """Top-1, and agreement with the dense queries where there are any.

        Args:
            classes: Gives the classes that features say.
            task: Under whose name answers are noted, on wish.
        """
        ours = classes(self.ours.x)
        right = ours == self.ours.labels
        found = _share("top1", "ci95", int(right.sum()), len(ours))
        if self.cfg.get("answers") and task:
            self.answers[task] = packed(right.tolist())
        if self.theirs is not None:
            same = ours == classes(self.theirs.x)
            found |= _share("agreement", "agreement_ci95", int(same.sum()), len(ours))
            if self.cfg.get("answers") and task:
                self.answers[f"{task}_as_dense"] = packed(same.tolist())
        return found

    def retrieval(self) -> dict[str, Any]:
        """Recall and average precision, for each kind of relevance."""
        ways = {"class": self.by_class, "crop": self.by_crop}
        return {kind: ways[kind]() for kind in dict.fromkeys(self.relevance)}

    def by_class(self) -> dict[str, Any]:
        """Relevant is what is of the same class."""
        self._check_labels("retrieval")
        gallery, labels, _ = self.gallery
        found = retrieve(self.ours.x, gallery, self.ours.labels, labels, self.exclude)
        return self._retrieved(found, len(gallery))

    def by_crop(self) -> dict[str, Any]:
        """Relevant is another part of the same picture, among such parts of all pictures."""
        gallery = self._crops().x
        own = torch.arange(len(gallery), device=self.device)
        found = retrieve(self.ours.x, gallery, own, own)
        return {
            "crop": float(self.cfg.retrieval.crop),
            **self._retrieved(found, len(gallery)),
        }

    def _retrieved(self, found: Found, gallery: int) -> dict[str, Any]:
        if not found.queries:
            raise ZooError(
                f"{self.label}: no image has another of its class in the gallery of {gallery}; "
                "type a larger gallery_limit, or retrieval.relevance=crop"
            )
        row: dict[str, Any] = {"n_queries": found.queries, "n_gallery": gallery}
        for most, hits in zip(RECALLS, found.hits, strict=True):
            row |= _share(f"recall{most}", f"recall{most}_ci95", hits, found.queries)
        row["map"] = 100 * found.mean_precision
        row["map_ci95"] = [100 * end for end in found.interval()]
        return row

    def _check_labels(self, task: str) -> None:
        for where, labels in (("gallery", self.gallery.labels), ("queries", self.ours.labels)):
            bad = (labels < 0).nonzero()
            if len(bad):
                raise ZooError(
                    f"{self.label}: image {int(bad[0])} of the {where}, counted from 0, has no "
                    f"label, and task={task} needs one for every image; "
                    "retrieval.relevance=crop needs none"
                )


def _share(name: str, interval: str, count: int, total: int) -> dict[str, Any]:
    """A percentage with its 95 % interval."""
    return {name: 100 * count / total, interval: list(wilson_interval(count, total))}


def gallery_images(cfg: DictConfig, data: ImageData) -> Selection:
    """The images that others are looked up in."""
    part = _PARTS[cfg.gallery_split]
    limit = None if cfg.gallery_limit is None else int(cfg.gallery_limit)
    try:
        if data.same_images(part, "test"):
            part = "test"
        return select(data, part, limit, int(cfg.features.seed))
    except ZooError as error:
        if part == "test":
            raise
        raise ZooError(
            f"{error}; the gallery is the split {data.splits[part]!r}: type gallery_split=test to "
            "look the tested images up among themselves"
        ) from error


def dense_tower(
    cfg: DictConfig, model: ReducedViT, data: ImageData
) -> tuple[ReducedViT, ImageData]:
    """The same weights with nothing reduced, and the data as they take them.

    A dense model at another input size is compared with itself at its own size.

    Raises:
        ZooError: The architecture reduces by itself and has no dense form.
    """
    if (alone := as_standalone(model.backbone)) is not None:
        if alone.method == "none":
            return model, data
        raise ZooError(
            f"gallery=dense: a {type(model.backbone).__name__} reduces tokens by itself and has no "
            "dense form; type gallery=own"
        )
    if model.reducer is not None or len(model.plugins):
        dense = type(model)(model.backbone).set_runtime(**model.runtime._asdict()).eval()
        dense.backbone_args = model.backbone_args
        return dense, data
    full = full_size_config(cfg)
    if full is None:
        return model, data
    from zoo.data import build_data
    from zoo.run.build import build_model

    dense = build_model(full).eval()
    return dense, build_data(full).attach(dense, check=False)

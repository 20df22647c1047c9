"""Features of chosen images by a model, each computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zoo.data.draw import drawn
from zoo.data.fingerprint import fingerprint
from zoo.data.images import Images
from zoo.data.views import Change, OtherCrop
from zoo.errors import ZooError
from zoo.measure.feature_cache import FeatureCache, Stored, cache_key, state_digest
from zoo.measure.features import Embedder, Features, collect
from zoo.measure.processes import ALONE, Processes
from zoo.run.shares import streamed, tell_damage

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.data.module import ImageData
    from zoo.model.reduced import ReducedViT


class Selection(NamedTuple):
    """Which images of a data set.

    Attributes:
        data: After `attach`.
        part: As in `ImageData.dataset`.
        places: Which of them; None is the first ones of a stream.
        limit: How many of a stream; None is all.
        crop: Side of the part of each picture that is seen, over the picture's; None is all of it.
        seed: Of the crops.
    """

    data: ImageData
    part: str
    places: Sequence[int] | None
    limit: int | None = None
    crop: float | None = None
    seed: int = 0


def select(data: ImageData, part: str, limit: int | None, seed: int) -> Selection:
    """Choose images of a split, every class by its share; of a stream the first ones."""
    images = data.dataset(part)
    if isinstance(images, Images):
        return Selection(data, part, drawn(images, limit, seed), seed=seed)
    return Selection(data, part, None, limit, seed=seed)


class Extractor:
    """Computes features, or finds them where an earlier run has left them.

    Args:
        cfg: configs/eval.yaml, composed.
        device: Where to run.
        dtype: Precision of autocast.
        processes: Among which the images are shared out; all of them get all features.
    """

    def __init__(
        self,
        cfg: DictConfig,
        device: torch.device,
        dtype: torch.dtype,
        processes: Processes = ALONE,
    ) -> None:
        self.cfg, self.device, self.dtype = cfg, device, dtype
        self.processes = processes
        options = cfg.features
        self.cache: FeatureCache | None = None
        if options.cache:
            self.cache = FeatureCache(str(options.folder), int(options.max_gb * 2**30))
        self._known: dict[str, Features] = {}
        self._digests: dict[int, tuple[Any, str]] = {}

    def __call__(
        self, model: ReducedViT, which: Selection, answer: bool = False, who: str = "the model"
    ) -> Features:
        """Features of images, on the CPU.

        Args:
            model: Whose.
            which: The images.
            answer: See `zoo.measure.features.Embedder`.
            who: What the model is called in messages.

        Raises:
            NotFinite: A feature is NaN or infinity.
            ZooError: There are no images.
        """
        key = self._key(model, which, answer)
        if key is not None and key in self._known:
            return self._known[key]
        stored = self._stored(key)
        if stored is not None:
            for name, reason in stored.damaged.items():
                which.data.damaged.add(name, reason, aloud=self.processes.rank == 0)
            features = stored.features
        else:
            features = self._compute(model, which, answer, who)
            if key is not None and self.cache is not None and self.processes.rank == 0:
                self.cache.put(key, Stored(features, _damaged(which)))
        if key is not None:
            self._known[key] = features
        return features

    def _stored(self, key: str | None) -> Stored | None:
        """What an earlier run has left; all processes go by what the first one finds."""
        cache = self.cache
        if key is None or cache is None:
            return None
        return self.processes.first(lambda: cache.get(key))

    def _compute(self, model: ReducedViT, which: Selection, answer: bool, who: str) -> Features:
        data, change = which.data, None
        images = data.dataset(which.part)
        if which.crop is not None:
            if not isinstance(images, Images):
                raise ZooError(
                    "retrieval.relevance=crop opens images one by one, and these data are a stream"
                )
            change = OtherCrop(which.crop, which.seed)
        embed: Any = Embedder(model, answer)
        embed = torch.compile(embed) if self.cfg.compile else embed
        found = self._joined(
            lambda: collect(
                embed,
                self._batches(which, change),
                self.device,
                self.dtype,
                which.limit if self.processes.size == 1 else None,
                who,
                images.file if isinstance(images, Images) else None,
            )
        )
        tell_damage(self.processes, data)
        if not len(found.x):
            unread = f"; {data.damaged}" if data.damaged else ""
            split = data.splits[which.part]
            raise ZooError(f"{data.label}: no images in the split {split!r}{unread}")
        return found

    def _batches(self, which: Selection, change: Change | None) -> Iterable[Sequence[Tensor]]:
        """Those of this process."""
        data, part, places = which.data, which.part, which.places
        if places is None and self.processes.size > 1:
            return streamed(data, self.processes, which.limit, part)
        mine = None if places is None else self.processes.share(places)
        return data.chosen_dataloader(part, mine, change)

    def _joined(self, work: Callable[[], Features]) -> Features:
        """Features of all processes, in the order of the images."""
        parts = self.processes.collect(work)
        if len(parts) == 1:
            return parts[0]
        parts = [part for part in parts if len(part.x)] or parts[:1]
        found = Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        order = found.places.argsort()
        return Features(*(tensor[order] for tensor in found))

    def _key(self, model: ReducedViT, which: Selection, answer: bool) -> str | None:
        """What the features are called on disk; None for a stream, which nobody can look through.

        Raises:
            OSError: A file went away.
        """
        data = which.data
        images = data.dataset(which.part)
        if not isinstance(images, Images) or which.places is None:
            return None
        if id(model) not in self._digests:
            self._digests[id(model)] = model, state_digest(model)
        return cache_key(
            weights=self._digests[id(model)][1],
            recipe=model.recipe,
            runtime=model.runtime._asdict(),
            answer=answer,
            device=str(self.device),
            dtype=str(self.dtype),
            compile=bool(self.cfg.compile),
            deterministic=bool(self.cfg.deterministic),
            batch=data.eval_batch_size,
            pictures=[data.config, data.upright, which.crop, which.crop and which.seed],
            data=[data.name, str(data.root), data.splits[which.part]],
            images=fingerprint(images, which.places),
        )


def _damaged(which: Selection) -> dict[str, str]:
    """Those of the images that could not be read."""
    found, images = which.data.damaged.found, which.data.dataset(which.part)
    if not found or not isinstance(images, Images):
        return {}
    names = {images.name(i) for i in which.places or ()}
    return {name: reason for name, reason in found.items() if name in names}

"""The data module: which images, how they look to the model, in which order and batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from zoo.data.checks import check_choices, check_classes, data_config
from zoo.data.classes import differing
from zoo.data.images import Picture
from zoo.data.loader import Damaged, EpochLoader, EvalLoader, ImageLoader, StreamLoader
from zoo.data.numbering import Numbering
from zoo.data.sampler import EpochSampler, ShareSampler
from zoo.data.source import FolderOptions, Source, create
from zoo.data.transforms import eval_transform, train_transform
from zoo.data.views import Change, Chosen
from zoo.errors import ZooError

_OFFLINE = ("digits", "synthetic", "fashion_mnist")


class ImageData(pl.LightningDataModule):
    """Images with class labels for training and evaluation, over timm's data sets and transforms.

    Image size, normalisation, interpolation and the number of channels follow the model it is
    attached to; the arguments of the same names override that.

    Args:
        name: `digits`, `synthetic`, `fashion_mnist`, `openclipart`, `folder`, or a timm name with
            its prefix: `torch/cifar10`, `hfds/ORG/NAME`, `wds/NAME`.
        root: Folder of the data (for `hfds/` the cache).
        train_split: What the data set calls its training split.
        val_split: What it calls the split that training is watched on.
        test_split: What it calls the split that is reported; None means the validation split.
        num_classes: How many classes there are; None means ask the data set.
        img_size: Side of the images in pixels, or [height, width].
        mean: Per-channel mean for normalisation.
        std: Per-channel standard deviation.
        interpolation: Of the resizing.
        crop_pct: Part of the resized image that the centre crop keeps at evaluation.
        crop_mode: timm's `center`, `squash` or `border`.
        batch_size: Images per step and device.
        eval_batch_size: The same for evaluation; None means `batch_size`.
        num_workers: Loader processes; None means 0 for the bundled data, else up to 8, one a core.
        pin_memory: None means yes where there is a GPU.
        drop_last: Whether training leaves out the last, smaller batch of an epoch.
        download: Let torchvision fetch the data.
        class_map: File (or mapping) from folder names to class numbers, timm's `class_map`.
        class_order: How class folders are numbered: `natural` (timm's rule, the default) or
            `plain` (torchvision's). Weights that know the names of their classes go by those.
        match_names: Insist on the class names that the weights were trained with; False goes by
            the numbers.
        extensions: File name endings of images in folders; None is every format that Pillow opens.
        strict: Refuse a folder that holds anything but images in class folders.
        damaged: `skip` names images that cannot be read and leaves them out, `fail` stops.
        upright: Turn photographs as their EXIF tag says.
        mirror: Whether a mirrored image still belongs to its class; False switches flips off.
        options: More arguments for timm's create_dataset (`input_key`, `target_key`, ...).
        augment: The `augment` option, see `zoo.data.transforms`.
        seed: Of the order of the images and of the loader processes.
    """

    def __init__(
        self,
        name: str = "digits",
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        num_classes: int | None = None,
        img_size: int | list[int] | None = None,
        mean: list[float] | float | None = None,
        std: list[float] | float | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        drop_last: bool = True,
        download: bool = False,
        class_map: str | Mapping[str, Any] | None = None,
        class_order: str | None = None,
        match_names: bool = True,
        extensions: Sequence[str] | None = None,
        strict: bool = False,
        damaged: str = "skip",
        upright: bool = True,
        mirror: bool = True,
        options: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ZooError(f"data.{key} must be at least 1, got {value}")
        check_choices(class_order, damaged, match_names=match_names, strict=strict, upright=upright)
        self.name: str = str(name)
        self.root, self.seed = root, seed
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        # The training split as evaluation sees it: in order, and without augmentation.
        self.splits["gallery"] = train_split
        self._num_classes = num_classes
        self._overrides = {
            "img_size": img_size,
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
        }
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        if num_workers is None:
            num_workers = 0 if name in _OFFLINE else min(8, len(os.sched_getaffinity(0)))
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.drop_last, self.mirror, self.augment = drop_last, mirror, augment
        self.upright = upright
        self.damaged = Damaged(fatal=damaged == "fail")
        self._folder = FolderOptions(class_order, extensions, strict, class_map)
        self._create = {"download": download, **(options or {})}
        self.config: dict[str, Any] | None = None
        self._parts: dict[str, Source] = {}
        self._numbering = Numbering(
            self.label,
            self.name,
            root,
            (train_split, self.splits["test"]),
            self._folder,
            self._first,
            match_names,
        )

    # -- what is known before a model exists ------------------------------------------------------

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None when it is neither given nor told by the data set.

        Raises:
            ZooError: the data set has more classes than were given.
        """
        counted, given = self._numbering.count, self._num_classes
        if given is not None and counted is not None and counted > given:
            raise ZooError(f"{self.label} has {counted} classes, got data.num_classes={given}")
        return counted if given is None else given

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers, or None."""
        return self._numbering.names

    @property
    def class_order(self) -> str | None:
        """What gave class folders their numbers: the sorting rule, `class_map` or `weights`."""
        return self._numbering.order

    @property
    def label(self) -> str:
        """Name of the data as it appears in results: the folder's name for a folder."""
        if self.name in ("", "folder") and self.root:
            return os.path.basename(os.path.normpath(self.root))
        return str(self.name)

    # -- the model --------------------------------------------------------------------------------

    def attach(self, model: nn.Module, check: bool = True, training: bool = False) -> ImageData:
        """Make images look as a model expects them, and number classes as it does.

        Args:
            model: A timm model or a wrapped one.
            check: Whether its head must have one output per class, and the same classes.
            training: Whether it may learn other classes than its weights know.

        Returns:
            This data module.

        Raises:
            ZooError: the image size or the classes do not fit.
        """
        self.config = data_config(model, self._overrides)
        self._parts.clear()  # they are numbered for the model before
        if check:
            self._numbering.follow(model, training)
            check_classes(model, self.num_classes, self.label)
            if not training:
                self._numbering.check_given(self._num_classes)
        return self

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the data."""
        return {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run has the classes that it began with.

        Raises:
            ZooError: it has not.
        """
        was, now = state_dict.get("class_names"), self.class_names
        if was is not None and now is not None and was != now:
            raise ZooError(
                f"{self.label}: the run to resume began with other classes, they differ in "
                f"{differing(was, now) or 'their order'}"
            )

    # -- data sets --------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that a stage needs; Lightning calls this.

        Raises:
            ZooError: a split is missing, or training and validation do not have the same classes.
        """
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for part in wanted.get(str(stage), ("train", "val", "test")):
            self._part(part)

    def dataset(self, part: str = "test") -> Source:
        """Return one part, `train`, `val`, `test` or `gallery`, with its transform.

        `gallery` is the training split as evaluation sees it.
        """
        data = self._part(part)
        config = self._config()
        data.prepare = Picture(config["input_size"][0], self.upright)
        if part == "train":
            data.transform = train_transform(config, self.augment, self.mirror)
        else:
            data.transform = eval_transform(config)
        return data

    def same_images(self, part: str, other: str) -> bool:
        """Whether two parts are the same images, by whatever names their splits go.

        `val` and `validation` are one folder, and so is every split of a folder without any.
        Splits of timm's data sets are compared by their names.

        Args:
            part: See `dataset`, as for the other.
            other: Another one.

        Raises:
            ZooError: If a split is not there.
        """
        if self.splits[part] == self.splits[other]:
            return True
        found = [getattr(self._part(p), "source", None) for p in (part, other)]
        origins = [getattr(source, "origin", None) for source in found]
        return origins[0] is not None and origins[0] == origins[1]

    def _config(self) -> dict[str, Any]:
        if self.config is None:
            raise ZooError("call ImageData.attach(model) first: the images follow the model's size")
        return self.config

    def _first(self) -> Source:
        """The part to ask for the classes: the training split where there is one."""
        if self._parts:
            return next(iter(self._parts.values()))
        try:
            return self._part("train")
        except ZooError:
            return self._part("test")  # data to evaluate on only

    def _part(self, part: str) -> Source:
        if part not in self._parts:
            data = create(
                self.name,
                self.root,
                self.splits[part],
                training=part == "train",
                own_folder=part in ("train", "gallery"),
                num_classes=self._num_classes,
                seed=self.seed,
                folder=self._folder,
                **self._create,
            )
            if self.damaged.fatal and isinstance(data, IterableDataset):
                raise ZooError(
                    "data.damaged=fail is for images that are opened one by one; those of a stream "
                    "are opened by timm, which leaves damaged ones out"
                )
            data.numbers = self._numbering.numbers(data, next(iter(self._parts.values()), data))
            self._parts[part] = data
            self._numbering.announce(data)
        return self._parts[part]

    # -- loaders ----------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader, its order given by the seed and the epoch alone."""
        data = self.dataset("train")
        if isinstance(data, IterableDataset):
            # Streamed data brings its own order and sharing among processes.
            data.set_loader_cfg(num_workers=self.num_workers)
            return ImageLoader(data, self.damaged, **self._options(self.batch_size))
        rank, processes = self._process()
        sampler = EpochSampler(data, seed=self.seed, rank=rank, world_size=processes)
        return EpochLoader(
            data,
            self.damaged,
            sampler=sampler,
            # Fewer images than one batch: a small batch is better than no training at all.
            drop_last=self.drop_last and len(sampler) >= self.batch_size,
            **self._options(self.batch_size),
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell streamed data which epoch comes; `EpochSeed` calls this when one starts."""
        data: Any = self._parts.get("train")
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the split that training is watched on."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the split that is reported."""
        return self._eval_loader("test")

    def chosen_dataloader(
        self, part: str, places: Sequence[int] | None = None, change: Change | None = None
    ) -> DataLoader[Any]:
        """Return a loader of chosen images as evaluation sees them, in one process.

        Batches are images, classes and places; of a stream, whose images have no place, the first
        two.

        Args:
            part: As in `dataset`.
            places: Which images, in this order; None is all, and of a stream as they come.
            change: See `zoo.data.views.Chosen`; not for streams.
        """
        data = self.dataset(part)
        options = self._options(self.eval_batch_size)
        if isinstance(data, IterableDataset):
            data.set_loader_cfg(num_workers=self.num_workers)
            return ImageLoader(data, self.damaged, **options)
        chosen = Chosen(data, range(len(data)) if places is None else places, change)
        return ImageLoader(chosen, self.damaged, **options)

    def _eval_loader(self, part: str) -> DataLoader[Any]:
        data = self.dataset(part)
        size, options = self._config()["input_size"], self._options(self.eval_batch_size)
        rank, processes = self._process()
        if isinstance(data, IterableDataset):
            data.set_loader_cfg(num_workers=self.num_workers)
            return StreamLoader(
                data, self.damaged, rank=rank, processes=processes, image_size=size, **options
            )
        sampler = ShareSampler(data, rank, processes)
        return EvalLoader(data, self.damaged, sampler=sampler, image_size=size, **options)

    def _options(self, batch_size: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
        }

    def _process(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


#: Images that stand for a data set where it is not run through as a whole.
IMAGES = 256


def spread_images(data: ImageData, most: int = IMAGES) -> Iterator[Tensor]:
    """Batches of at most so many images of the test split, from all over it.

    Args:
        data: After `setup("test")`.
        most: How many; a stream gives its first ones.
    """
    whole = data.dataset("test")
    if isinstance(whole, IterableDataset):
        left = most
        for images, _ in data.test_dataloader():
            yield images[:left]
            left -= len(images)
            if left <= 0:
                return
        return
    count = len(whole)
    places = [i * count // min(most, count) for i in range(min(most, count))]
    loader = ImageLoader(Subset(whole, places), data.damaged, batch_size=data.eval_batch_size)
    for images, _ in loader:
        yield images

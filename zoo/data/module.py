"""The data module: which images, how they look to the model, in which order and batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from zoo.data.checks import check_classes, data_config
from zoo.data.sampler import EpochLoader, EpochSampler
from zoo.data.source import class_names, count_classes, create
from zoo.data.transforms import eval_transform, train_transform
from zoo.errors import ZooError

_OFFLINE = ("digits", "synthetic")


class ImageData(pl.LightningDataModule):
    """Images with class labels for training and evaluation, over timm's data sets and transforms.

    Image size, normalisation, interpolation and the number of channels follow the model it is
    attached to; the arguments of the same names override that.

    Args:
        name: `digits`, `synthetic`, `folder`, or a timm name with its prefix: `torch/cifar10`,
            `hfds/ORG/NAME`, `wds/NAME`.
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
        class_map: File that maps folder names to class numbers (timm's `class_map`).
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
        class_map: str | None = None,
        mirror: bool = True,
        options: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ZooError(f"data.{key} must be at least 1, got {value}")
        self.name, self.root, self.seed = name, root, seed
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
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
        self._create = {"class_map": class_map, "download": download, **(options or {})}
        self.config: dict[str, Any] | None = None
        self._parts: dict[str, Dataset[Any]] = {}

    # -- what is known before a model exists ------------------------------------------------------

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None when it is neither given nor told by the data set.

        Raises:
            ZooError: the data set has more classes than were given.
        """
        part = next(iter(self._parts.values()), None) or self._part(self._first_part())
        counted = count_classes(part)
        given = self._num_classes
        if given is not None and counted is not None and counted > given:
            raise ZooError(f"{self.label} has {counted} classes, got data.num_classes={given}")
        return counted if given is None else given

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, or None."""
        return class_names(self._part(self._first_part()))

    @property
    def label(self) -> str:
        """Name of the data as it appears in results: the folder's name for a folder."""
        if self.name in ("", "folder") and self.root:
            return os.path.basename(os.path.normpath(self.root))
        return str(self.name)

    # -- the model --------------------------------------------------------------------------------

    def attach(self, model: nn.Module, check: bool = True) -> ImageData:
        """Make images look as a model expects them.

        Args:
            model: A timm model or a wrapped one.
            check: Whether its head must have one output per class.

        Returns:
            This data module.

        Raises:
            ZooError: the image size or the number of classes does not fit.
        """
        self.config = data_config(model, self._overrides)
        self._parts.clear()  # the number of channels may have changed
        if check:
            check_classes(model, self.num_classes, self.label)
        return self

    # -- data sets --------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that a stage needs; Lightning calls this.

        Raises:
            ZooError: a split is missing, or training and validation do not have the same classes.
        """
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for part in wanted.get(str(stage), ("train", "val", "test")):
            self._part(part)
        if stage == "fit":
            train, val = (class_names(self._parts[p]) for p in ("train", "val"))
            if train is not None and val is not None and train != val:
                differ = sorted(set(train) ^ set(val))
                raise ZooError(
                    f"{self.label}: training and validation do not have the same classes, "
                    f"they differ in {', '.join(differ[:5]) or 'their order'}"
                )

    def dataset(self, part: str = "test") -> Dataset[Any]:
        """Return one part, `train`, `val` or `test`, with its transform."""
        data = self._part(part)
        config = self._config()
        if part == "train":
            transform = train_transform(config, self.augment, self.mirror)
        else:
            transform = eval_transform(config)
        data.transform = transform  # type: ignore[attr-defined]
        return data

    def _config(self) -> dict[str, Any]:
        if self.config is None:
            raise ZooError("call ImageData.attach(model) first: the images follow the model's size")
        return self.config

    def _first_part(self) -> str:
        """The part to ask for the classes: the training split where there is one."""
        if self._parts:
            return next(iter(self._parts))
        try:
            self._part("train")
        except ZooError:
            return "test"  # a folder to evaluate on only
        return "train"

    def _part(self, part: str) -> Dataset[Any]:
        if part not in self._parts:
            self._parts[part] = create(
                str(self.name),
                self.root,
                self.splits[part],
                training=part == "train",
                num_classes=self._num_classes,
                channels=self.config["input_size"][0] if self.config else 3,
                seed=self.seed,
                **self._create,
            )
        return self._parts[part]

    # -- loaders ----------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader, its order given by the seed and the epoch alone."""
        data = self.dataset("train")
        if isinstance(data, IterableDataset):
            return self._stream(data, self.batch_size)
        trainer = self.trainer
        sampler = EpochSampler(
            data,  # type: ignore[arg-type]
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return EpochLoader(
            data,
            sampler,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Fewer images than one batch: a small batch is better than no training at all.
            drop_last=self.drop_last and len(sampler) >= self.batch_size,
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

    def _eval_loader(self, part: str) -> DataLoader[Any]:
        data = self.dataset(part)
        if isinstance(data, IterableDataset):
            return self._stream(data, self.eval_batch_size)
        return DataLoader(
            data,
            batch_size=self.eval_batch_size,
            shuffle=False,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def _stream(self, data: IterableDataset[Any], batch_size: int) -> DataLoader[Any]:
        """Streamed data brings its own order and sharing among processes."""
        if hasattr(data, "set_loader_cfg"):
            data.set_loader_cfg(num_workers=self.num_workers)
        return DataLoader(
            data, batch_size=batch_size, num_workers=self.num_workers, pin_memory=self.pin_memory
        )


#: Images that stand for a data set where it is not run through as a whole.
IMAGES = 256


def spread_images(data: ImageData, most: int = IMAGES) -> Iterator[Tensor]:
    """Batches of at most so many images of the test split, from all over it.

    Args:
        data: After `setup("test")`.
        most: How many; a stream gives its first ones.
    """
    from torch.utils.data import DataLoader, IterableDataset, Subset

    whole = data.dataset("test")
    if isinstance(whole, IterableDataset):
        left = most
        for images, _ in data.test_dataloader():
            yield images[:left]
            left -= len(images)
            if left <= 0:
                return
        return
    count = len(whole)  # type: ignore[arg-type]
    places = [i * count // min(most, count) for i in range(min(most, count))]
    for images, _ in DataLoader(Subset(whole, places), batch_size=data.eval_batch_size):
        yield images

"""From a name and a root to a data set object, with one clear line when that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from zoo.data.classes import names_of_table, read_class_map
from zoo.data.folder import FolderReader, class_folders, image_extensions, open_split
from zoo.data.images import Images, ImageStream
from zoo.errors import ZooError

Source = Images | ImageStream

_EXTRA = {
    "hfds": "datasets",
    "hfids": "datasets",
    "wds": "webdataset",
    "tfds": "tensorflow_datasets",
}
# Options of the data sets that come with the package.
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "digits": (),
    "synthetic": ("size", "train_length", "eval_length"),
    "fashion_mnist": ("download",),
    "openclipart": ("least", "smallest"),
}
# torchvision's own reader of folders takes what is hidden for classes, and stops at empty ones.
_TORCH_FOLDERS = ("torch/folder", "torch/image_folder")


@dataclass(frozen=True)
class FolderOptions:
    """How an image folder is read; other data brings its classes and formats along.

    Attributes:
        order: One of `zoo.data.classes.ORDERS`; None is the first, or torchvision's where the data
            goes by its name.
        extensions: See `zoo.data.folder.image_extensions`.
        strict: Refuse a folder in which anything is left out.
        class_map: A file or a mapping, see `zoo.data.classes.read_class_map`.
    """

    order: str | None = None
    extensions: Sequence[str] | None = None
    strict: bool = False
    class_map: str | Mapping[str, Any] | None = None

    def rule(self, name: str) -> str:
        """The order of the classes, for data of that name."""
        return self.order or ("plain" if name.lower() in _TORCH_FOLDERS else "natural")

    def table(self, *roots: str | Path) -> dict[str, int] | None:
        """The class map, if there is one."""
        return None if self.class_map is None else read_class_map(self.class_map, *roots)


def is_folder(name: str) -> bool:
    """Whether data of that name is an image folder, whose classes are numbered here."""
    return name.lower() in ("", "folder", *_TORCH_FOLDERS)


def folder_names(
    root: str | None, splits: Sequence[str], name: str, options: FolderOptions
) -> list[str]:
    """Return the classes of an image folder in the order of their numbers.

    Args:
        root: See `zoo.data.folder.open_split`.
        splits: The one to ask first is the training split.
        name: Of the data.
        options: How it is read.

    Raises:
        ZooError: There is no such folder, or no class in it.
    """
    for split in splits[:-1]:
        try:
            return class_folders(open_split(root, split, training=True), options.rule(name))
        except ZooError:
            continue  # a folder to evaluate on only
    return class_folders(open_split(root, splits[-1], training=False), options.rule(name))


def create(
    name: str,
    root: str | None,
    split: str,
    *,
    training: bool,
    own_folder: bool | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    folder: FolderOptions | None = None,
    **options: Any,
) -> Source:
    """Create the data set of one split.

    Args:
        name: `digits`, `synthetic`, `fashion_mnist`, `openclipart`, `folder`, or a timm name:
            `torch/cifar10`, `hfds/org/name`, `wds/...`.
        root: Folder of the data.
        split: Its split, in the data set's own words.
        training: Whether it is trained on: shuffles streamed data.
        own_folder: Insist on a folder of that name; None does so for training.
        num_classes: For `synthetic`, how many to draw.
        seed: For streamed and generated data.
        folder: How image folders are read; None is the defaults.
        **options: For timm's create_dataset, or the generated data set.

    Raises:
        ZooError: nothing is found there, or a package is missing.
    """
    folder = folder or FolderOptions()
    if is_folder(name):
        own_folder = training if own_folder is None else own_folder
        return _folder(name, root, split, own_folder, folder, options)
    if folder.order is not None or folder.extensions is not None or folder.strict:
        raise ZooError(
            f"data.class_order, data.extensions and data.strict are for image folders, {name} "
            "brings its classes and formats along"
        )
    if name in _OPTIONS:
        options = _known(name, options)
    if name == "digits":
        from zoo.data.digits import Digits

        return _wrapped(Digits(split))
    if name == "synthetic":
        from zoo.data.synthetic import Shapes

        length = options.get("train_length" if split == "train" else "eval_length", 64)
        side = {k: v for k, v in options.items() if k == "size"}
        return _wrapped(Shapes(split, length, num_classes or 4, seed=seed, **side))
    if name == "fashion_mnist":
        from zoo.data.fashion_mnist import FashionMnist

        return _wrapped(FashionMnist(split, root, bool(options.get("download"))))
    if name == "openclipart":
        from zoo.data.openclipart import OpenClipart

        return _wrapped(OpenClipart(split, root, **{k: int(v) for k, v in options.items()}))
    return _by_timm(name, root, split, training, seed, folder.class_map, options)


def _known(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a data set that comes with the package.

    Raises:
        ZooError: It has no such option.
    """
    known = _OPTIONS[name]
    unknown = sorted(k for k, v in options.items() if k not in (*known, "download") and v)
    if unknown:
        there = f"there are {', '.join(known)}" if known else "there are none"
        raise ZooError(f"data.options of {name}: {there}, got {unknown}")
    return {k: v for k, v in options.items() if k in known}


def _folder(
    name: str,
    root: str | None,
    split: str,
    training: bool,
    folder: FolderOptions,
    options: Mapping[str, Any],
) -> Images:
    unknown = sorted(k for k, v in options.items() if k not in ("download", "input_key") and v)
    if unknown:
        raise ZooError(f"data.options of an image folder: there are none, got {unknown}")
    tree = open_split(root, split, training)
    # timm's name for the same, with semicolons between.
    old = str(options["input_key"]).split(";") if options.get("input_key") else None
    extensions = image_extensions(old if folder.extensions is None else folder.extensions)
    names: list[str] | None = class_folders(tree, folder.rule(name))
    table = folder.table(str(root), str(tree))
    reader = FolderReader(tree, names or (), extensions, table, folder.strict)
    if table is not None:
        names = names_of_table(table)
    return Images(reader, names)


def _by_timm(
    name: str,
    root: str | None,
    split: str,
    training: bool,
    seed: int,
    class_map: Any,
    options: dict[str, Any],
) -> Source:
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if prefix == "":
        raise ZooError(
            f"unknown data name {name!r}; expected digits, synthetic, fashion_mnist, openclipart, "
            "folder, or a timm name such as torch/cifar10, hfds/ORG/NAME, wds/NAME"
        )
    package = _EXTRA.get(prefix)
    if package is not None and find_spec(package) is None:
        raise ZooError(f"data {name!r} needs a package: pip install {package}")
    from timm.data import create_dataset

    if prefix in ("hfds", "hfids", "wds"):
        options["input_img_mode"] = ""  # converted here, see zoo.data.images
    try:
        data = create_dataset(
            name,
            root=root,
            split=split,
            is_training=training,
            seed=seed,
            class_map=class_map,
            **options,
        )
    except (AssertionError, RuntimeError, OSError, LookupError, ValueError) as error:
        hint = "; type data.download=true to fetch it" if prefix == "torch" else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ZooError(
            f"cannot open data {name!r} split {split!r} at {root}: {reason}{hint}"
        ) from error
    return _wrapped(data, training)


def _wrapped(data: Any, training: bool = True) -> Source:
    """What was opened, in the form that the loaders take."""
    from torch.utils.data import IterableDataset

    if isinstance(data, IterableDataset):
        reader: Any = getattr(data, "reader", None)
        if not training and hasattr(reader, "dist_num_replicas"):
            # Readers share shards among processes as well as they can, so some images are seen
            # twice and some by none. Here every process reads all; `StreamLoader` shares.
            reader.dist_rank, reader.dist_num_replicas = 0, 1
        return ImageStream(data, class_names(data))
    if hasattr(data, "loader"):
        data.loader = _open_file  # torchvision's own would lose what the file says of the image
    return Images(getattr(data, "reader", data), class_names(data))


def _open_file(path: str) -> IO[bytes]:
    return open(path, "rb")


def count_classes(data: Source) -> int | None:
    """Return how many classes a data set has, or None when it does not say."""
    own = getattr(data.source, "num_classes", None)
    if isinstance(own, int):
        return own
    return len(data.names) if data.names else None


def class_names(data: Any) -> list[str] | None:
    """Return the class names in the order of their numbers, or None when they are not known."""
    if wnids := getattr(data, "wnids", None):  # torchvision's ImageNet: one word for each class
        return [str(name) for name in wnids]
    table = getattr(getattr(data, "reader", data), "class_to_idx", None)
    if isinstance(table, dict) and table and sorted(table.values()) == list(range(len(table))):
        return [str(k) for k, _ in sorted(table.items(), key=lambda item: item[1])]
    classes = getattr(data, "classes", None)
    return [str(c) for c in classes] if classes else None

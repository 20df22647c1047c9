"""Image folders, SPLIT/CLASS/image: what is an image of a class, and what only lies about."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from zoo.data.classes import class_name, in_order, shortened
from zoo.data.tree import Disk, Entry, Tar, Tree
from zoo.errors import ZooError

# timm looks for the split under these names (timm.data.dataset_factory).
_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}
_SPLITS = {"test", *_SYNONYMS["train"], *_SYNONYMS["validation"]}
_SYSTEM = {"@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__pycache__"}
# Formats that Pillow knows by name and reads with the help of another program, or not at all.
_NOT_BY_ITSELF = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF", "IPTC"}


def image_extensions(chosen: Sequence[str] | None = None) -> frozenset[str]:
    """Return the file name endings that count as images, in lower case.

    Args:
        chosen: With or without the dot, "" for files without an ending; None is every format that
            Pillow opens.

    Raises:
        ZooError: The choice is empty, or no list of text.
    """
    if chosen is None:
        known = Image.registered_extensions()  # also asks plug-ins such as pillow-heif
        return frozenset(
            end for end, kind in known.items() if kind in Image.OPEN and kind not in _NOT_BY_ITSELF
        )
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    if not names or not all(isinstance(name, str) for name in names):
        raise ZooError(
            f"data.extensions must be file name endings such as [jpg, png], got {chosen!r}; null "
            "is every format that Pillow opens"
        )
    bare = [name.strip(". ").lower() for name in names]
    return frozenset("." + name if name else "" for name in bare)


def open_split(root: str | None, split: str, training: bool) -> Tree:
    """Find the folder of a split.

    Args:
        root: A folder with a folder for every split, or (to evaluate) with the classes in it; or
            an uncompressed tar file of one.
        split: What the split is called; `train` and `validation` also go by other names.
        training: Whether it is trained on: the root itself will not do then.

    Raises:
        ZooError: There is no such folder.
    """
    if root is None:
        raise ZooError(
            "data=folder needs data.root=PATH, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    path = Path(root).expanduser()
    if not path.exists():
        raise ZooError(f"data.root={root}: no such folder; expected one with train/ and val/ in it")
    tree: Tree = Disk(path) if path.is_dir() else _unwrapped(Tar(path))
    wanted = (split, *next((s for s in _SYNONYMS.values() if split in s), ()))
    folders = sorted(e.name for e in tree.entries() if e.kind == "folder")
    for name in wanted:
        if name in folders:
            return tree.below(name)
    if training or _SPLITS & set(folders):
        found = shortened(folders, 6) or "none"
        raise ZooError(
            f"data.root={root} has no folder for the split {split!r}; expected one of "
            f"{sorted(set(wanted))}, found: {found}"
        )
    return tree


def _unwrapped(tar: Tar) -> Tar:
    """Most tar files hold one folder that holds everything."""
    while True:
        folders = [e.name for e in tar.entries() if e.kind == "folder" and not _stray(e)]
        if len(folders) != 1 or folders[0] in _SPLITS:
            return tar
        if not any(e.kind == "folder" and not _stray(e) for e in tar.entries(folders[0])):
            return tar
        tar = tar.below(folders[0])


def class_folders(tree: Tree, order: str) -> list[str]:
    """Return the names of the classes of a split, an empty folder's too, in order.

    Raises:
        ZooError: There is none.
    """
    found = [e.name for e in tree.entries() if e.kind == "folder" and not _stray(e)]
    if not found:
        raise ZooError(f"{tree} has no class folders; expected {tree}/CLASS/*.jpg")
    return in_order(map(class_name, found), order)


class Found(NamedTuple):
    """What a split holds.

    Attributes:
        samples: Path and class of every image, in timm's order of the files.
        left_out: How many of each kind of thing are not among them.
        endings: Of the files that are no images.
    """

    samples: list[tuple[str, str]]
    left_out: Counter[str]
    endings: Counter[str]

    def __str__(self) -> str:
        kinds = []
        for kind, count in sorted(self.left_out.items()):
            text = f"{count} {kind if count == 1 else _PLURAL[kind]}"
            if kind == _NO_IMAGE:
                endings = sorted(self.endings, key=lambda end: (-self.endings[end], end))
                text += f" ({shortened(endings, 3)})"
            kinds.append(text)
        return ", ".join(kinds)


_NO_IMAGE = "file that is no image"
_UNMAPPED = "image of a class that data.class_map lacks"
_PLURAL = {
    "hidden folder": "hidden folders",
    "hidden file": "hidden files",
    "macOS leftover": "macOS leftovers",
    "system folder": "system folders",
    "loose file": "loose files",
    "sub-folder of a class": "sub-folders of classes",
    "broken link or device": "broken links or devices",
    _UNMAPPED: "images of classes that data.class_map lacks",
    _NO_IMAGE: "files that are no images",
}


def scan(tree: Tree, extensions: Collection[str], table: Mapping[str, int] | None = None) -> Found:
    """Find the images of a split and count everything else.

    Args:
        tree: The folder of the split.
        extensions: File name endings of images, in lower case.
        table: Where given, only images of these classes count.
    """
    samples: list[tuple[str, str]] = []
    left_out: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    for folder in tree.entries():
        stray = _stray(folder) or ("" if folder.kind == "folder" else _loose(folder))
        if stray:
            left_out[stray] += 1
            continue
        name = class_name(folder.name)
        for entry in tree.entries(folder.name):
            stray = _stray(entry) or _no_image(entry, extensions)
            if not stray and table is not None and name not in table:
                stray = _UNMAPPED
            if stray:
                left_out[stray] += 1
                if stray == _NO_IMAGE:
                    endings[_ending(entry.name) or "no ending"] += 1
            else:
                samples.append((tree.path(folder.name, entry.name), name))
    from timm.utils.misc import natural_key

    samples.sort(key=lambda sample: (natural_key(sample[0]), sample[0]))
    return Found(samples, left_out, endings)


def _stray(entry: Entry) -> str:
    """What an entry is called that no folder of images has on purpose; empty for others."""
    name = entry.name
    if name in ("__MACOSX", ".DS_Store") or name.startswith("._"):
        return "macOS leftover"
    if name.startswith("."):
        return "hidden folder" if entry.kind == "folder" else "hidden file"
    return "system folder" if entry.kind == "folder" and name in _SYSTEM else ""


def _loose(entry: Entry) -> str:
    return "loose file" if entry.kind == "file" else "broken link or device"


def _no_image(entry: Entry, extensions: Collection[str]) -> str:
    if entry.kind == "folder":
        return "sub-folder of a class"
    if entry.kind == "other":
        return "broken link or device"
    return "" if _ending(entry.name) in extensions else _NO_IMAGE


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class FolderReader:
    """The images of one split of a folder; item i is an open file and a class number.

    Args:
        tree: The folder of the split.
        names: The classes in the order of their numbers.
        extensions: See `scan`.
        table: Numbers of the classes, where they are not the places in `names`.
        strict: Refuse a folder in which anything is left out.

    Raises:
        ZooError: There is no image, or something else in a strict folder.
    """

    def __init__(
        self,
        tree: Tree,
        names: Sequence[str],
        extensions: Collection[str],
        table: Mapping[str, int] | None = None,
        strict: bool = False,
    ) -> None:
        self.tree = tree
        #: What tells these images from those of another split.
        self.origin = str(tree)
        found = scan(tree, extensions, table)
        self.left_out = str(found)
        if strict and self.left_out:
            raise ZooError(
                f"{tree} holds what is no image of a class: {self.left_out}; remove it, or type "
                "data.strict=false to leave it out"
            )
        if not found.samples:
            beside = f", but {self.left_out}" if self.left_out else ""
            raise ZooError(f"{tree} has no images in class folders{beside}; expected CLASS/*.jpg")
        numbers = table or {name: i for i, name in enumerate(names)}
        #: Classes that have images here.
        self.used = {name for _, name in found.samples}
        self.samples = [(path, numbers[name]) for path, name in found.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[IO[bytes], int]:
        path, number = self.samples[i]
        return self.tree.open(path), number

    def filename(self, i: int, basename: bool = False, absolute: bool = False) -> str:
        """Where image i lies."""
        return self.samples[i][0]

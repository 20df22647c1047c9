"""Open Clip Art: drawings in nested folders, transparent, of many sizes.

A category is a folder with its own images, and is called by its path ("food/fruit"); folders with
few images are left out, as are links to other images, drawings of a few pixels, and those that
Pillow warns of as too large. What is nearly
the same picture is on one side of the split: the same bytes, or the same file name but for a number
at its end. Which side, a digest of that name decides: about 70 % train, 10 % val, 20 % test.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from zoo.data.classes import in_order
from zoo.errors import ZooError

#: Where Debian's package openclipart-png puts the images.
DEBIAN = Path("/usr/share/openclipart/png")
#: Ends of the parts in the digests' range, from 0 to 1.
_TEST, _VAL = 0.2, 0.3
_ALIASES = {"validation": "val", "valid": "val", "training": "train", "eval": "test"}


class Drawing(NamedTuple):
    """One image.

    Attributes:
        path: Of its file.
        category: Its folder, seen from the root.
        part: `train`, `val` or `test`.
    """

    path: str
    category: str
    part: str


class OpenClipart:
    """The images of one split; item i is an open file and a class number.

    Args:
        split: `train`, `val` or `test`.
        root: Folder of the categories; None is Debian's.
        least: Categories with fewer images are left out.
        smallest: Images with a side of fewer pixels are left out.

    Raises:
        ZooError: There is no such split or folder, or no category with so many images.
    """

    def __init__(
        self, split: str, root: str | None = None, least: int = 90, smallest: int = 16
    ) -> None:
        split = _ALIASES.get(split, split)
        if split not in ("train", "val", "test"):
            raise ZooError(f"openclipart has the splits train, val and test, got {split!r}")
        folder = DEBIAN if root is None else Path(root).expanduser()
        if not folder.is_dir():
            raise ZooError(
                f"openclipart: no folder {folder}; install Debian's package openclipart-png, or "
                "type data.root=FOLDER"
            )
        #: What tells these images from those of another split.
        self.origin = f"{folder}/{split}"
        drawings, left_out = _scan(folder.absolute(), least, smallest)
        if not drawings:
            raise ZooError(
                f"{folder}: no folder with {least} PNG images or more; type data.options.least=N"
            )
        self.classes = in_order({one.category for one in drawings}, "natural")
        self.num_classes = len(self.classes)
        self.left_out = left_out
        number = {name: i for i, name in enumerate(self.classes)}
        chosen = [one for one in drawings if one.part == split]
        self.samples = [(one.path, number[one.category]) for one in chosen]
        self.used = {one.category for one in chosen}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[IO[bytes], int]:
        path, label = self.samples[i]
        return open(path, "rb"), label


@lru_cache(maxsize=4)
def _scan(folder: Path, least: int, smallest: int) -> tuple[tuple[Drawing, ...], str]:
    """All images that count, in the order of their paths, and what was left out, in words."""
    left_out: Counter[str] = Counter()
    found: list[tuple[str, str, str]] = []  # path, category, digest
    for above, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(above, name)
            if not name.lower().endswith(".png") or above == str(folder):
                continue
            if os.path.islink(path):
                left_out["links to other images"] += 1
                continue
            problem, digest = _looked_at(path, smallest)
            if problem:
                left_out[problem] += 1
            else:
                found.append((path, os.path.relpath(above, folder).replace(os.sep, "/"), digest))
    sizes = Counter(category for _, category, _ in found)
    kept = [one for one in found if sizes[one[1]] >= least]
    few = sum(count < least for count in sizes.values())
    left_out[f"images in {few} folders of fewer than {least}"] = len(found) - len(kept)
    parts = _parts([(path, digest) for path, _, digest in kept])
    drawings = tuple(Drawing(path, category, parts[path]) for path, category, _ in kept)
    words = ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items()) if count)
    return drawings, words


def _looked_at(path: str, smallest: int) -> tuple[str, str]:
    """What is wrong with a file, empty for nothing; and a digest of its bytes."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as image:
                    sides = image.size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return "images too large to open", ""
    except Exception:  # files are damaged in many ways
        return "files that are no images", ""
    return (f"images below {smallest} pixels", "") if min(sides) < smallest else ("", digest)


def stem(path: str) -> str:
    """A file's name without ending, and without the number at its end.

    >>> stem("a/flask_matthew__02.png"), stem("star_77pt37step.png"), stem("12.png")
    ('flask_matthew', 'star_77pt37step', '12')
    """
    name = os.path.splitext(os.path.basename(path))[0].lower()
    return re.sub(r"[\W_]*\d+[a-z]?[\W_]*$|[\W_]+$", "", name) or name


def _parts(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The split of every file, the same for files of the same digest or the same stem."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    of: dict[str, str] = {}
    stems: dict[str, set[str]] = defaultdict(set)
    for path, digest in files:
        own = stem(path)
        of[path] = own
        one, other = sorted((find(f"name {own}"), find(f"bytes {digest}")))
        leader[one] = other  # "name ..." comes last and leads
    for own in set(of.values()):
        stems[find(f"name {own}")].add(own)
    part = {top: _part(min(members)) for top, members in stems.items()}
    return {path: part[find(f"name {own}")] for path, own in of.items()}


def _part(name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if share < _TEST else "val" if share < _VAL else "train"

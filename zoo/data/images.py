"""Opening images: upright, in the colours that a person sees, and nothing in place of a bad one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset

from zoo.errors import ZooError

_ORIENTATION = 0x0112  # the EXIF tag
# Pillow's exif_transpose also writes the tags anew, and fails on photographs with odd ones.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Damage(NamedTuple):
    """An image that is left out.

    Attributes:
        name: Its file, or its place in the data.
        reason: What is wrong with it.
    """

    name: str
    reason: str


class Picture:
    """Makes of an opened file what a person sees in it, with the channels that a model takes.

    Transparent parts become white, unless the model takes four channels. 16 bits are scaled to 8
    (65535 is white), floats from 0 to 1 likewise.

    Args:
        channels: 1 for grey, 3 for colours, 4 for colours and transparency.
        upright: Turn photographs as their EXIF tag says.

    Raises:
        ZooError: The model takes another number of channels.
    """

    def __init__(self, channels: int, upright: bool = False) -> None:
        if channels not in _MODES:
            raise ZooError(f"images can be given 1, 3 or 4 channels, the model takes {channels}")
        self.mode, self.upright = _MODES[channels], upright

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image in that mode.

        Raises:
            ZooError: Its pixels have no agreed meaning as colours.
        """
        if self.upright:
            image = upright(image)
        if image.mode == "F":
            image = _from_floats(image)
        elif image.mode == "I" or image.mode.startswith("I;16"):
            image = _from_integers(image)
        if self.mode != "RGBA" and _see_through(image):
            image = _to(image, "RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return _to(image, self.mode)


def upright(image: Image.Image) -> Image.Image:
    """Turn a photograph as its EXIF tag says."""
    image.load()  # in which Pillow turns a TIFF by itself
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # tags that cannot be read say nothing; the pixels may be fine all the same
        return image
    return image if turn is None else image.transpose(turn)


def _to(image: Image.Image, mode: str) -> Image.Image:
    """Convert, over a stage where Pillow knows no direct way: La to LA, LAB and HSV to grey."""
    stages = {"La": "LA", "LAB": "RGB", "HSV": "RGB"}
    if image.mode == mode:
        return image
    try:
        if image.mode in stages:
            image = image.convert(stages[image.mode])
        return image.convert(mode)
    except ValueError as error:
        raise ZooError(f"pixels of the kind {image.mode} cannot be shown as {mode}") from error


def _see_through(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _from_integers(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ZooError(f"32-bit integers from {low} to {high}; expected 16 bits, so 0 to 65535")
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    if not (0 <= low and high <= 1):  # also refuses NaN
        raise ZooError(f"floating-point pixels from {low:.4g} to {high:.4g}; expected 0 to 1")
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def opened(given: Image.Image | IO[bytes]) -> Image.Image:
    """Return the whole image behind an open file, which is closed."""
    if isinstance(given, Image.Image):
        return given
    with given:
        image = Image.open(given)
        image.load()
        return image


def reason(error: Exception) -> str:
    """Say in one line why an image cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__


class Images(Dataset[tuple[Any, int]]):
    """Images and labels of a source that has a length.

    Item i is the image as `prepare` and `transform` leave it, and its class number. A loader asks
    for many at a time, and gets a `Damage` in the place of each that cannot be read.

    Args:
        source: Item i is an image or an open file, and a number or None.
        names: Names of the source's classes in the order of its numbers, where it has names.
    """

    def __init__(self, source: Any, names: Sequence[str] | None = None) -> None:
        self.source = source
        self.names = None if names is None else list(names)
        #: Classes that have images, as far as that is known without reading the labels.
        self.used: set[str] = getattr(source, "used", set(self.names or ()))
        #: How many of what was left out, in words.
        self.left_out: str = getattr(source, "left_out", "")
        #: The model's number for each number of the source; None where they are the same.
        self.numbers: list[int] | None = None
        self.prepare: Callable[[Image.Image], Image.Image] | None = None
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)  # which ends a loop over the images
        item = self.item(i)
        if isinstance(item, Damage):
            raise ZooError(f"{item.name}: {item.reason}")
        return item

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Any, int] | Damage]:
        return [self.item(i) for i in places]

    def readable(self, i: int) -> bool:
        """Whether an image can be read."""
        return not isinstance(self._read(i), Damage)

    def item(
        self, i: int, change: Callable[[Image.Image], Image.Image] | None = None
    ) -> tuple[Any, int] | Damage:
        """Image i and its class, or what is wrong with it.

        Args:
            i: Its place.
            change: Applied between `prepare` and `transform`.
        """
        read = self._read(i)
        if isinstance(read, Damage):
            return read
        image, label = read
        image = image if change is None else change(image)
        return (image if self.transform is None else self.transform(image)), label

    def labels(self) -> list[int] | None:
        """Class number of every image, as far as the source tells them without opening images."""
        found = _labels(self.source)
        if found is None or len(found) != len(self):
            return None
        return [renumbered(label, self.numbers) for label in found]

    def _read(self, i: int) -> tuple[Image.Image, int] | Damage:
        # Files break in as many ways as there are formats, and Pillow raises what it meets.
        try:
            given, label = self.source[i][:2]
            image = opened(given)
            image = image if self.prepare is None else self.prepare(image)
        except Exception as error:
            return Damage(self.name(i), reason(error))
        return image, renumbered(label, self.numbers)

    def name(self, i: int) -> str:
        """What an image is called: its file, or its number."""
        return self.file(i) or f"image {i}"

    def file(self, i: int) -> str | None:
        """The file of an image, None where the source does not tell."""
        try:
            if hasattr(self.source, "filename"):  # timm's readers
                return str(self.source.filename(i, absolute=True))
            return str(self.source.samples[i][0])  # torchvision's folders
        except Exception:
            return None


def _labels(source: Any) -> Sequence[Any] | None:
    """The labels of a data set by the names that libraries have for them."""
    for name in ("labels", "targets", "_labels"):
        found: Any = getattr(source, name, None)
        found = found.tolist() if hasattr(found, "tolist") else found
        if isinstance(found, list | tuple):
            return found
    samples = getattr(source, "samples", None)  # of folders
    if isinstance(samples, list | tuple) and all(len(sample) == 2 for sample in samples):
        return [label for _, label in samples]
    key = getattr(source, "label_key", None)  # of Hugging Face's, as timm reads them
    if isinstance(key, str) and hasattr(source, "dataset"):
        return list(source.dataset[key])
    return None


class ImageStream(IterableDataset[Any]):
    """Images and labels of a source that is read from its start to its end.

    Args:
        source: timm's IterableImageDataset.
        names: See `Images`.
    """

    def __init__(self, source: Any, names: Sequence[str] | None = None) -> None:
        self.source = source
        self.names = None if names is None else list(names)
        self.used: set[str] = set(self.names or ())
        self.left_out = ""
        self.numbers: list[int] | None = None
        self.prepare: Callable[[Image.Image], Image.Image] | None = None
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Any, int] | Damage]:
        for count, (image, label) in enumerate(self.source.reader):
            try:
                image = image if self.prepare is None else self.prepare(image)
            except ZooError as error:
                yield Damage(f"image {count} of the stream", str(error))
                continue
            image = image if self.transform is None else self.transform(image)
            yield image, renumbered(label, self.numbers)

    def set_epoch(self, epoch: int) -> None:
        """Tell the source which epoch comes."""
        self.source.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """Tell the source how many processes read it."""
        self.source.set_loader_cfg(num_workers=num_workers)


def renumbered(label: Any, numbers: Sequence[int] | None) -> int:
    """Return the model's number for a label; -1 for none, as timm does."""
    label = -1 if label is None else int(label)
    return label if numbers is None or not 0 <= label < len(numbers) else numbers[label]

"""Opening images: as a person sees them, and a damaged one is named, never replaced."""

from __future__ import annotations

import json
import shlex
import struct
import zlib
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import IterableDataset

import zoo.data.source
import zoo.models  # noqa: F401  (registers vit_digits)
from zoo.cli.main import main
from zoo.data.images import Images, ImageStream, Picture, opened
from zoo.data.loader import Damaged, EpochLoader, ImageLoader, say
from zoo.data.module import ImageData, spread_images
from zoo.data.sampler import EpochSampler
from zoo.errors import ZooError
from zoo.lit.classifier import Classifier

GREY = np.array([[0, 1, 64], [128, 254, 255]], np.uint8)


@pytest.fixture(autouse=True)
def say_again():
    say.cache_clear()  # every test hears what is said once per process


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_digits", num_classes=2, embed_dim=32, depth=1)


def shown(image: Image.Image, channels: int = 3, upright: bool = False) -> np.ndarray:
    return np.asarray(Picture(channels, upright)(image))


def pictures(root: Path, count: int = 8) -> list[Path]:
    """Pictures of two classes that are told by their grey alone: 10 i."""
    paths = []
    for split in ("train", "val"):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 10 * i).save(path)
            paths.append(path)
    return paths


def greys(batches) -> list[int]:
    """Which pictures came: the grey of each."""
    found = torch.cat([images for images, _ in batches])
    return sorted(round(float(x.mean()) * 0.319 * 255 + 0.306 * 255) for x in found)


# -- upright --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("end", ["jpg", "png", "webp", "avif", "tiff"])
def test_photographs_stand_as_any_viewer_shows_them(tmp_path, tag, end):
    if f".{end}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not know {end}")
    pixels = np.zeros((40, 64), np.uint8)
    pixels[:10, :20] = 255
    turned = (pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1])
    turned += (pixels.T, pixels[::-1].T, pixels[::-1, ::-1].T, pixels[:, ::-1].T)
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(pixels).save(tmp_path / f"x.{end}", exif=exif, quality=100)
    image = opened(open(tmp_path / f"x.{end}", "rb"))
    got, want = shown(image, 1, upright=True).astype(int), turned[tag - 1]
    assert got.shape == want.shape and np.abs(got - want).max() <= 8
    if end != "tiff":  # which Pillow turns by itself
        assert shown(image, 1).shape == (40, 64)


def test_turning_is_an_option_of_the_data(tmp_path, model):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :8] = 255  # the left half
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "val" / name / "1.png", exif=exif)
    for upright, bright in ((True, (slice(None, 8), slice(None))), (False, (..., slice(None, 8)))):
        data = ImageData("folder", str(tmp_path), upright=upright, num_workers=0).attach(model)
        image = data.dataset("test")[0][0][0]
        assert image[bright].min() > image.mean(), upright


def test_tags_that_cannot_be_read_leave_the_picture_as_it_is(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("L", (8, 4), 200).save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    with Image.open(path) as image:
        assert Picture(3, upright=True)(image).size == (8, 4)


def test_tags_that_pillow_cannot_write_again_do_not_keep_a_picture_lying(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("L", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: 1 / 0)
    with Image.open(tmp_path / "x.jpg") as image:
        assert Picture(1, upright=True)(image).size == (4, 8)


# -- kinds of pixels ------------------------------------------------------------------------------


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png") -> Image.Image:
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        opened.load()
        return opened


def test_16_bits_are_scaled_not_cut_off(tmp_path):
    deep = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 257))
    assert deep.mode.startswith("I")
    np.testing.assert_array_equal(shown(deep, 1), GREY)
    np.testing.assert_array_equal(shown(deep)[..., 2], GREY)
    big_endian = Image.frombytes("I;16B", (3, 2), (GREY.astype(">u2") * 257).tobytes())
    np.testing.assert_array_equal(shown(big_endian, 1), GREY)
    (tmp_path / "x.pgm").write_bytes(b"P5 3 2 65535\n" + (GREY.astype(">u2") * 257).tobytes())
    with Image.open(tmp_path / "x.pgm") as image:
        np.testing.assert_array_equal(shown(image, 1), GREY)
    wide = saved(tmp_path, Image.fromarray(GREY.astype(np.int32) * 257), "x.tiff")
    np.testing.assert_array_equal(shown(wide, 1), GREY)


@pytest.mark.parametrize("value", [-1, 70000])
def test_32_bits_without_a_scale_are_refused(value):
    with pytest.raises(ZooError, match="expected 16 bits, so 0 to 65535"):
        shown(Image.fromarray(np.full((2, 2), value, np.int32)))


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path):
    image = saved(tmp_path, Image.fromarray(GREY.astype(np.float32) / 255), "x.tiff")
    assert image.mode == "F"
    np.testing.assert_array_equal(shown(image, 1), GREY)
    for value in (-0.1, 255.0, float("nan"), float("inf")):
        with pytest.raises(ZooError, match="floating-point pixels from .*; expected 0 to 1"):
            shown(Image.fromarray(np.full((2, 2), value, np.float32)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_what_is_transparent_is_white_whatever_colour_it_hides(mode, channels):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (40, 40, 40, 255))
    via = {"La": "LA", "PA": "P"}.get(mode)
    image = image.convert(via).convert(mode) if via == "LA" else image.convert(mode)
    assert image.mode == mode
    pixels = shown(image, channels).reshape(2, -1)
    assert (pixels[0] == 255).all() and np.abs(pixels[1].astype(int) - 40).max() <= 3


def test_transparency_that_the_header_names(tmp_path):
    grey = Image.fromarray(GREY)
    colour = Image.merge("RGB", [grey] * 3)
    palette = colour.quantize(8)
    for image, hidden in ((grey, 0), (colour, (0, 0, 0)), (palette, palette.getpixel((0, 0)))):
        image.save(tmp_path / "x.png", transparency=hidden)
        with Image.open(tmp_path / "x.png") as opened:
            pixels = shown(opened)
        assert (pixels[0, 0] == 255).all() and (pixels[1, 0] > 100).all()
        assert abs(int(pixels[0, 2, 0]) - 64) <= 8


def test_four_channels_keep_their_transparency():
    image = Image.new("RGBA", (1, 1), (1, 2, 3, 4))
    assert shown(image, 4).tolist() == [[[1, 2, 3, 4]]]


def test_other_kinds_are_converted_or_refused(tmp_path, monkeypatch):
    colour = Image.merge("RGB", [Image.fromarray(GREY), *[Image.new("L", (3, 2), 100)] * 2])
    for mode, slack in (("CMYK", 1), ("YCbCr", 3), ("HSV", 4), ("P", 60)):
        difference = shown(colour.convert(mode)).astype(int) - np.asarray(colour)
        assert np.abs(difference).max() <= slack, mode
    bits = Image.fromarray(GREY > 100)
    assert bits.mode == "1" and set(shown(bits).ravel()) == {0, 255}
    large = Image.merge("RGB", [Image.new("L", (32, 32), v) for v in (200, 60, 30)])
    jpeg = saved(tmp_path, large.convert("CMYK"), "x.jpg")  # stored the other way round
    assert jpeg.mode == "CMYK"
    assert np.abs(shown(jpeg).astype(int) - np.asarray(large)).max() <= 12
    for mode in ("HSV", "LAB"):  # which Pillow does not make grey by itself
        assert shown(Image.new(mode, (2, 2)), 1).shape == (2, 2)
    unknown = Image.new("RGB", (2, 2))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ZooError, match="pixels of the kind RGB cannot be shown as L"):
        shown(unknown, 1)
    with pytest.raises(ZooError, match="1, 3 or 4 channels, the model takes 2"):
        Picture(2)


# -- damage ---------------------------------------------------------------------------------------


def bomb(side: int = 30000) -> bytes:
    """A PNG whose header promises far more pixels than anybody wants."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def damage(paths: list[Path]) -> list[Path]:
    """Cut short, emptied, text, too large, pixels without a meaning: five ways to be unreadable."""
    cut, empty, text, large, vague = paths
    cut.write_bytes(cut.read_bytes()[:45])
    empty.write_bytes(b"")
    text.write_text("<html>404 Not Found</html>")
    large.write_bytes(bomb())
    Image.fromarray(np.full((16, 16), 300.0, np.float32)).save(vague, format="TIFF")
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_and_left_out_and_nothing_stands_in(
    tmp_path, model, workers, capsys
):
    paths = pictures(tmp_path)[8:]
    bad = damage(paths[:5])
    data = ImageData("folder", str(tmp_path), eval_batch_size=3, num_workers=workers)
    data.attach(model).setup("test")
    assert greys(data.test_dataloader()) == [50, 60, 70]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    for path, words in zip(
        bad, ("truncated", "no image", "no image", "exceeds limit", "expected 0 to 1"), strict=True
    ):
        [line] = [text for text in lines if str(path) in text]
        assert line.startswith("warning: left out ") and words in line
    assert str(data.damaged) == "5 images could not be read" and set(data.damaged.found) == {
        str(path) for path in bad
    }
    # Said once, however often the images are read, and as many as there are.
    assert greys(data.test_dataloader()) == [50, 60, 70]
    assert sum(len(images) for images in spread_images(data)) == 3
    assert not capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_can_be_fatal(tmp_path, model, workers):
    paths = pictures(tmp_path)
    paths[3].write_bytes(b"")
    options = {"damaged": "fail", "num_workers": workers, "batch_size": 4}
    data = ImageData("folder", str(tmp_path), **options).attach(model)
    assert len(list(data.test_dataloader())) == 2
    with pytest.raises(ZooError, match=rf"{paths[3]}: no image .*data.damaged=skip") as info:
        list(data.train_dataloader())
    assert "\n" not in str(info.value)


def test_a_damaged_image_that_is_asked_for_by_its_number_is_an_error(tmp_path, model):
    paths = pictures(tmp_path)
    paths[-1].write_bytes(b"")
    data = ImageData("folder", str(tmp_path), num_workers=0).attach(model)
    assert data.dataset("test")[0][1] == 0
    with pytest.raises(ZooError, match=str(paths[-1])):
        data.dataset("test")[7]


def test_mistakes_in_augmentation_are_not_taken_for_damage():
    data = Images([(Image.new("L", (2, 2)), 0)])
    data.transform = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        data[0]


def test_row_counts_what_was_seen_and_says_what_was_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = pictures(tmp_path / "p")
    paths[-1].write_bytes(b"")
    model = "backbone=vit_digits +backbone.args={num_classes:2,depth:1}"
    line = f"eval {model} data=folder data.root=p data.num_workers=0 task=accuracy results=r.jsonl"
    assert main(shlex.split(line)) == 0
    row = json.loads(Path("r.jsonl").read_text())
    assert row["n_images"] == 7 and row["notes"] == "1 image could not be read"
    for path in paths[8:]:
        path.write_bytes(b"")
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    assert "no images in the split 'validation'; 8 images could not be read" in (
        capsys.readouterr().err
    )


# -- damage in training ---------------------------------------------------------------------------


def trained(data: ImageData, model, **options):
    trainer = pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    module = Classifier(model)
    trainer.fit(module, datamodule=data)
    watched = dict(trainer.callback_metrics)
    [scores] = trainer.test(module, datamodule=data, verbose=False)
    return trainer.global_step, watched, scores


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_without_damaged_images_and_validates_every_epoch(
    tmp_path, model, workers, capsys
):
    paths = pictures(tmp_path)
    for path in (*paths[:8:2], *paths[8:10]):
        path.write_bytes(path.read_bytes()[:45])
    data = ImageData("folder", str(tmp_path), batch_size=2, num_workers=workers)
    steps, watched, scores = trained(data.attach(model, training=True), model)
    assert steps == 8 and watched["val/images"] == scores["test/images"] == 6
    err = capsys.readouterr().err
    assert sum("warning: left out" in line for line in err.splitlines()) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_epoch_sees_every_readable_image_once_in_as_many_batches_as_it_says(workers):
    good = {3, 4, 9, 10, 11, 12}

    class Source:
        samples = [(f"{i}.png", i) for i in range(14)]

        def __len__(self):
            return 14

        def __getitem__(self, i):
            if i not in good:
                raise OSError("image file is truncated")
            return Image.new("L", (1, 1)), i

    data = Images(Source())
    data.transform = lambda image: torch.zeros(1)
    sampler = EpochSampler(data)
    for epoch in range(
        6 if workers else 20
    ):  # in some of them the first, in some the last batches are empty
        sampler.set_epoch(epoch)
        loader = EpochLoader(data, Damaged(), sampler, batch_size=4, num_workers=workers)
        labels = [y.tolist() for _, y in loader]
        assert len(labels) == len(loader) == 4 and all(labels)
        assert sorted(sum(labels, [])) == sorted(good)
        assert sum(labels, []) == [i for i in sampler if i in good]  # and in their order
    good -= {3, 4, 9}
    with pytest.raises(ZooError, match="too many images of a training epoch cannot be read"):
        list(EpochLoader(data, Damaged(), sampler, batch_size=4))


def test_a_split_without_a_readable_image_is_an_error(tmp_path, model):
    for path in pictures(tmp_path)[8:]:
        path.write_bytes(b"")
    data = ImageData("folder", str(tmp_path), batch_size=2, num_workers=0)
    with pytest.raises(ZooError, match="no image of the val split could be read"):
        trained(data.attach(model, training=True), model, num_sanity_val_steps=0)


def test_overfitting_a_few_batches_still_works(tmp_path, model):
    pictures(tmp_path)
    data = ImageData("folder", str(tmp_path), batch_size=2, num_workers=0)
    trained(data.attach(model, training=True), model, overfit_batches=2)


# -- streams --------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """What timm makes of shards: a reader that opens images by itself."""

    def __init__(self, count: int = 11) -> None:
        self.count = count
        self.reader = self

    def __len__(self):
        return self.count

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, self.count, step):
            exif = Image.Exif()
            exif[0x0112] = 6
            image = Image.new("F" if i == 4 else "RGB", (32, 16), 7)
            image.info["exif"] = exif.tobytes()
            yield image, i

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers


def test_streams_are_upright_and_say_what_they_leave_out(monkeypatch, model, capsys):
    monkeypatch.setattr(
        zoo.data.source, "_by_timm", lambda *args: zoo.data.source._wrapped(Stream())
    )
    data = ImageData("wds/x", num_classes=2, num_workers=2, eval_batch_size=3).attach(model)
    data.setup("test")
    stream = data.dataset("test")
    assert isinstance(stream, ImageStream)
    seen = []
    stream.transform = lambda image: torch.tensor(image.size)
    for sizes, labels in ImageLoader(stream, data.damaged, batch_size=3, num_workers=2):
        assert (sizes == torch.tensor([16, 32])).all()
        seen += labels.tolist()
    assert sorted(seen) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert "floating-point pixels from 7 to 7" in capsys.readouterr().err

    with pytest.raises(ZooError, match="data.damaged=fail is for images that are opened one by"):
        ImageData("wds/x", num_classes=2, damaged="fail").attach(model)


def test_folders_of_torchvision_data_are_opened_here_too(tmp_path):
    from torchvision.datasets import ImageFolder

    paths = pictures(tmp_path)
    paths[0].write_bytes(b"")
    found = zoo.data.source._wrapped(ImageFolder(str(tmp_path / "train")))
    assert found.names == ["a", "b"] and not found.readable(0) and found[1][0].mode == "L"
    with pytest.raises(ZooError, match=f"{paths[0]}: no image that Pillow can read"):
        found[0]

"""Data sets of package managers: their files found, their split fixed, their odd ones."""

import gzip
import shlex
import struct

import numpy as np
import pytest
from PIL import Image

from zoo.cli.main import main
from zoo.data import fashion_mnist, openclipart
from zoo.data.fashion_mnist import FashionMnist
from zoo.data.openclipart import OpenClipart, stem
from zoo.data.source import create
from zoo.errors import ZooError
from zoo.results.rows import read_rows


def idx(path, array, packed=False):
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.fixture
def clothes(tmp_path):
    """A folder of idx files with 240 training and 40 test images: the label in every pixel."""
    root = tmp_path / "clothes"
    root.mkdir()
    for start, count, packed in (("train", 240, True), ("t10k", 40, False)):
        labels = np.arange(count) % 10
        pixels = np.tile(labels[:, None, None], (1, 28, 28))
        pixels[:, 0, 0] = np.arange(count)
        idx(root / f"{start}-images-idx3-ubyte", pixels, packed)
        idx(root / f"{start}-labels-idx1-ubyte", labels, packed)
    return root


def test_splits_are_fixed_stratified_and_share_no_image(clothes):
    parts = {split: FashionMnist(split, str(clothes)) for split in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 220,
        "val": 20,
        "test": 40,
    }
    seen = {}
    for name, part in parts.items():
        image, label = part[3]
        assert image.size == (28, 28) and image.mode == "L"
        assert np.asarray(image)[1, 1] == label
        assert np.bincount(part.labels).tolist() == [len(part) // 10] * 10
        seen[name] = {int(pixels[0, 0]) for pixels in part.pixels}
    assert not seen["train"] & seen["val"] and len(seen["train"] | seen["val"]) == 240
    again = FashionMnist("validation", str(clothes))
    assert (again.pixels == parts["val"].pixels).all()


def test_files_are_found_where_debian_puts_them(clothes, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", clothes)
    assert len(create("fashion_mnist", None, "test", training=False)) == 40
    # What was typed comes first.
    with pytest.raises(ZooError, match="no idx files in /nowhere.*dataset-fashion-mnist"):
        create("fashion_mnist", "/nowhere", "test", training=False)


def test_torchvision_fetches_what_is_nowhere(clothes, tmp_path, monkeypatch):
    import torchvision.datasets

    asked = []

    class Fetched:
        def __init__(self, root, download):
            asked.append((root, download))
            raw = tmp_path / "here" / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            for path in clothes.iterdir():
                (raw / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Fetched)
    root = str(tmp_path / "here")
    for _ in range(2):  # once
        assert len(FashionMnist("test", root, download=True)) == 40
    assert asked == [(root, True)]

    def offline(root, download):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    with pytest.raises(ZooError, match="cannot be fetched: Error downloading; install Debian's"):
        FashionMnist("test", str(tmp_path / "there"), download=True)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x0b\x01\0\0\0\x01a", b"\x1f\x8bno"])
def test_damaged_files_are_refused_by_name(clothes, content):
    path = clothes / "t10k-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(ZooError, match="t10k-labels-idx1-ubyte.*(no idx file|cannot be read)"):
        FashionMnist("test", str(clothes))
    path.unlink()
    idx(path, np.zeros(39))
    with pytest.raises(ZooError, match="40 images .* and 39 labels do not belong together"):
        FashionMnist("test", str(clothes))
    with pytest.raises(ZooError, match="splits train, val and test, got 'extra'"):
        FashionMnist("extra", str(clothes))


def test_a_command_reads_clothes_and_looks_them_up(clothes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = (
        "eval backbone=test_vit +backbone.args.num_classes=0 +backbone.args.in_chans=1 "
        f"data=fashion_mnist data.root={clothes} task=[knn,retrieval] limit=20 gallery_limit=50 "
        "knn.k=3"
    )
    assert main(shlex.split(line)) == 0
    (row,) = read_rows(tmp_path / "results")
    assert (row["dataset"], row["split"], row["n_images"]) == ("fashion_mnist", "test", 20)
    assert row["n_gallery"] == 50 and row["knn"]["top1"] > 50


# ---------------------------------------------------------------------------------- drawings


def draw(path, seed, size=(24, 20), mode="RGBA"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(path)


@pytest.fixture
def drawings(tmp_path):
    """Two categories of 30 images, nested, one of 5, and odd things."""
    root = tmp_path / "png"
    for number, category in enumerate(("food", "food/fruit", "few")):
        for i in range(5 if category == "few" else 30):
            name = f"{'abcdefghijklmnopqrstuvwxyzABCD'[i]}{category.replace('/', '')}"
            draw(root / category / f"{name}_thing.png", 100 * number + i)
    for i in range(1, 6):
        draw(root / "food" / f"apple_by_me_0{i}.png", 1000 + i)
        (root / "food" / "fruit" / f"other{'vwxyz'[i - 1]}.png").write_bytes(
            (root / "food" / "apple_by_me_01.png").read_bytes()
        )
    draw(root / "food" / "tiny.png", 1, (15, 40))
    (root / "food" / "broken.png").write_bytes(b"no image")
    (root / "food" / "linked.png").symlink_to("tiny.png")
    (root / "food" / "readme.txt").write_text("no image either")
    draw(root / "loose.png", 5)
    return root


def test_categories_are_folders_with_enough_images_and_the_odd_ones_are_counted(drawings):
    parts = {s: OpenClipart(s, str(drawings), least=20) for s in ("train", "val", "test")}
    for part in parts.values():
        assert part.classes == ["food", "food/fruit"]
        assert part.left_out == (
            "1 files that are no images, 1 images below 16 pixels, "
            "5 images in 1 folders of fewer than 20, 1 links to other images"
        )
    paths = [path for part in parts.values() for path, _ in part.samples]
    assert len(paths) == len(set(paths)) == 70
    assert len(parts["train"]) > len(parts["test"]) > 0 and len(parts["val"]) > 0
    # Paths and classes do not depend on what was asked first.
    openclipart._scan.cache_clear()
    assert OpenClipart("test", str(drawings), least=20).samples == parts["test"].samples


def test_what_is_nearly_the_same_is_on_one_side(drawings):
    where = {}
    for split in ("train", "val", "test"):
        for path, _ in OpenClipart(split, str(drawings), least=20).samples:
            if "apple" in path or "other" in path:  # five by name, five more by bytes
                where[path] = split
    assert len(where) == 10 and len(set(where.values())) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flask_matthew__01", "flask_matthew"),
        ("flask_matthew__01r", "flask_matthew"),
        ("flask_matthew_", "flask_matthew"),
        ("button-2", "button"),
        ("Star 3", "star"),
        ("star_77pt37step", "star_77pt37step"),
        ("007", "007"),
    ],
)
def test_numbers_at_the_end_of_a_name_do_not_count(name, expected):
    assert stem(f"a/b/{name}.png") == expected


def test_transparent_parts_are_white_and_folders_that_are_not_there_are_named(drawings, tmp_path):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(drawings / "food" / "nothing.png")
    openclipart._scan.cache_clear()
    from zoo.data.images import Picture

    for split in ("train", "val", "test"):
        data = create("openclipart", str(drawings), split, training=False, least=20)
        data.prepare = Picture(3)
        for i in range(len(data)):
            if data.file(i).endswith("nothing.png"):
                image, _ = data[i]
                assert np.asarray(image).min() == 255
                break
    with pytest.raises(ZooError, match="no folder .*openclipart-png, or type data.root"):
        OpenClipart("test", str(tmp_path / "nowhere"))
    with pytest.raises(ZooError, match="no folder with 90 PNG images"):
        OpenClipart("test", str(drawings))


def test_a_command_reads_drawings(drawings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = (
        "eval backbone=test_vit +backbone.args.num_classes=0 data=openclipart data.num_workers=0 "
        f"data.root={drawings} data.options.least=20 task=knn knn.k=3"
    )
    assert main(shlex.split(line)) == 0
    assert "1 images below 16 pixels" in capsys.readouterr().err
    (row,) = read_rows(tmp_path / "results")
    assert row["dataset"] == "openclipart" and row["n_gallery"] > row["n_images"] > 0

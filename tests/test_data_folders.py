"""Image folders: classes go by name, what is no image is counted, nothing shifts a label."""

from __future__ import annotations

import json
import os
import shlex
import tarfile
import unicodedata
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import zoo
from zoo.cli.main import main
from zoo.data.classes import in_order, read_class_map
from zoo.data.folder import image_extensions
from zoo.data.loader import say
from zoo.data.module import ImageData
from zoo.errors import ZooError


@pytest.fixture(autouse=True)
def say_again():
    say.cache_clear()  # every test hears what is said once per process


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_vit", num_classes=3, img_size=32)


def save(root: Path, *names: str) -> Path:
    """Small pictures, and whatever else has another ending."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".txt", ".db", ".heic", ""):
            path.write_text("no picture")
        else:
            Image.new("RGB", (8, 8), "red").save(path)
    return root


def labels(data: ImageData, part: str = "test") -> dict[str, int]:
    """Class number by name of the class folder."""
    source = data.dataset(part)
    return {Path(source.name(i)).parent.name: source[i][1] for i in range(len(source))}


def knowing(names: list[str] | None, outputs: int | None = None) -> torch.nn.Module:
    """A model whose weights were saved with the names of their classes."""
    net = timm.create_model("test_vit", num_classes=outputs or len(names or ()), img_size=32)
    net.pretrained_cfg = {**net.pretrained_cfg, "zoo_data": {"class_names": names}}
    return net


# -- what is left out -----------------------------------------------------------------------------


def test_only_class_folders_are_classes_and_the_rest_is_counted_in_one_line(tmp_path, capsys):
    for name in ("train/cat", "train/dog"):
        save(tmp_path, f"{name}/1.png", f"{name}/2.PNG")
    save(
        tmp_path / "train",
        "preview.png",
        "readme.txt",
        ".hidden.png",
        ".ipynb_checkpoints/1.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "cat/.DS_Store.txt",
        "cat/._1.png",
        "__MACOSX/cat/._1.png",
        "@eaDir/cat/1.png",
        "cat/monday/1.png",
        "cat/Thumbs.db",
        "cat/notes.txt",
    )
    (tmp_path / "train" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "train" / "dog" / "pipe.png")  # reading it would wait for ever
    data = ImageData("folder", str(tmp_path), test_split="train", num_workers=0)
    assert data.num_classes == 2 and data.class_names == ["cat", "dog"]
    net = timm.create_model("test_vit", num_classes=2, img_size=32)
    data.attach(net).setup("test")
    assert len(data.dataset("test")) == 4
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path / 'train'}: left out ")
    for part in (
        "2 macOS leftovers",
        "2 hidden folders",
        "2 hidden files",
        "1 system folder",
        "2 loose files",
        "1 sub-folder of a class",
        "2 broken links or devices",
        "2 files that are no images (.db, .txt)",
    ):
        assert part in line, (part, line)


def test_a_strict_folder_is_refused_for_what_is_left_out_otherwise(tmp_path, model):
    save(tmp_path, "val/a/1.png", "val/b/1.png", "val/c/1.png", "val/stray.png")
    data = ImageData("folder", str(tmp_path), strict=True).attach(model)
    with pytest.raises(ZooError, match="1 loose file; remove it, or type data.strict=false"):
        data.setup("test")
    (tmp_path / "val" / "stray.png").unlink()
    ImageData("folder", str(tmp_path), strict=True).attach(model).setup("test")


def test_images_in_sub_folders_alone_are_no_images_of_the_class(tmp_path):
    save(tmp_path, "val/a/mon/1.png", "val/a/tue/1.png", "val/b/mon/1.png")
    data = ImageData("folder", str(tmp_path))
    assert data.class_names == ["a", "b"]
    net = timm.create_model("test_vit", num_classes=2, img_size=32)
    with pytest.raises(ZooError, match="no images in class folders, but 3 sub-folders of classes"):
        data.attach(net).setup("test")


def test_every_format_that_pillow_opens_is_found(tmp_path, model):
    endings = ("jpg", "jpeg", "JPG", "png", "bmp", "gif", "tiff", "tif", "webp", "ppm", "jp2")
    save(tmp_path, *(f"val/a/{i}.{end}" for i, end in enumerate(endings)), "val/a/x.heic")
    save(tmp_path, "val/b/1.png", "val/c/1.png")
    data = ImageData("folder", str(tmp_path)).attach(model)
    data.setup("test")
    assert len(data.dataset("test")) == len(endings) + 2
    assert "(.heic)" in data.dataset("test").left_out
    # What starts another program, or is no picture to Pillow, is not tried.
    assert not image_extensions() & {".eps", ".ps", ".h5", ".mpg", ".txt", ".heic"}


@pytest.mark.parametrize(
    ("chosen", "count"), [(["jpg"], 1), ("PNG", 3), ([".jpg", "png"], 4), (["png", ""], 4)]
)
def test_extensions_can_be_chosen(tmp_path, model, chosen, count):
    save(tmp_path, "val/a/1.jpg", "val/a/2.png", "val/b/1.png", "val/c/1.png")
    Image.new("L", (8, 8)).save(tmp_path / "val" / "a" / "bare", format="PNG")
    data = ImageData("folder", str(tmp_path), extensions=chosen).attach(model)
    assert len(data.dataset("test")) == count


@pytest.mark.parametrize("chosen", [[], [1]])
def test_extensions_that_are_none(tmp_path, model, chosen):
    save(tmp_path, "val/a/1.png", "val/b/1.png", "val/c/1.png")
    data = ImageData("folder", str(tmp_path), extensions=chosen).attach(model)
    with pytest.raises(ZooError, match="data.extensions must be file name endings"):
        data.setup("test")


def test_options_of_folders_are_refused_for_other_data():
    for options in ({"class_order": "plain"}, {"extensions": ["png"]}, {"strict": True}):
        with pytest.raises(ZooError, match="are for image folders, digits brings"):
            ImageData("digits", **options).setup("test")


def test_words_that_are_no_choice():
    with pytest.raises(ZooError, match="data.class_order=random: expected natural"):
        ImageData(class_order="random")
    with pytest.raises(ZooError, match="data.damaged=ignore: expected skip or fail"):
        ImageData(damaged="ignore")
    with pytest.raises(ZooError, match="data.strict must be true or false, got 'perhaps'"):
        ImageData(strict="perhaps")


# -- numbers of classes ---------------------------------------------------------------------------


def test_an_empty_or_missing_class_folder_shifts_no_label(tmp_path, model, capsys):
    save(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/1.png")
    (tmp_path / "val" / "b").mkdir()
    data = ImageData("folder", str(tmp_path)).attach(model)
    assert labels(data) == {"a": 0, "c": 2}
    assert "no images of 1 of 3 classes (b)" in capsys.readouterr().err
    (tmp_path / "val" / "b").rmdir()
    assert labels(ImageData("folder", str(tmp_path)).attach(model)) == {"a": 0, "c": 2}
    data = ImageData("folder", str(tmp_path), batch_size=2, num_workers=0)
    data.attach(model, training=True).setup("fit")
    assert labels(data, "val") == {"a": 0, "c": 2}


def test_an_empty_class_folder_of_an_evaluation_folder_counts(tmp_path, model):
    save(tmp_path, "val/a/1.png", "val/c/1.png")
    (tmp_path / "val" / "b").mkdir()
    assert labels(ImageData("folder", str(tmp_path)).attach(model)) == {"a": 0, "c": 2}


def test_classes_that_training_did_not_have_are_refused_at_evaluation_too(tmp_path, model):
    save(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/a/1.png", "val/C/1.png")
    with pytest.raises(ZooError, match="not have the same classes.*C, b, c"):
        ImageData("folder", str(tmp_path)).attach(model).setup("test")


def test_fewer_class_folders_than_were_given_are_refused(tmp_path, model):
    save(tmp_path, "val/a/1.png", "val/c/1.png")
    with pytest.raises(ZooError, match="2 class folders, got data.num_classes=3: which classes"):
        ImageData("folder", str(tmp_path), num_classes=3).attach(model)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    data = ImageData("folder", str(tmp_path), num_classes=3, class_map=str(tmp_path / "names.txt"))
    assert labels(data.attach(model)) == {"a": 0, "c": 2}
    assert data.class_names == ["a", "b", "c"] and data.class_order == "class_map"


def test_both_sorting_rules(tmp_path, model):
    save(tmp_path, "val/b10/1.png", "val/b2/1.png", "val/C/1.png")
    natural = ImageData("folder", str(tmp_path)).attach(model)
    assert labels(natural) == {"b2": 0, "b10": 1, "C": 2} and natural.class_order == "natural"
    for plain in (
        ImageData("folder", str(tmp_path), class_order="plain"),
        ImageData("torch/image_folder", str(tmp_path)),  # torchvision's, by timm's name for it
    ):
        assert labels(plain.attach(model)) == {"C": 0, "b10": 1, "b2": 2}
        assert plain.class_order == "plain"
    # Names that differ in their capitals alone come in one order always.
    assert in_order({"a", "A", "b"}, "natural") == ["A", "a", "b"]


def test_accents_are_one_name_however_the_file_system_spells_them(tmp_path):
    composed, split = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    save(tmp_path, f"train/{composed}/1.png", "train/bar/1.png", f"val/{split}/1.png")
    net = timm.create_model("test_vit", num_classes=2, img_size=32)
    data = ImageData("folder", str(tmp_path)).attach(net)
    assert list(labels(data).values()) == [1]


def test_a_class_map_says_what_it_leaves_out_and_refuses_what_it_cannot_mean(tmp_path, model):
    save(tmp_path, "val/a/1.png", "val/b/1.png", "val/zebra/1.png")
    names = tmp_path / "names.txt"
    names.write_bytes("\ufeffb\r\nx\r\na\r\n".encode())  # as Windows writes it
    data = ImageData("folder", str(tmp_path), class_map=str(names)).attach(model)
    assert labels(data) == {"a": 2, "b": 0}
    assert "1 image of a class that data.class_map lacks" in data.dataset("test").left_out
    for text, message in (("a\nb\na\n", "'a' twice"), ("", "got 'nothing'")):
        names.write_text(text)
        with pytest.raises(ZooError, match=message):
            read_class_map(str(names))
    with pytest.raises(ZooError, match="no such file"):
        read_class_map("nowhere.txt")
    with pytest.raises(ZooError, match="a whole number from 0, got -1"):
        read_class_map({"a": -1})
    names.write_text("b\nc\na\n")
    with pytest.raises(ZooError, match="'b' the number 0, the weights know it as 1"):
        ImageData("folder", str(tmp_path), class_map=str(names)).attach(knowing(["a", "b", "c"]))


# -- names saved with the weights -----------------------------------------------------------------


def test_weights_that_know_their_classes_decide_the_numbers(tmp_path):
    save(tmp_path, "val/b/1.png", "val/a/1.png")
    data = ImageData("folder", str(tmp_path)).attach(knowing(["c", "b", "a"]))
    assert labels(data) == {"a": 2, "b": 1}
    assert data.num_classes == 3 and data.class_order == "weights"
    # Also where a training split lies beside that has others.
    save(tmp_path, "train/b/1.png", "train/z/1.png")
    assert labels(ImageData("folder", str(tmp_path)).attach(knowing(["c", "b", "a"])))["a"] == 2


def test_classes_that_the_weights_do_not_know_are_refused(tmp_path):
    save(tmp_path, "val/a/1.png", "val/zebra/1.png")
    net = knowing(["a", "b"])
    with pytest.raises(ZooError, match="do not know: zebra; they know a, b; rename the folders"):
        ImageData("folder", str(tmp_path)).attach(net).setup("test")
    data = ImageData("folder", str(tmp_path), match_names=False).attach(net)
    assert labels(data) == {"a": 0, "zebra": 1}
    with pytest.raises(ZooError, match="digits has classes that the weights do not know"):
        ImageData("digits", test_split="test").attach(knowing(list("abcdefghij"))).setup("test")


def test_names_of_another_classifier_say_nothing(tmp_path):
    save(tmp_path, "val/a/1.png", "val/b/1.png")
    net = timm.create_model("test_vit", num_classes=2, img_size=32)
    net.pretrained_cfg = {**net.pretrained_cfg, "zoo_data": {"class_names": ["x", "y", "z"]}}
    assert labels(ImageData("folder", str(tmp_path)).attach(net)) == {"a": 0, "b": 1}
    assert labels(ImageData("folder", str(tmp_path)).attach(knowing(None, 2))) == {"a": 0, "b": 1}


def test_names_that_are_no_list_of_text(tmp_path):
    save(tmp_path, "val/a/1.png", "val/b/1.png")
    for wrong in ("ab", [1, 2], {"a": 0}):
        with pytest.raises(ZooError, match="must be a list of text.*data.match_names=false"):
            ImageData("folder", str(tmp_path)).attach(knowing(wrong, 2))


def test_training_may_learn_other_classes_and_says_so(tmp_path, capsys):
    save(tmp_path, "train/a/1.png", "train/z/1.png", "val/a/1.png")
    data = ImageData("folder", str(tmp_path), batch_size=1, num_workers=0)
    data.attach(knowing(["b", "a"]), training=True).setup("fit")
    assert labels(data, "train") == {"a": 0, "z": 1} and data.class_names == ["a", "z"]
    assert "has other classes than the weights know, they differ in b, z" in capsys.readouterr().err
    data.attach(knowing(["z", "a"]), training=True)  # the same classes keep their outputs
    assert labels(data, "train") == {"a": 1, "z": 0}


def test_part_of_imagenet_goes_by_its_synsets(tmp_path):
    save(tmp_path, "val/n01440764/1.png", "val/n03394916/1.png")  # tench, French horn
    net = timm.create_model("test_vit", num_classes=1000, img_size=32)
    data = ImageData("folder", str(tmp_path), num_classes=1000).attach(net)
    assert labels(data) == {"n01440764": 0, "n03394916": 566} and data.class_order == "weights"


def test_a_run_is_not_resumed_with_other_classes(tmp_path, model):
    save(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/a/1.png")
    data = ImageData("folder", str(tmp_path)).attach(model, training=True)
    state = data.state_dict()
    data.load_state_dict(state)
    (tmp_path / "train" / "a").rename(tmp_path / "train" / "d")
    with pytest.raises(ZooError, match="began with other classes, they differ in a, d"):
        ImageData("folder", str(tmp_path)).attach(model, training=True).load_state_dict(state)


# -- tar files ------------------------------------------------------------------------------------


def pack(folder: Path, file: Path, mode: str = "w", top: str = "") -> Path:
    with tarfile.open(file, mode) as archive:
        archive.add(folder, arcname=top or ".")
    return file


def test_a_tar_file_is_read_as_the_folder_that_it_holds(tmp_path, model):
    folder = save(tmp_path / "f", "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png")
    save(folder, "val/._c/1.png", "val/c/._1.png", "val/a/2.jpg", "val/stray.png")
    for top in ("", "pictures"):
        file = pack(folder, tmp_path / f"x{top}.tar", top=top)
        data = ImageData("folder", str(file), batch_size=1, num_workers=0).attach(model)
        assert labels(data) == {"a": 0, "c": 2}
        assert data.dataset("test").left_out == "1 loose file, 2 macOS leftovers"
        assert len(data.dataset("train")) == 3  # and not the validation images too
    data = ImageData("folder", str(file), num_workers=2, batch_size=1).attach(model)
    next(iter(data.dataset("test")))  # this process has the file open too
    assert sorted(int(y) for _, y in data.test_dataloader()) == [0, 2]


def test_a_tar_file_without_splits_is_not_trained_and_tested_on(tmp_path, model):
    folder = save(tmp_path / "f", "a/1.png", "b/1.png", "c/1.png")
    file = pack(folder, tmp_path / "x.tar")
    data = ImageData("folder", str(file)).attach(model)
    assert len(data.dataset("test")) == 3
    with pytest.raises(ZooError, match="no folder for the split 'train'"):
        data.setup("fit")


def test_what_is_no_tar_file(tmp_path):
    for file in (
        pack(save(tmp_path / "f", "a/1.png"), tmp_path / "x.tar.gz", "w:gz"),
        save(tmp_path, "x.txt") / "x.txt",
    ):
        with pytest.raises(ZooError, match="expected a folder or an uncompressed .tar file"):
            _ = ImageData("folder", str(file)).num_classes


# -- from the command line ------------------------------------------------------------------------


def test_names_are_saved_with_a_model_and_rule_its_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "pictures"
    for i in range(2):
        save(root, f"train/b10/{i}.png", f"train/b2/{i}.png", f"val/b10/{i}.png", f"val/b2/{i}.png")
    folder = f"data=folder data.root={root} data.num_workers=0"
    train = (
        f"train {folder} data.batch_size=2 data.class_order=plain backbone=vit_digits "
        "+backbone.args.depth=1 augment=none callbacks=none logger=none trainer=cpu "
        "trainer.max_epochs=1 trainer.enable_progress_bar=false output_dir=run results=rows.jsonl"
    )
    assert main(shlex.split(train)) == 0
    row = json.loads(Path("rows.jsonl").read_text())
    assert row["class_order"] == "plain"
    saved = json.loads(Path("run/model/config.json").read_text())["data"]
    assert (saved["class_names"], saved["class_order"]) == (["b10", "b2"], "plain")
    # By name, whatever the sorting rule of the evaluation, and without b10.
    for path in (root / "val" / "b10").iterdir():
        path.unlink()
    model = zoo.load("run/model")
    assert labels(ImageData("folder", str(root)).attach(model)) == {"b2": 1}
    evaluate = f"eval {folder} weights=run/model task=accuracy results=rows.jsonl"
    assert main(shlex.split(evaluate)) == 0
    row = json.loads(Path("rows.jsonl").read_text().splitlines()[-1])
    assert (row["n_images"], row["class_order"]) == (2, "weights")
    capsys.readouterr()
    (root / "val" / "b2").rename(root / "val" / "zebra")
    assert main(shlex.split(evaluate)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: pictures has classes that the weights do not know: zebra")

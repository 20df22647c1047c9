"""Data: the digits split, transforms that follow the model, folders, refusals, seeded order."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
import zoo.models  # noqa: F401  (registers vit_digits)
from zoo.data.checks import data_config
from zoo.data.digits import Digits, split_indices
from zoo.data.module import ImageData
from zoo.data.sampler import EpochSampler, epoch_seed
from zoo.data.synthetic import SHAPES, Shapes
from zoo.data.transforms import train_transform
from zoo.errors import ZooError


@pytest.fixture(scope="module")
def grey():
    return timm.create_model("vit_digits", embed_dim=32, depth=1)


@pytest.fixture(scope="module")
def colour():
    return timm.create_model("test_vit", num_classes=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("val", 6)):
        data = Shapes(split, count, num_classes=3, size=72)
        for i in range(count):
            image, label = data[i]
            place = root / split / SHAPES[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i}.png")
    return root


# -- digits ---------------------------------------------------------------------------------------


def test_digits_split_never_changes():
    index = split_indices()
    text = ";".join(f"{k}:{','.join(map(str, index[k]))}" for k in ("train", "val", "test"))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "d3a9ea081900d38fc48eb34f32eff34cc805c5a3851829d10b713a0fe05b8a3a"
    )


def test_digits_split_is_a_stratified_partition():
    index = split_indices()
    every = np.concatenate(list(index.values()))
    assert len(every) == 1797 and len(set(every.tolist())) == 1797
    whole = np.bincount(np.concatenate([Digits(s).labels for s in index]), minlength=10)
    for split, size in (("train", 1257), ("val", 180), ("test", 360)):
        labels = Digits(split).labels
        assert len(labels) == size
        expected = whole * size / 1797
        assert np.abs(np.bincount(labels, minlength=10) - expected).max() <= 1


def test_digits_are_the_images_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = Digits("test")
    for i in (0, 100, 359):
        image, label = data[i]
        number = data.index[i]
        assert image.mode == "L" and label == bunch.target[number]
        np.testing.assert_allclose(np.asarray(image) / 255 * 16, bunch.images[number], atol=0.05)


def test_digits_refuse_an_unknown_split():
    with pytest.raises(ZooError, match="train, val and test, got 'dev'"):
        Digits("dev")


# -- what the model wants -------------------------------------------------------------------------


def test_images_follow_the_model(grey):
    data = ImageData("digits", val_split="val", test_split="test", augment=None).attach(grey)
    image, _ = data.dataset("test")[0]
    assert image.shape == (1, 16, 16)
    assert data.config["mean"] == (0.306,) and data.config["std"] == (0.319,)
    black = data.dataset("test").transform(Image.new("L", (8, 8), 0))
    torch.testing.assert_close(black, torch.full((1, 16, 16), -0.306 / 0.319))


def test_training_images_have_mean_0_and_deviation_1(grey):
    data = ImageData("digits").attach(grey)
    pixels = torch.stack([x for x, _ in data.dataset("train")])
    assert abs(pixels.mean()) < 0.02 and abs(pixels.std() - 1) < 0.02


def test_overrides_win_over_the_model(grey):
    config = data_config(grey, {"mean": 0.25, "std": [0.5], "interpolation": "bicubic"})
    assert config["mean"] == (0.25,) and config["std"] == (0.5,)
    assert config["interpolation"] == "bicubic"


def test_a_colour_model_gets_colour_and_a_grey_one_grey(folder, colour):
    grey = timm.create_model("test_vit", num_classes=3, in_chans=1)
    for model, channels in ((colour, 3), (grey, 1)):
        data = ImageData("folder", str(folder)).attach(model)
        assert data.dataset("val")[0][0].shape == (channels, 160, 160)
        assert len(data.config["mean"]) == channels


def test_a_model_built_for_another_size_gets_that_size(folder):
    model = timm.create_model("test_vit", num_classes=3, img_size=96)
    data = ImageData("folder", str(folder)).attach(model)
    assert data.dataset("val")[0][0].shape == (3, 96, 96)


def test_a_size_that_is_no_square_is_advised_as_it_is_typed(colour):
    with pytest.raises(ZooError, match=r"type \+backbone\.args\.img_size=\[16,20\] to build"):
        ImageData("digits", img_size=[16, 20]).attach(zoo.load("vit_digits"), check=False)
    with pytest.raises(ZooError, match=r"example data\.img_size=\[96,32\]"):
        ImageData("digits", img_size=[100, 32]).attach(colour, check=False)


def test_size_that_the_patch_does_not_divide(colour):
    with pytest.raises(ZooError, match=r"100x100 is not a multiple of the patch size 16x16.*=96"):
        ImageData("digits", img_size=100).attach(colour, check=False)


def test_size_that_the_model_was_not_built_for(grey, colour):
    with pytest.raises(ZooError, match=r"built for 16x16.*\+backbone.args.img_size=32"):
        ImageData("digits", img_size=32).attach(grey)
    data = ImageData("digits", img_size=192).attach(colour, check=False)  # takes any size
    assert data.dataset("test")[0][0].shape == (3, 192, 192)


def test_wrong_number_of_classes(colour):
    with pytest.raises(ZooError, match="digits has 10 classes, the model's head has 3 outputs"):
        ImageData("digits").attach(colour)


# -- folders and names ----------------------------------------------------------------------------


def test_folder_is_read_with_its_classes(folder, colour):
    data = ImageData("folder", str(folder), batch_size=4, num_workers=0).attach(colour)
    data.setup("fit")
    assert data.num_classes == 3 and data.class_names == sorted(SHAPES[:3])
    batches = list(data.val_dataloader())
    assert sum(len(y) for _, y in batches) == 6
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == [0, 0, 1, 1, 2, 2]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 160, 160) and labels.shape == (4,)


def test_missing_root_is_one_clear_line(tmp_path):
    with pytest.raises(ZooError, match="no such folder; expected one with train/ and val/") as info:
        _ = ImageData("folder", str(tmp_path / "nowhere")).num_classes
    assert "\n" not in str(info.value)
    with pytest.raises(ZooError, match="data=folder needs data.root=PATH"):
        _ = ImageData("folder").num_classes


def test_missing_split_is_not_replaced_by_the_root(folder, tmp_path, colour):
    (tmp_path / "train").symlink_to(folder / "train")
    data = ImageData("folder", str(tmp_path)).attach(colour)
    with pytest.raises(ZooError, match="no folder for the split 'validation'.*found: train"):
        data.setup("fit")


def test_a_plain_folder_of_classes_can_be_evaluated_but_not_trained_on(folder, colour):
    data = ImageData("folder", str(folder / "val")).attach(colour)
    data.setup("test")
    assert len(data.dataset("test")) == 6
    with pytest.raises(ZooError, match="no folder for the split 'train'"):
        data.setup("fit")


def test_other_classes_in_validation_than_in_training(folder, tmp_path, colour):
    (tmp_path / "train").symlink_to(folder / "train")
    for name in ("disc", "square", "zebra"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / "x.png")
    with pytest.raises(ZooError, match="not have the same classes.*triangle, zebra"):
        ImageData("folder", str(tmp_path)).attach(colour).setup("fit")


def test_torchvision_data_by_its_timm_name(tmp_path):
    model = timm.create_model("test_vit", num_classes=10)
    data = ImageData("torch/cifar10", str(tmp_path), download=False)
    with pytest.raises(ZooError, match=r"torch/cifar10.*data.download=true"):
        data.attach(model)
    with pytest.raises(ZooError, match="Unknown torchvision dataset"):
        ImageData("torch/cifra10", str(tmp_path)).attach(model)


@pytest.mark.parametrize(
    ("name", "package"), [("hfds/org/name", "datasets"), ("wds/name", "webdataset")]
)
def test_packages_for_other_formats_are_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ZooError, match=f"needs a package: pip install {package}"):
        _ = ImageData(name, "nowhere", num_classes=2).num_classes


@pytest.mark.parametrize(
    ("name", "there"), [("digits", "there are none"), ("synthetic", "there are size, train_length")]
)
def test_options_that_a_data_set_does_not_have(name, there):
    with pytest.raises(ZooError, match=f"data.options of {name}: {there}.*got \\['foo'\\]"):
        ImageData(name, options={"foo": 1}).setup("test")


def test_unknown_name():
    with pytest.raises(ZooError, match="unknown data name 'digitz'; expected digits"):
        _ = ImageData("digitz").num_classes


def test_label_out_of_the_given_classes(folder):
    with pytest.raises(ZooError, match="has 3 classes, got data.num_classes=2"):
        _ = ImageData("folder", str(folder), num_classes=2).num_classes


# -- augmentation ---------------------------------------------------------------------------------


def _two_halves() -> Image.Image:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, 8:] = 255
    return Image.fromarray(pixels)


def test_nothing_is_mirrored_where_a_mirror_image_is_another_class(grey):
    config = data_config(grey)
    sure = {"hflip": 1.0, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    plain = train_transform(config, sure, mirror=False)(_two_halves())
    mirrored = train_transform(config, sure, mirror=True)(_two_halves())
    assert plain[0, 0, 0] < plain[0, 0, -1] and mirrored[0, 0, 0] > mirrored[0, 0, -1]


def test_augmentation_changes_training_images_only(grey):
    augment = {"scale": [1, 1], "ratio": [1, 1], "affine": {"degrees": 20, "translate": 0.2}}
    data = ImageData("digits", augment=augment).attach(grey)
    train, val = data.dataset("train"), data.dataset("val")
    assert not torch.equal(train[0][0], train[0][0])
    assert torch.equal(val[0][0], val[0][0])


def test_unknown_augmentation():
    with pytest.raises(ZooError, match=r"unknown augment keys \['flip'\]"):
        train_transform({"input_size": (3, 8, 8)}, {"flip": 1})


# -- order ----------------------------------------------------------------------------------------


def test_order_depends_on_seed_and_epoch_only():
    data = range(50)
    walked = EpochSampler(data, seed=3)
    orders = []
    for epoch in range(3):
        walked.set_epoch(epoch)
        orders.append(list(walked))
    resumed = EpochSampler(data, seed=3)
    resumed.set_epoch(2)
    assert list(resumed) == orders[2]
    assert orders[0] != orders[1] != orders[2]
    assert list(EpochSampler(data, seed=4)) != orders[0]


def test_processes_share_the_images_and_draw_other_numbers():
    parts = [EpochSampler(range(10), rank=r, world_size=2) for r in range(2)]
    assert sorted(list(parts[0]) + list(parts[1])) == list(range(10))
    assert epoch_seed(0, 1, 0) != epoch_seed(0, 1, 1) != epoch_seed(0, 2, 1)


def test_loader_processes_are_seeded(grey):
    augment = {"scale": [1, 1], "ratio": [1, 1], "affine": {"degrees": 20, "translate": 0.2}}

    def first_batch(seed: int) -> torch.Tensor:
        data = ImageData("digits", augment=augment, num_workers=1, batch_size=8, seed=seed)
        return next(iter(data.attach(grey).train_dataloader()))[0]

    torch.manual_seed(0)
    a = first_batch(1)
    torch.manual_seed(1)  # the state of the process must not matter
    assert torch.equal(a, first_batch(1))
    assert not torch.equal(a, first_batch(2))


def test_fewer_images_than_a_batch_still_give_one(folder, colour):
    data = ImageData("folder", str(folder), batch_size=64, num_workers=0).attach(colour)
    assert [len(y) for _, y in data.train_dataloader()] == [12]


def test_shapes_are_the_same_everywhere_and_differ_between_splits():
    a, b = Shapes("train", 4, size=16), Shapes("train", 4, size=16)
    assert a[1][0].tobytes() == b[1][0].tobytes()
    assert a[1][0].tobytes() != Shapes("val", 4, size=16)[1][0].tobytes()
    assert [a[i][1] for i in range(4)] == [0, 1, 2, 3]

"""Training: one step learns, resuming changes nothing, what is saved can be loaded."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import zoo
from reduction.methods.tome import ToMe
from reduction.mixins.training import Trains
from zoo.data import build_data
from zoo.errors import BadCheckpoint, UnknownName, ZooError
from zoo.lit.callbacks import EMA
from zoo.lit.classifier import Classifier
from zoo.lit.optim import create_optimizer
from zoo.lit.schedules import constant, cosine, wsd
from zoo.run.train import train

CONFIGS = str(Path(__file__).parents[1] / "configs")
# A tenth of the shipped model's size: an epoch takes a moment.
TINY = [
    "backbone=vit_digits",
    "+backbone.args.depth=3",
    "+backbone.args.embed_dim=32",
    "data.batch_size=32",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.limit_train_batches=3",
    "optim.lr=1e-3",
]


class StopIn(pl.Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KeyboardInterrupt


class MustTrain(pl.Callback):
    """`zoo.load` returns models in evaluation mode; training in it would drop the drop path."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        assert all(m.training for m in pl_module.net.modules())


@pytest.fixture(autouse=True)
def keep_signal_handler():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from the first one on


def config(*overrides: str, out: Path, base: list[str] = TINY):
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose("train", [*base, *overrides, f"output_dir={out}"])


def net(**options):
    return zoo.create_model("vit_digits", **{"embed_dim": 32, "depth": 3, **options})


def digits(count: int = 64):
    from zoo.data.module import ImageData

    data = ImageData("digits", batch_size=count).attach(net())
    return next(iter(data.train_dataloader()))


def weights(path: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)[key]


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One uninterrupted run of three epochs."""
    out = tmp_path_factory.mktemp("run")
    # With a loader process: it draws the first images of an epoch before the epoch starts.
    overrides = ("reducer=tome", "trainer.max_epochs=3", "augment=digits", "data.num_workers=1")
    return out, train(config(*overrides, out=out)), overrides


# -- whole runs -----------------------------------------------------------------------------------


def test_row_of_a_run(run):
    out, row, _ = run
    assert row["status"] == "ok" and row["task"] == ["train", "accuracy"] and row["trained"]
    assert (row["method"], row["backbone"], row["dataset"]) == ("tome", "vit_digits", "digits")
    assert (row["split"], row["n_images"], row["img_size"]) == ("test", 360, 16)
    assert 0 <= row["ci95"][0] <= row["top1"] <= row["ci95"][1] <= 100 and row["top5"] > row["top1"]
    assert row["tokens"][0][0] == 65 and row["gmacs"]["total"] < row["gmacs_dense"]
    assert "3 epochs from scratch" in row["notes"] and "part of the data" in row["notes"]


def test_model_folder_gives_the_accuracy_of_the_row(run):
    out, row, overrides = run
    model = zoo.load(str(out / "model"))
    assert model.reducer.name == "tome"
    data = build_data(config(*overrides, out=out), model)
    with torch.no_grad():
        hits = sum((model(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader())
    assert 100 * hits / 360 == pytest.approx(row["top1"], abs=1e-3)


def test_checkpoint_holds_plain_containers_and_loads(run):
    out, _, _ = run
    path = out / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    recipe = stored["hyper_parameters"]["recipe"]
    assert type(recipe) is dict and recipe["reducer"]["name"] == "tome"
    assert stored["hyper_parameters"]["data"]["input_size"] == [1, 16, 16]
    model = zoo.load(str(path))
    assert gap(model.state_dict(), {k[4:]: v for k, v in weights(path).items()}) == 0


def test_checkpoint_names_need_no_quoting(run):
    out, _, _ = run
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert len(names) == 2 and names[1] == "last.ckpt" and names[0].startswith("epoch_00")
    assert not any("=" in name for name in names)


def test_averaged_weights_differ_from_the_raw_ones(run):
    out, _, _ = run
    path = out / "checkpoints" / "last.ckpt"
    assert gap(weights(path), weights(path, "current_model_state")) > 1e-5


def test_resuming_equals_never_having_stopped(run, tmp_path, capsys):
    out, _, overrides = run
    stop = "+callbacks.stop={_target_: tests.test_train.StopIn, epoch: 2}"
    with pytest.raises(KeyboardInterrupt):
        train(config(*overrides, stop, out=tmp_path))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert f"ckpt={last}" in capsys.readouterr().out
    assert torch.load(last, weights_only=True)["epoch"] == 1
    # Resumed from elsewhere, it goes on in its own folder.
    row = train(config(*overrides, f"ckpt={last}", out=tmp_path / "other"))
    assert not (tmp_path / "other").exists() and (tmp_path / "model").is_dir()
    whole = out / "checkpoints" / "last.ckpt"
    for key in ("state_dict", "current_model_state"):
        assert gap(weights(whole, key), weights(last, key)) < 1e-6
    assert row["top1"] == pytest.approx(run[1]["top1"], abs=1e-6)


@pytest.mark.parametrize("which", ["best", "last"])
def test_resuming_a_finished_run_tests_and_saves_it_again(run, tmp_path, which):
    out, row, overrides = run
    copy = shutil.copytree(out, tmp_path / "run")
    last = copy / "checkpoints" / "last.ckpt"
    shutil.rmtree(copy / "model")
    again = train(config(*overrides, f"ckpt={last}", f"test={which}", out=tmp_path / "other"))
    model = zoo.load(str(copy / "model"))
    if which == "last":
        assert gap(model.state_dict(), zoo.load(str(last)).state_dict()) == 0
    else:
        assert again["top1"] == pytest.approx(row["top1"], abs=1e-6)


def test_resuming_with_another_method_is_refused(run, tmp_path):
    out, _, overrides = run
    ckpt = f"ckpt={out / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(BadCheckpoint, match="another reducer than this command asks for"):
        train(config(*overrides, "reducer=topk", ckpt, out=tmp_path))


def test_resuming_from_what_is_no_checkpoint(tmp_path):
    with pytest.raises(BadCheckpoint, match="no such file; expected a checkpoint"):
        train(config("ckpt=nowhere.ckpt", out=tmp_path))
    torch.save({"state_dict": {}}, tmp_path / "w.ckpt")
    with pytest.raises(BadCheckpoint, match="not a training checkpoint.*weights="):
        train(config(f"ckpt={tmp_path / 'w.ckpt'}", out=tmp_path))


def test_folder_data_with_a_new_classifier(tmp_path):
    from zoo.data.synthetic import Shapes

    for split in ("train", "val"):
        data = Shapes(split, 6, num_classes=3, size=40)
        for i in range(6):
            place = tmp_path / "data" / split / f"class{i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            data[i][0].save(place / f"{i}.png")
    row = train(
        config(
            "backbone=test_vit",
            "+backbone.args.img_size=64",
            "reducer=evit",
            "schedule=keep_rate",
            "schedule.rate=0.7",
            "data=folder",
            f"data.root={tmp_path / 'data'}",
            "data.batch_size=2",
            "data.num_workers=0",
            "augment=deit",
            "callbacks=none",
            "logger=none",
            "trainer.max_epochs=1",
            "trainer.limit_train_batches=2",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            out=tmp_path,
            base=[],
        )
    )
    assert row["recipe"]["backbone"]["num_classes"] == 3 and row["n_images"] == 6
    assert row["dataset"] == "data" and row["top5"] is None and row["method"] == "evit"


def test_nothing_chosen_fine_tunes_the_shipped_model_with_tome(tmp_path):
    row = train(
        config(
            "+callbacks.check={_target_: tests.test_train.MustTrain}",
            "trainer.max_epochs=1",
            "trainer.limit_train_batches=2",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            out=tmp_path,
            base=[],
        )
    )
    assert (row["backbone"], row["method"]) == ("vit_digits", "tome")
    assert "from vit_digits" in row["notes"] and row["top1"] >= 95


def test_typos_are_refused(tmp_path):
    with pytest.raises(ZooError, match="test must be best or last, got 'first'"):
        train(config("test=first", out=tmp_path))
    with pytest.raises(UnknownName, match="unknown optimiser 'adamv'"):
        train(config("optim.opt=adamv", out=tmp_path))


# -- parts ----------------------------------------------------------------------------------------


def test_steps_lower_the_loss():
    torch.manual_seed(0)
    images, labels = digits()
    module = Classifier(net(reducer="tome"))
    optimizer = create_optimizer(module.net, "adamw", lr=2e-3)
    losses = []
    for _ in range(5):
        logits = module.net(images)
        loss = module.loss(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


class _Recorder(torch.nn.Module):
    """A loss that remembers the targets it was given."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.labels = labels
        return torch.nn.functional.cross_entropy(logits, labels)


def test_mixup_on_and_off():
    batch = digits(8)
    for options, dims in ((None, 1), ({"mixup_alpha": 0.0}, 1), ({"mixup_alpha": 0.8}, 2)):
        module = Classifier(net(), loss=_Recorder(), mixup=options)
        module.log = lambda *args, **kwargs: None
        module.training_step((batch[0].clone(), batch[1]), 0)
        assert module.loss.labels.ndim == dims
    torch.testing.assert_close(module.loss.labels.sum(1), torch.ones(8))
    assert (module.loss.labels.max(1).values < 1).any()
    module.training_step((batch[0][:7], batch[1][:7]), 0)  # an odd batch has no pairs
    assert module.loss.labels.ndim == 1
    with pytest.raises(ZooError, match="augment.mixup takes"):
        Classifier(net(), mixup={"alpha": 1})


def test_smoothing_holds_for_mixed_images_too():
    from timm.loss import BinaryCrossEntropy

    images, labels = digits(8)
    for prob in (1.0, 1e-12):  # mixed, and soft labels of one image each
        targets = []
        for smoothing in (0.0, 0.5):
            torch.manual_seed(0)
            np.random.seed(0)
            loss = BinaryCrossEntropy(smoothing=smoothing)
            module = Classifier(net(), loss=loss, mixup={"mixup_alpha": 0.8, "prob": prob})
            targets.append(module.mixed((images.clone(), labels))[1])
        classes = targets[0].shape[1]
        torch.testing.assert_close(targets[1], targets[0] * 0.5 + 0.5 / classes)
    # torch's own loss smooths them by itself: once is enough.
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.5)
    module = Classifier(net(), loss=loss, mixup={"mixup_alpha": 0.8, "prob": 1e-12})
    hard = torch.nn.functional.one_hot(labels, 10).float()
    torch.testing.assert_close(module.mixed((images.clone(), labels))[1], hard)


class _WithLoss(Trains, ToMe):
    def auxiliary_losses(self, outcome):
        assert len(outcome.trace) == 3
        return {"ratio": torch.tensor(2.0)}


def test_losses_of_the_reducer_are_added_and_logged():
    batch, seen, totals = digits(8), {}, []
    model = net(reducer=_WithLoss())
    for weight in (0.0, 0.5):
        module = Classifier(model, aux_weight=weight)
        module.log = lambda name, value, **kwargs: seen.update({name: float(value)})
        totals.append(module.training_step(batch, 0).item())
    assert totals[1] - totals[0] == pytest.approx(1.0, abs=1e-5)
    assert seen["train/loss_ratio"] == 2.0
    assert not Classifier(net(reducer="tome")).has_aux


def test_the_classification_loss_has_the_weight_that_the_method_says():
    batch, totals = digits(8), []
    model = net(reducer=_WithLoss())
    for weight in (1.0, 0.25):
        model.reducer.class_weight = weight
        module = Classifier(model, aux_weight=0.0)
        module.log = lambda *args, **kwargs: None
        totals.append(module.training_step(batch, 0).item())
    assert totals[1] == pytest.approx(totals[0] / 4, rel=1e-5)


def test_only_plain_hyper_parameters_are_stored():
    from omegaconf import OmegaConf

    with pytest.raises(ZooError, match="config must be plain containers.*got DictConfig"):
        Classifier(net(), hyper_parameters={"config": OmegaConf.create({"a": 1})})


def _curve(build, steps: int, **options) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = build(optimizer, total_steps=steps, steps_per_epoch=10, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_with_warm_up():
    rates = _curve(cosine, 101, warmup_epochs=1, final=0.1)
    assert rates[:10] == pytest.approx([2 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == pytest.approx(2.0) and rates[-1] == pytest.approx(0.2)
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)  # half-way down
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_other_schedules():
    assert _curve(constant, 20)[1:] == [2.0] * 19
    rates = _curve(wsd, 100, decay=0.2)
    assert rates[:80] == [2.0] * 80 and rates[-1] == 0 and rates[90] == pytest.approx(2 * 9 / 19)
    with pytest.raises(ZooError, match="decay must be in"):
        _curve(wsd, 10, decay=2)


def test_average_is_an_exponential_one_and_forgets_its_start():
    average = EMA(decay=0.9, warmup=False)._average
    old, new = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(average(old, new, torch.tensor(5)), torch.full((3,), 0.1))
    early = EMA(decay=0.999)._average(old, new, torch.tensor(1))
    torch.testing.assert_close(early, torch.full((3,), 1 - 2 / 11))
    with pytest.raises(ZooError, match=r"decay must be in \[0, 1\)"):
        EMA(decay=1.0)


def test_optimiser_decays_matrices_only_and_is_fused():
    model = net()
    optimizer = create_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1)
    assert optimizer.defaults["fused"]
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert "backbone.blocks.0.attn.qkv.weight" in names
    assert not names & {"backbone.pos_embed", "backbone.cls_token", "backbone.norm.weight"}
    assert not any(n.endswith("bias") for n in names)


def test_lower_layers_take_smaller_steps():
    optimizer = create_optimizer(net(), "adamw", lr=1.0, layer_decay=0.5)
    scales = {g["lr_scale"] for g in optimizer.param_groups}
    assert min(scales) < max(scales) == 1.0


def test_any_timm_optimiser():
    assert type(create_optimizer(net(), "lion", lr=1e-4)).__name__ == "Lion"
    with pytest.raises(ZooError, match="lr must be above 0"):
        create_optimizer(net(), "adamw", lr=0.0)
    with pytest.raises(ZooError, match="does not take these options"):
        create_optimizer(net(), "adamw", no_such=1)

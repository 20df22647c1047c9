"""A resumed run goes on as it was, and a run that must repeat repeats."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from reduction.functional import kernels
from tests.test_train import TINY, config, gap, keep_signal_handler, weights  # noqa: F401
from zoo.errors import BadCheckpoint, ZooError
from zoo.run.resume import resumed
from zoo.run.train import train

# Options that are not the defaults, of every kind.
OWN = [
    "reducer=topk",
    "schedule=keep_rate",
    "schedule.rate=0.6",
    "augment=digits",
    "optim.lr=2e-3",
    "optim.layer_decay=0.8",
    "lr_schedule=wsd",
    "callbacks.ema.decay=0.9",
    "loss=ce",
    "seed=7",
    "trainer.gradient_clip_val=0.5",
    "trainer.max_epochs=2",
    "trainer.deterministic=true",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run of three epochs."""
    out = tmp_path_factory.mktemp("run")
    return out, train(config(*OWN, "trainer.max_epochs=3", out=out))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped after two of its three epochs."""
    out = tmp_path_factory.mktemp("first")
    stop = "+callbacks.stop={_target_: tests.test_train.StopIn, epoch: 2}"
    with pytest.raises(KeyboardInterrupt):
        train(config(*OWN, "trainer.max_epochs=3", stop, out=out))
    return out


@pytest.fixture
def stopped(first: Path, tmp_path: Path) -> str:
    copy = shutil.copytree(first, tmp_path / "stopped")
    return f"ckpt={copy / 'checkpoints' / 'last.ckpt'}"


def file(ckpt: str) -> Path:
    return Path(ckpt.partition("=")[2])


def test_ckpt_alone_is_enough(run: tuple[Path, dict[str, Any]], stopped: str) -> None:
    """To the last bit what an uninterrupted run gives."""
    out, whole = run
    row = train(config(stopped, "trainer.enable_progress_bar=false", out=out / "x", base=[]))
    folder = file(stopped).parents[1]
    assert not (out / "x").exists()
    for key in ("state_dict", "current_model_state"):
        ended, last = (weights(f / "checkpoints" / "last.ckpt", key) for f in (out, folder))
        assert gap(ended, last) == 0
    names = ("model.safetensors", "config.json")
    assert all(
        (out / "model" / n).read_bytes() == (folder / "model" / n).read_bytes() for n in names
    )
    same = ("method", "schedule", "seed", "top1", "dataset", "deterministic", "recipe")
    assert {k: row[k] for k in same} == {k: whole[k] for k in same}
    assert row["seed"] == 7 and row["deterministic"] and row["method"] == "topk"
    assert "3 epochs" in row["notes"] and "resumed after epoch 2" in row["notes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["optim.lr=123"], "another optim .* optim.lr=123 (was 0.002)"),
        (["optim=sgd"], "another optim .*opt=sgd (was adamw)"),
        (["optim.layer_decay=0.7"], "optim.layer_decay=0.7 (was 0.8)"),
        (["lr_schedule=constant"], "another lr_schedule .*constant"),
        (["seed=99", "data.batch_size=16"], "another data and seed .*16 (was 32), seed=99 (was 7)"),
        (["reducer=tome"], "another reducer "),
        (["schedule=keep_rate", "schedule.rate=0.9"], "schedule.rate=0.9 (was 0.6)"),
        (["callbacks.ema=null"], "another callbacks .*callbacks.ema"),
        (["callbacks.ema.decay=0.5"], "callbacks.ema.decay=0.5 (was 0.9)"),
        (["trainer.gradient_clip_val=1.5"], "trainer.gradient_clip_val=1.5 (was 0.5)"),
        (["trainer.precision=bf16-mixed"], "trainer.precision=bf16-mixed (was 32-true)"),
        (["+backbone.args.depth=2"], "another backbone .*depth=2 (was 3)"),
        (["weights=vit_digits"], "another weights .*weights=vit_digits (was null)"),
        (["loss=bce"], "another loss "),
        (["augment=deit"], "another augment "),
        (["aux_weight=0.5"], "aux_weight=0.5 (was 1.0)"),
        (["test_start=true"], "test_start=True (was False)"),
        (["+optim.lr_factors={backbone.*: 0.1}"], "another optim "),
        (["module=reducer_only"], "another module "),
    ],
)  # fmt: skip
def test_other_options_are_refused_by_name(stopped: str, options: list[str], words: str) -> None:
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    base = ["trainer.enable_progress_bar=false"]
    if "depth" in options[0]:
        base.append("backbone=vit_digits")
    before = file(stopped).read_bytes()
    with pytest.raises(BadCheckpoint, match=pattern) as caught:
        train(config(stopped, *options, out=Path("nowhere"), base=base))
    assert "\n" not in str(caught.value) and f"weights={file(stopped)}" in str(caught.value)
    assert file(stopped).read_bytes() == before


def test_what_has_no_part_in_training_is_taken(stopped: str) -> None:
    options = ["trainer.max_epochs=4", "test=last", "data.eval_batch_size=50", "logger=none"]
    row = train(
        config(stopped, *options, "trainer.enable_progress_bar=false", out=Path("x"), base=[])
    )
    assert "4 epochs" in row["notes"] and "weights of the last epoch" in row["notes"]
    # The same options once more are none.
    again = ["seed=7", "optim.lr=2e-3", "reducer=topk"]
    train(config(stopped, *again, "trainer.max_epochs=4", out=Path("x"), base=TINY[3:6]))


def test_what_was_typed_is_known_from_hydra(stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option with the value of the default differs from a run that had another."""
    from zoo.run import resume

    monkeypatch.setattr(resume, "_named", lambda: [("optim", "lr"), ("loss",)])
    with pytest.raises(BadCheckpoint, match="another loss and optim than"):
        train(config(stopped, out=Path("x"), base=[]))


def test_a_checkpoint_that_says_nothing_of_its_run(stopped: str, tmp_path: Path) -> None:
    stored = torch.load(file(stopped), weights_only=True)
    del stored["hyper_parameters"]["options"], stored["hyper_parameters"]["config"]
    torch.save(stored, tmp_path / "a.ckpt")
    with pytest.raises(BadCheckpoint, match="does not hold the options of its run.*weights="):
        train(config(f"ckpt={tmp_path / 'a.ckpt'}", out=tmp_path, base=[]))


@pytest.mark.parametrize(
    ("option", "node"),
    [
        ("loss", {"_target_": "os.system", "command": "touch called"}),
        ("reducer", {"_target_": "zoo.cli.main.os.system", "command": "touch called"}),
        ("optim", {"_target_": "${oc.env:HOME}"}),
        ("trainer", {"strategy": {"_target_": "torch.hub.load", "repo_or_dir": "who/knows"}}),
        ("data", {"_target_": "zoo.data.Digits", "root": [{"_target_": "builtins.print"}]}),
    ],
)
def test_a_checkpoint_cannot_choose_what_is_called(
    stopped: str, option: str, node: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    stored = torch.load(file(stopped), weights_only=True)
    stored["hyper_parameters"]["options"][option] = node
    torch.save(stored, file(stopped))
    inner = option if "_target_" in node else "trainer.strategy"
    with pytest.raises(BadCheckpoint, match=rf"for {inner}.*, which is not part of this package"):
        train(config(stopped, out=tmp_path / "out", base=[]))
    assert not Path("called").exists()


def test_what_this_command_names_may_be_called(stopped: str) -> None:
    stored = torch.load(file(stopped), weights_only=True)
    stored["hyper_parameters"]["options"]["loss"] = {"_target_": "torch.nn.MultiMarginLoss"}
    with pytest.raises(BadCheckpoint, match=r"type loss\._target_=torch\.nn\.MultiMarginLoss, too"):
        resumed(config(stopped, out=Path("out"), base=[]), stored, file(stopped))
    named = config(stopped, "loss={_target_: torch.nn.MultiMarginLoss}", out=Path("out"), base=[])
    found = resumed(named, stored, file(stopped))
    assert found.loss._target_ == "torch.nn.MultiMarginLoss"


def test_a_checkpoint_of_an_older_version(first: Path, tmp_path: Path) -> None:
    """Its options were stored without trainer and callbacks: those the command gives."""
    copy = shutil.copytree(first, tmp_path / "old")
    path = copy / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    del stored["hyper_parameters"]["options"]
    stored["hyper_parameters"]["recipe"]["backbone"]["tag"] = "some_tag"
    torch.save(stored, path)
    given = [f"ckpt={path}", "callbacks.ema.decay=0.9", "trainer.max_epochs=3"]
    row = train(config(*given, *TINY[4:7], out=tmp_path, base=[]))
    assert row["seed"] == 7 and "3 epochs" in row["notes"]


# ------------------------------------------------------------------------------- the same bytes


def test_the_same_command_gives_the_same_bytes(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock() -> float:
        raise AssertionError("a clock was asked for a kernel")

    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels.time, "perf_counter", clock)
    found = []
    for name in ("a", "b"):
        options = [*OWN, "trainer.max_epochs=1", "+runtime.own_kernels=true"]
        row = train(config(*options, "runtime.linear=auto", out=tmp_path / name))
        model = (tmp_path / name / "model" / "model.safetensors").read_bytes()
        found.append((hashlib.sha256(model).hexdigest(), row["top1"]))
        assert row["deterministic"] and set(row["kernels"].values()) <= {"fused", "default"}
        assert any(key.startswith("attention") for key in row["kernels"])
    assert found[0] == found[1]
    # Afterwards everything is as it was.
    assert not kernels.deterministic() and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["schedule=target_ms", "schedule.ms=1"], "schedule"),
        (["+trainer.max_time=00:00:01:00"], "trainer.max_time"),
        (["module=schedule_search", "module.seconds=5"], "module.seconds"),
    ],
)
def test_a_clock_cannot_be_asked_twice_alike(
    tmp_path: Path, options: list[str], asked: str
) -> None:
    with pytest.raises(ZooError, match=f"goes without a clock, and {asked} asks one"):
        train(config("reducer=topk", "trainer.deterministic=true", *options, out=tmp_path))


# ------------------------------------------------------------------------------------ divergence


def test_training_that_diverges_stops(tmp_path: Path) -> None:
    options = ["optim.lr=1e12", "trainer.gradient_clip_val=null", "trainer.max_epochs=2"]
    with pytest.raises(
        ZooError, match=r"diverged at step 1 \(epoch 0, batch 1\): the loss is nan"
    ) as e:
        train(config(*options, "reducer=tome", out=tmp_path))
    path = tmp_path / "diverged.pt"
    assert str(path) in str(e.value) and "optim.lr" in str(e.value)
    saved = torch.load(path, weights_only=True)
    assert saved["images"].shape == (32, 1, 16, 16) and len(saved["labels"]) == 32
    assert (saved["step"], saved["epoch"], saved["batch_idx"]) == (1, 0, 1)
    assert saved["loss"] != saved["loss"]
    assert not (tmp_path / "model").exists()
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_an_epoch_of_one_step_that_ruins_the_weights(tmp_path: Path) -> None:
    """The loss of the only step is a number; what it leaves behind is none."""
    options = ["optim.lr=1e38", "trainer.gradient_clip_val=null", "trainer.max_epochs=1"]
    for val in (0, 1):
        out = tmp_path / str(val)
        more = ["trainer.limit_train_batches=1", f"trainer.limit_val_batches={val}"]
        with pytest.raises(ZooError, match="(no longer finite|it answers (nan|inf|-inf))"):
            train(config(*options, *more, "optim.weight_decay=10", out=out))
        assert (out / "diverged.pt").is_file() and not (out / "model").exists()
        assert not list((out / "checkpoints").glob("*"))


def test_a_later_divergence_keeps_the_last_good_epoch(tmp_path: Path) -> None:
    """No epoch of NaN becomes the best, or the one to resume from."""
    ruin = "+callbacks.ruin={_target_: tests.test_train_resume.Ruin, epoch: 1}"
    with pytest.raises(ZooError, match=r"diverged at step 4 \(epoch 1, batch 1\)"):
        train(config("trainer.max_epochs=3", ruin, out=tmp_path))
    for path in (tmp_path / "checkpoints").iterdir():
        assert all(t.isfinite().all() for t in weights(path).values())
        assert torch.load(path, weights_only=True)["epoch"] == 0


def test_a_model_that_answers_nan_is_not_tested(tmp_path: Path) -> None:
    model = zoo.load("vit_digits")
    with torch.no_grad():
        model.backbone.head.bias[3] = torch.nan
    from zoo.checkpoint import save_pretrained

    folder = save_pretrained(model, tmp_path / "broken")
    options = [f"weights={folder}", "test_start=true", "trainer.enable_progress_bar=false"]
    with pytest.raises(ZooError, match="cannot be tested: .*answers nan for image 0 of a test"):
        train(config(*options, out=tmp_path / "out", base=[]))


class Ruin(__import__("lightning").pytorch.Callback):  # type: ignore[misc]
    """A step that goes wrong in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            with torch.no_grad():
                pl_module.net.backbone.blocks[0].mlp.fc1.weight.fill_(torch.inf)


# --------------------------------------------------------------------- weights without classifier


def test_weights_without_a_classifier_are_fine_tuned(tmp_path: Path, caplog: Any) -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 3}
    for classes, has in ((0, "none"), (3, "3")):
        source = zoo.create_model("vit_digits", num_classes=classes, **small)
        torch.save({"model": source.backbone.state_dict()}, tmp_path / "ssl.pth")
        caplog.clear()
        options = [f"weights={tmp_path}/ssl.pth", "trainer.max_epochs=1", "optim.lr=1e-12"]
        row = train(config(*options, "callbacks.ema=null", out=tmp_path / str(classes)))
        assert row["status"] == "ok" and row["n_images"] == 360
        said = [r.message for r in caplog.records if "classifier" in r.message]
        assert said == [f"new classifier: 10 classes, {tmp_path}/ssl.pth has {has}"]
        model = zoo.load(tmp_path / str(classes) / "model")
        assert model.num_classes == 10
        old, new = (m.backbone.blocks[1].mlp.fc1.weight for m in (source, model))
        assert torch.allclose(old, new, atol=1e-6)
    with pytest.raises(ZooError, match=r"num_classes=0: digits has 10 classes; leave it out"):
        train(config(options[0], "+backbone.args.num_classes=0", out=tmp_path / "no"))


def test_an_evaluation_says_what_to_type(tmp_path: Path) -> None:
    from zoo.run.build import build_model

    small = {"embed_dim": 32, "depth": 3}
    for classes, advice in ((0, r"no classifier.*task=fidelity \+backbone"), (3, "num_classes=3")):
        source = zoo.create_model("vit_digits", num_classes=classes, **small)
        torch.save(source.backbone.state_dict(), tmp_path / "w.pth")
        with pytest.raises(ZooError, match=advice) as caught:
            build_model(config(f"weights={tmp_path}/w.pth", out=tmp_path))
        assert "new_head" not in str(caught.value)
    with pytest.raises(ZooError, match="type backbone.pretrained=True instead"):
        build_model(config("+backbone.args.pretrained=true", out=tmp_path))


def test_a_model_trained_from_scratch_has_no_tag(tmp_path: Path) -> None:
    options = ["backbone=timm", "backbone.name=test_vit", "+backbone.args.img_size=32",
               "+backbone.args.depth=1", "data=synthetic", "trainer.max_epochs=1",
               "trainer.limit_test_batches=1"]  # fmt: skip
    row = train(config(*options, out=tmp_path, base=TINY[3:]))
    assert row["tag"] is None
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["backbone"]["tag"] is None

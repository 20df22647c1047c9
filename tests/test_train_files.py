"""What a training writes: whole files, in a folder that may move, or a word before it starts."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import zoo.checkpoint
import zoo.run.train
from tests.test_train import config, keep_signal_handler  # noqa: F401
from zoo.errors import ZooError
from zoo.lit import checkpoints
from zoo.lit.checkpoints import WholeFiles, moved
from zoo.run.record import check_folder
from zoo.run.train import instantiate_trainer, train

DONE = ("reducer=tome", "trainer.max_epochs=1")


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeFiles().save_checkpoint({"epoch": 1}, path)

    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.os, "fsync", fails)
        with pytest.raises(OSError, match="No space left") as failed:
            WholeFiles().save_checkpoint({"epoch": 2}, path)
    assert failed.value.filename == str(path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    WholeFiles().save_checkpoint({"epoch": 2}, path)
    assert WholeFiles().load_checkpoint(path, weights_only=True) == {"epoch": 2}


def test_a_trainer_writes_whole_files(tmp_path: Path) -> None:
    trainer = instantiate_trainer(config(*DONE, out=tmp_path))
    assert type(trainer.strategy.checkpoint_io) is WholeFiles


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_take_a_training_with_them_are_refused(
    tmp_path: Path, strategy: str
) -> None:
    where = ("trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}")
    with pytest.raises(ZooError, match=r"type trainer\.strategy=ddp, or torchrun"):
        train(config(*DONE, *where, out=tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_was_moved_knows_its_best_epoch(tmp_path: Path) -> None:
    """No later epoch is as good as what the first ones are said to have reached."""
    first, there = tmp_path / "first", tmp_path / "moved"
    stop = "+callbacks.stop={_target_: tests.test_train.StopIn, epoch: 2}"
    with pytest.raises(KeyboardInterrupt):
        train(config("reducer=tome", "trainer.max_epochs=3", stop, out=first))
    last = first / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    [best] = [s for s in stored["callbacks"].values() if s.get("monitor") == "val/top1"]
    best["best_model_score"] = torch.tensor(101.0)
    best["best_k_models"] = dict.fromkeys(best["best_k_models"], torch.tensor(101.0))
    best["kth_value"] = torch.tensor(101.0)
    torch.save(stored, last)
    name = Path(best["best_model_path"]).name
    first.rename(there)
    row = train(config(f"ckpt={there / 'checkpoints' / 'last.ckpt'}", out=tmp_path / "other"))
    assert sorted(os.listdir(there / "checkpoints")) == [name, "last.ckpt"]
    assert "weights of the best epoch" in row["notes"]
    model = zoo.load(str(there / "model"))
    known = zoo.load(str(there / "checkpoints" / name)).state_dict()
    assert all(torch.equal(known[k], v) for k, v in model.state_dict().items())


def test_paths_follow_a_folder_that_was_moved_or_copied(tmp_path: Path) -> None:
    old, new = (str(tmp_path / name / "checkpoints") for name in ("old", "new"))
    os.makedirs(new)
    Path(new, "epoch_001.ckpt").touch()
    state = {
        "dirpath": old, "best_model_path": f"{old}/epoch_001.ckpt", "last_model_path": "",
        "kth_best_model_path": f"{old}/epoch_000.ckpt", "monitor": "val/top1",
        "best_k_models": {f"{old}/epoch_001.ckpt": 1.0, f"{old}/epoch_000.ckpt": 0.5},
    }  # fmt: skip
    assert moved(state, new) == {
        "dirpath": new, "best_model_path": f"{new}/epoch_001.ckpt", "last_model_path": "",
        "kth_best_model_path": f"{old}/epoch_000.ckpt", "monitor": "val/top1",
        "best_k_models": {f"{new}/epoch_001.ckpt": 1.0, f"{old}/epoch_000.ckpt": 0.5},
    }  # fmt: skip
    # A copy of one checkpoint is not the run.
    assert moved(state, str(tmp_path / "downloads")) == state == moved(state, old)


def test_the_run_s_own_folder_comes_before_the_one_that_it_was_copied_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(config(*DONE, out=tmp_path / "first"))
    copy = shutil.copytree(tmp_path / "first", tmp_path / "copy")
    capsys.readouterr()
    train(config(f"ckpt={copy / 'checkpoints' / 'last.ckpt'}", out=tmp_path / "other"))
    assert "checkpoints: copy/checkpoints\n" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "fit", None)
    (tmp_path / "file").touch()
    taken = tmp_path / "file" / "run"
    with pytest.raises(ZooError, match=r"output_dir=.*file/run cannot be written.*type output_dir"):
        check_folder(str(taken))
    with pytest.raises(ZooError, match=r"callbacks.NAME.dirpath=.*cannot be written: Not a dir"):
        train(config(*DONE, f"callbacks.best.dirpath={taken}", out=tmp_path / "out"))


def test_a_resumed_run_is_refused_where_its_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(*DONE, out=tmp_path / "run"))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checked = []
    monkeypatch.setattr(zoo.run.train, "check_folder", checked.append)
    train(config(f"ckpt={last}", out=tmp_path / "other"))
    assert checked == [str(tmp_path / "run")]


def test_a_model_that_cannot_be_saved_is_a_row_with_its_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "model.safetensors")

    monkeypatch.setattr(zoo.checkpoint, "save_pretrained", fails)
    row = train(config(*DONE, out=tmp_path))
    assert row["status"] == "failed" and row["top1"] is not None and row["n_images"] == 360
    assert "cannot be saved to" in row["error"] and "File too large" in row["error"]
    assert "the weights are in" in row["error"] and "last.ckpt" in row["error"]
    assert f"top-1 was {row['top1']:.2f} %" in row["error"]


@pytest.mark.parametrize(
    ("options", "weights", "said"),
    [
        (["test=best"], "the best epoch", False),
        (["test=last"], "the last epoch", False),
        (["callbacks.best=null", "callbacks.last=null"], "the last step", False),
        (["trainer.check_val_every_n_epoch=2"], "the last step", True),
    ],
)
def test_a_row_says_which_weights_were_tested(
    options: list[str], weights: str, said: bool, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    row = train(config(*DONE, *options, out=tmp_path))
    assert f"weights of {weights}" in row["notes"]
    assert ("no epoch was kept as the best one" in capsys.readouterr().out) == said


def test_without_checkpoints_there_is_nothing_to_go_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = "+callbacks.stop={_target_: tests.test_train.StopIn, epoch: 1}"
    with pytest.raises(KeyboardInterrupt):
        train(config("reducer=tome", "callbacks=none", stop, out=tmp_path))
    assert "stopped in epoch 1; no callback keeps checkpoints" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.ckpt"))

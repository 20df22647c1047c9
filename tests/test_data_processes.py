"""Several processes: every image counts once, and none waits for another for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import IterableDataset

import zoo.data.source
import zoo.models  # noqa: F401  (registers vit_digits)
from zoo.data.digits import Digits
from zoo.data.loader import NO_IMAGE, blank
from zoo.data.module import ImageData
from zoo.lit.classifier import Classifier


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_digits", embed_dim=32, depth=1)


def shares(data: ImageData, processes: int, part: str = "test") -> list[list[list[int]]]:
    """Labels of every batch of every process."""
    found = []
    for rank in range(processes):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)  # type: ignore
        loader = data.test_dataloader() if part == "test" else data.val_dataloader()
        found.append([labels.tolist() for _, labels in loader])
        if not isinstance(loader.dataset, IterableDataset):
            assert len(loader) == len(found[-1])
    data.trainer = None
    return found


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("batch", [1, 4, 100, 360])
def test_every_image_is_in_one_share_and_every_process_has_as_many_batches(model, processes, batch):
    data = ImageData("digits", test_split="test", eval_batch_size=batch).attach(model)
    found = shares(data, processes)
    assert len({len(batches) for batches in found}) == 1
    seen = [y for batches in found for labels in batches for y in labels if y != NO_IMAGE]
    assert sorted(seen) == sorted(Digits("test").labels.tolist())


def folder(root: Path, count: int, damaged: tuple[int, ...] = ()) -> Path:
    digits, picked = Digits("train"), {}
    for i in range(len(digits)):
        picked.setdefault(digits[i][1], []).append(i)
    for split in ("train", "val"):
        for k in range(count):
            label = k % 10
            image, _ = digits[picked[label][k // 10]]
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(root / split / str(label) / f"{k}.png")
            if split == "val" and k in damaged:
                (root / split / str(label) / f"{k}.png").write_bytes(b"")
    return root


def test_more_processes_than_images_and_damage_in_one_of_them(tmp_path, model):
    root = folder(tmp_path, 11, damaged=(0, 1, 2))
    data = ImageData("folder", str(root), eval_batch_size=2, num_workers=0).attach(model)
    for processes in (2, 4, 16):
        found = shares(data, processes)
        assert len({len(batches) for batches in found}) == 1
        seen = [y for batches in found for labels in batches for y in labels if y != NO_IMAGE]
        assert sorted(seen) == [0, 3, 4, 5, 6, 7, 8, 9]


def test_blanks_are_not_counted(model):
    module = Classifier(model)
    images, labels = torch.randn(3, 1, 16, 16), torch.tensor([1, 2, 3])
    module.test_step((images, labels), 0)
    module.test_step(tuple(blank((1, 16, 16))), 1)
    assert module.test_metrics["images"].compute() == 3
    hits = (model.eval()(images).argmax(1) == labels).float().mean()
    assert module.test_metrics["top1"].compute() == pytest.approx(float(hits))


class Stream(IterableDataset):
    """A stream with timm's names for its share of several processes."""

    def __init__(self, count: int) -> None:
        self.count, self.reader = count, self
        self.dist_rank, self.dist_num_replicas = 1, 2

    def __len__(self):
        return self.count

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self.dist_rank + first * self.dist_num_replicas
        for i in range(start, self.count, step * self.dist_num_replicas):
            yield Image.new("L", (16, 16)), i

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers


@pytest.mark.parametrize(("count", "workers"), [(0, 0), (1, 0), (11, 0), (12, 2), (13, 2)])
def test_streams_are_shared_by_batches(monkeypatch, model, count, workers):
    wrapped = zoo.data.source._wrapped
    monkeypatch.setattr(
        zoo.data.source, "_by_timm", lambda *args: wrapped(Stream(count), training=False)
    )
    data = ImageData("wds/x", num_classes=10, eval_batch_size=2, num_workers=workers).attach(model)
    for processes in (1, 2, 5):
        found = shares(data, processes)
        assert len({len(batches) for batches in found}) == 1
        seen = [y for batches in found for labels in batches for y in labels if y != NO_IMAGE]
        assert sorted(seen) == list(range(count))


@pytest.mark.slow  # starts Python three times
def test_accuracy_on_two_processes_is_that_of_one(tmp_path):
    """Eleven images in batches of five: one process has two batches, the other a blank one."""
    root = folder(tmp_path / "data", 11, damaged=(3,))
    rows = []
    for devices in (1, 2):
        command = [sys.executable, "-m", "zoo", "train", "weights=vit_digits", "reducer=topk"]
        command += ["data=folder", f"data.root={root}", "data.num_workers=0", "data.batch_size=5"]
        command += ["trainer=cpu", "trainer.max_epochs=1", "trainer.strategy=ddp", "threads=1"]
        command += [f"trainer.devices={devices}", "trainer.enable_progress_bar=false"]
        command += [
            "optim.lr=1e-12",
            "schedule=keep_rate",
            "schedule.rate=0.2",
            "results=rows.jsonl",
        ]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("3.png: no image that Pillow can read") == 1
        rows.append(json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1]))
    assert [row["n_images"] for row in rows] == [10, 10]
    assert "1 of 11 test images could not be read" in rows[1]["notes"]
    for field in ("top1", "top5", "ci95"):
        assert rows[0][field] == rows[1][field]
    assert 0 < rows[0]["top1"] < 100  # a number that a wrong count would change

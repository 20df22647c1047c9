"""Bars: on stderr, where somebody watches or asks for them, and never part of a result."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from tests.cases import backbone
from tests.commands import Run
from zoo.measure import progress
from zoo.measure.accuracy import top_k
from zoo.run.sweep import count_jobs

EVAL = "eval weights=vit_digits reducer=tome schedule.r=2 limit=20"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "_DELAY", 0)
    progress.show(None)
    yield
    progress.show(None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_show_on_a_terminal_or_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream, auto in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        for asked, shown in (("auto", auto), (True, True), (False, False)):
            progress.show(progress.wanted({"progress": asked}))
            assert progress.shown() is shown
            list(progress.bar(range(3), "counting"))
            assert ("counting" in stream.getvalue()) is shown
            stream.truncate(0)
    monkeypatch.setattr(sys, "stderr", None)  # a program without a console
    progress.show(True)
    assert list(progress.bar(range(3), "counting")) == [0, 1, 2]


def test_a_bar_passes_on_what_it_counts_and_ends_with_it(capsys: Any) -> None:
    progress.show(True)
    seen = []
    for i in progress.bar(iter("abcd"), "letters", total=4):
        seen.append(i)
        if i == "c":
            break
    assert seen == list("abc")
    assert list(progress.bar([1, 2], "numbers")) == [1, 2]
    out, err = capsys.readouterr()
    assert not out and "letters" in err and "0/2" in err


def test_a_measurement_knows_how_many_batches_come(capsys: Any) -> None:
    progress.show(True)
    model = backbone("plain")
    data = torch.utils.data.TensorDataset(torch.rand(7, 3, 32, 32), torch.zeros(7).long())
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    assert top_k(model, loader, torch.device("cpu"), limit=5)[2] == 5
    assert "accuracy" in (err := capsys.readouterr().err) and "0/3" in err
    assert progress.batches_of(loader, None) == 4
    assert progress.batches_of(iter(loader), 5) is None


def test_an_evaluation_shows_what_it_does_and_finds_the_same(run: Run) -> None:
    tasks = "'task=[accuracy,flops,fidelity,throughput]' throughput.min_time=0.001"
    found = {}
    for asked in ("true", "false", "auto"):
        code, out, err = run(f"{EVAL} {tasks} throughput.batch=2 progress={asked}")
        assert code == 0
        words = ("accuracy", "fidelity", "throughput")
        assert [word in err for word in words] == [asked == "true"] * 3
        assert not any(f"{word}:" in out for word in words) and "\r" not in out
        found[asked] = json.loads(Path("results/local/rows.jsonl").read_text().splitlines()[-1])
    names = ("top1", "top5", "ci95", "n_images", "gmacs", "tokens", "fidelity", "schedule", "notes")
    first, *others = ({name: row[name] for name in names[:-1]} for row in found.values())
    assert all(other == first for other in others)


def test_a_budget_in_time_shows_its_measurements(run: Run) -> None:
    line = "eval weights=vit_digits reducer=tome schedule=target_speedup schedule.speedup=1.05"
    options = "schedule.batch=1 schedule.rounds=2 schedule.tolerance=0.9 task=flops"
    assert "target of 1.05x:" in run(f"{line} {options} progress=true")[2]
    # Whether the machine reaches it is not asked here.
    assert "target of 1.05x:" not in run(f"{line} {options}")[2]


@pytest.mark.slow
def test_a_training_shows_epochs_validation_and_test_on_stderr(run: Run) -> None:
    line = (
        "train trainer.max_epochs=1 trainer.limit_train_batches=2 trainer.limit_val_batches=2 "
        "trainer.limit_test_batches=2 callbacks.progress.refresh_rate=1"
    )
    code, out, err = run(f"{line} progress=true")
    assert code == 0, err
    assert all(word in err for word in ("Epoch 0", "Validation", "Testing"))
    assert "Epoch" not in out and "Testing" not in out and "\r" not in out
    for quiet in ("", "progress=true trainer.enable_progress_bar=false"):
        code, out, err = run(f"{line} {quiet}")
        assert code == 0 and "Epoch" not in out + err and "\r" not in out + err


def test_a_sweep_counts_its_jobs(run: Run) -> None:
    sweep = "eval -m weights=vit_digits reducer=tome schedule.r=1,2 task=flops control=[]"
    code, out, err = run(f"{sweep} progress=true")
    assert code == 0 and "jobs" in err and "/2" in err and "jobs:" not in out
    assert "jobs" not in run(sweep)[2]
    assert "jobs" not in run(f"{sweep} progress=false")[2]


def test_jobs_are_the_product_of_the_choices() -> None:
    with hydra.initialize_config_module("zoo.configs", version_base="1.3"):
        assert count_jobs(["a=1,2,3", "b=x", "c=choice(1,2)"]) == 6
        assert count_jobs(["a=range(0,4)"]) == 4
        assert count_jobs(["reducer=glob(*)"]) > 30
        assert count_jobs([]) == 1

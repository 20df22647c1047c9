"""The search for counts per block, on the shipped weights."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from reduction import ZooError
from zoo.budget.search import ScheduleSearch


@pytest.fixture(scope="module")
def images():
    from zoo.data import ImageData

    data = ImageData("digits").attach(zoo.load("vit_digits"))
    return [next(iter(data.train_dataloader()))[0][:24]]


def model(method="topk", fraction=0.4):
    schedule = {"name": "target_gmacs", "fraction": fraction}
    return zoo.load("vit_digits", reducer=method, schedule=schedule).eval()


@pytest.mark.parametrize("objective", ["kl", "features"])
def test_it_beats_its_start_within_the_cost(images, objective) -> None:
    net = model()
    before = zoo.profile(net).gmacs
    found = ScheduleSearch(net, images, objective, evaluations=30).run()
    assert found.score < found.start_score
    assert found.gmacs <= before == pytest.approx(found.start_gmacs)
    net.schedule = found.schedule
    assert zoo.profile(net).gmacs == pytest.approx(found.gmacs) and found.gmacs > 0.97 * before
    assert found.evaluations == 30 and found.complete


def test_the_score_is_the_divergence_from_the_dense_model(images) -> None:
    net = model()
    search = ScheduleSearch(net, images, evaluations=1)
    found = search.run()
    with torch.no_grad():
        p = net.backbone(images[0]).double().softmax(-1)
        q = net(images[0]).double().log_softmax(-1)
    expected = (p * (p.log() - q)).sum(-1).mean()
    assert found.score == found.start_score == pytest.approx(expected.item(), rel=1e-3)
    assert found.schedule.keep == found.start


def test_every_candidate_meets_the_cost(images) -> None:
    search = ScheduleSearch(model("topk", 0.5), images, evaluations=1)
    for shares in ([1.0] * 6, [0, 0, 1.0, 0, 1.0, 0], [6, 5, 4, 3, 2, 1], [0.01, 0, 0, 0, 0, 9.0]):
        try:
            keep = search.counts(shares)
        except zoo.errors.ZooError:
            assert shares[-1] == 9.0  # removing behind the last block saves nothing
            continue
        assert 0.97 * search.target < search._cost(keep) <= search.target
        assert all(a >= b >= 1 for a, b in zip([64, *keep], keep, strict=False))
    with pytest.raises(ZooError):
        search.counts([0.0] * 6)


def test_a_search_goes_on_where_it_stopped(images, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "search.jsonl"
    whole = ScheduleSearch(model(), images, evaluations=20, cache=tmp_path / "whole").run()
    ScheduleSearch(model(), images, evaluations=8, cache=cache).run()
    with cache.open("a") as file:
        file.write('{"keep": [1, 2')  # killed while writing
    ran = []
    original = ScheduleSearch._answers
    monkeypatch.setattr(
        ScheduleSearch, "_answers", lambda self, net: ran.append(0) or original(self, net)
    )
    found = ScheduleSearch(model(), images, evaluations=20, cache=cache).run()
    assert len(ran) == 1 + 12
    assert found == whole
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 1 + 20
    with pytest.raises(ZooError, match="other weights, images"):
        ScheduleSearch(model("tome"), images, cache=cache)
    cache.write_text("nonsense\n\n")
    with pytest.raises(ZooError, match="not the cache of a search"):
        ScheduleSearch(model(), images, cache=cache)


def test_time_runs_out(images) -> None:
    found = ScheduleSearch(model(), images, evaluations=500, seconds=1e-6).run()
    assert not found.complete and found.evaluations < 5
    assert found.schedule.keep == found.start


def test_a_search_that_finds_nothing_new_is_complete(images) -> None:
    net = zoo.load("vit_digits", reducer="topk", schedule={"name": "per_block", "keep": [64] * 6})
    found = ScheduleSearch(net, images, evaluations=50).run()
    assert found.complete and found.evaluations == 1 and found.score < 1e-9


def test_the_model_is_left_as_it_was(images) -> None:
    net = model().train()
    schedule = net.schedule
    ScheduleSearch(net, images, evaluations=3).run()
    assert net.schedule is schedule and net.training


def test_what_cannot_be_searched_is_refused(images) -> None:
    with pytest.raises(ZooError, match="choose one"):
        ScheduleSearch(zoo.load("vit_digits"), images)
    with pytest.raises(ZooError, match="for each image"):
        ScheduleSearch(model("ats"), images)
    with pytest.raises(ZooError, match="belong to its counts"):
        ScheduleSearch(model("patchmerger"), images)
    with pytest.raises(ZooError, match="objective"):
        ScheduleSearch(model(), images, objective="top1")
    with pytest.raises(ZooError, match="calibration"):
        ScheduleSearch(model(), [])


@pytest.mark.slow
def test_the_experiment_writes_a_schedule_that_eval_reads(tmp_path, monkeypatch, capsys) -> None:
    from zoo.cli.main import main

    monkeypatch.chdir(tmp_path)
    line = "train experiment=schedule_search reducer=topk schedule.fraction=0.4 output_dir=run"
    options = ["module.evaluations=6", "module.images=16", "trainer.enable_progress_bar=false"]
    assert main([*line.split(), *options]) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "schedule.json").read_text())
    assert len((tmp_path / "run" / "search.jsonl").read_text().splitlines()) == 7
    row = zoo.results.rows.read_rows(tmp_path / "results")[-1]
    assert row["trained"] is False and row["top1_start"] is not None
    assert "6 schedules on 16 images" in row["notes"]
    evaluate = "eval weights=vit_digits reducer=topk schedule=per_block task=flops"
    assert main([*evaluate.split(), "schedule.file=run/schedule.json"]) == 0
    again = zoo.results.rows.read_rows(tmp_path / "results")[-1]
    assert again["gmacs"]["total"] == pytest.approx(written["gmacs"])

"""Evaluation by several processes: each image once, and the failure of one is known to all.

Processes are threads here, which give each other what they found as processes do.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from omegaconf import OmegaConf

import zoo
import zoo.data.source
from tests.test_data_processes import Stream, folder
from zoo.data.module import ImageData
from zoo.errors import UnknownName, ZooError
from zoo.measure import processes as room
from zoo.measure.processes import Processes, is_agreed, portable
from zoo.model.answers import NotFinite
from zoo.run.evaluate import _check_shared, measure_accuracy
from zoo.run.extract import Extractor, select
from zoo.run.fidelity import measure_fidelity
from zoo.run.machines import _together, where
from zoo.run.outcome import is_first_process, started
from zoo.run.shares import measured

CPU = torch.device("cpu")


@pytest.fixture
def together(monkeypatch):
    """Runs something in several processes; returns what each of them found or raised."""

    def run(count, work):
        barrier, given, found = threading.Barrier(count, timeout=60), [None] * count, [None] * count
        ranks = {}

        def gathered(own, _):
            given[ranks[threading.get_ident()]] = own
            barrier.wait()
            every = list(given)
            barrier.wait()
            return every

        def one(rank):
            ranks[threading.get_ident()] = rank
            try:
                found[rank] = work(Processes(rank, count))
            except Exception as error:
                found[rank] = error

        monkeypatch.setattr(room, "gathered", gathered)
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


@pytest.fixture(scope="module")
def model():
    schedule = {"name": "keep_rate", "rate": 0.5}
    return zoo.load("vit_digits", reducer={"name": "ats"}, schedule=schedule).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("pictures"), 23, damaged=(0, 1, 4, 20))


def attached(root, model, batch):
    data = ImageData("folder", str(root), eval_batch_size=batch, num_workers=0).attach(model)
    data.setup("test")
    return data


@pytest.mark.parametrize("limit", [None, 1, 5, 19, 50])
@pytest.mark.parametrize(("count", "batch"), [(1, 4), (2, 5), (3, 100), (30, 1)])
def test_every_readable_image_is_looked_at_once(together, model, pictures, count, batch, limit):
    def look(processes):
        data = attached(pictures, model, batch)

        def seen(share):
            labels = [y for _, labels, *_ in share.batches(data) for y in labels.tolist()]
            return labels[: share.limit]

        parts = measured(processes, data, limit, seen, len)
        return [y for part in parts for y in part], len(data.damaged)

    whole = [look(Processes())[0]]
    for labels, damaged in together(count, look):
        assert sorted(labels) == sorted(whole[0])
        assert len(labels) == min(limit or 19, 19)
        if limit is None:
            assert damaged == 4  # in every process, as each writes of all


@pytest.mark.parametrize("limit", [None, 3, 11])
def test_streams_are_shared_out_by_batches(together, monkeypatch, model, limit):
    wrapped = zoo.data.source._wrapped
    monkeypatch.setattr(
        zoo.data.source, "_by_timm", lambda *args: wrapped(Stream(11), training=False)
    )

    def look(processes):
        data = ImageData("wds/x", num_classes=11, eval_batch_size=2, num_workers=0)
        data.attach(model, check=False).setup("test")

        def seen(share):
            return [y for _, labels, *_ in share.batches(data) for y in labels.tolist()]

        return sorted(y for part in measured(processes, data, limit, seen, len) for y in part)

    assert together(3, look) == [list(range(limit or 11))] * 3


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_measure_what_one_does(together, model, pictures, count):
    cfg = OmegaConf.create({"weights": "vit_digits", "compile": False, "limit": None})

    def measure(processes):
        own = copy.deepcopy(model)  # what enters its classifier is watched by each for itself
        data = attached(pictures, own, 4)
        args = cfg, own, data, CPU, torch.float32
        with torch.inference_mode():
            accuracy = measure_accuracy(*args, processes=processes)
            return accuracy, measure_fidelity(*args, processes=processes)["fidelity"]

    accuracy, fidelity = measure(Processes())
    assert accuracy["n_images"] == 19 and accuracy["gmacs_sample"]["images"] == 19
    for found, close in together(count, measure):
        assert found["gmacs_sample"] == pytest.approx(accuracy["gmacs_sample"])
        assert {k: v for k, v in found.items() if "gmacs" not in k} == {
            k: v for k, v in accuracy.items() if "gmacs" not in k
        }
        assert close == pytest.approx(fidelity, abs=1e-6)


def test_features_are_shared_out_and_come_in_the_order_of_the_images(together, model, pictures):
    cfg = {"compile": False, "deterministic": False, "features": {"cache": False}}
    cfg = OmegaConf.create(cfg)

    def extract(processes):
        data = attached(pictures, model, 3)
        return Extractor(cfg, CPU, torch.float32, processes)(model, select(data, "test", None, 0))

    one = extract(Processes())
    for found in together(3, extract):
        assert torch.equal(found.places, one.places) and torch.equal(found.labels, one.labels)
        assert torch.allclose(found.x, one.x, atol=1e-5)


def test_the_failure_of_one_process_ends_all_with_its_words(together):
    def work(processes):
        def measure():
            if processes.rank == 1:
                raise NotFinite("the model answers image 7 with NaN", 7)
            return processes.rank

        return processes.collect(measure)

    for error in together(3, work):
        assert type(error) is NotFinite and error.image == 7 and is_agreed(error)


def test_a_process_that_fails_by_itself_meets_the_others_where_they_wait(together):
    def work(processes):
        def evaluate():
            if processes.rank == 2:
                raise ZooError("no weights there")
            return {"top1": sum(processes.collect(lambda: processes.rank))}

        return _together(processes, evaluate)

    found = together(3, work)
    assert [str(error) for error in found] == ["no weights there"] * 3
    whole = together(2, lambda p: _together(p, lambda: {"top1": sum(p.collect(lambda: p.rank))}))
    assert whole == [{"top1": 1}] * 2


def test_errors_arrive_whole_or_as_their_words():
    found = pickle.loads(pickle.dumps(NotFinite("image 3", 3)))
    assert (str(found), found.image) == ("image 3", 3)
    strange = UnknownName("reducer", "tom", ["tome"])
    assert str(portable(strange)) == str(strange) and isinstance(portable(strange), ZooError)


def test_what_one_process_does_alone_is_refused():
    for task in ("throughput", "export", "select"):
        with pytest.raises(ZooError, match=f"task={task} is done by one process, and these are 2"):
            _check_shared(OmegaConf.create(), ["accuracy", task], 2)
    timed = OmegaConf.create({"schedule": {"_target_": "zoo.budget.time.TargetMs"}})
    with pytest.raises(ZooError, match="a budget in time"):
        _check_shared(timed, ["accuracy"], 2)
    with pytest.raises(ZooError, match="answers=true keeps the images in their order"):
        _check_shared(OmegaConf.create({"answers": True}), ["accuracy"], 2)


@pytest.fixture
def torchrun(monkeypatch):
    values = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_torchrun_says_how_many_processes_there_are(torchrun):
    assert started() == 4 and not is_first_process()
    assert where({"accelerator": "cpu", "devices": "auto"})["devices"] == 2
    assert where({"devices": 1, "num_nodes": 1, "max_epochs": 3}) == {"devices": 2, "num_nodes": 2}
    with pytest.raises(ZooError, match="torchrun has started 4 processes, 2 on this machine"):
        where({"devices": 3, "num_nodes": 2})


@pytest.mark.parametrize(
    ("name", "value", "first"),
    [
        *(("LOCAL_RANK", "0", True), ("LOCAL_RANK", "1", False), ("NODE_RANK", "1", False)),
        *(("SLURM_PROCID", "2", False), ("RANK", "5", False)),
    ],
)
def test_one_process_speaks_for_all(monkeypatch, name, value, first):
    for other in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert is_first_process() is first
    # Tasks of SLURM that nobody has made processes of one run are runs of their own.
    assert is_first_process(distributed=False) is (first or name == "SLURM_PROCID")


@pytest.mark.slow  # starts Python five times
def test_ddp_and_torchrun_evaluate_as_one_process_does(tmp_path):
    root = folder(tmp_path / "data", 11, damaged=(3,))
    words = ["weights=vit_digits", "reducer=ats", "schedule=keep_rate", "schedule.rate=0.2"]
    words += ["data=folder", f"data.root={root}", "data.num_workers=0", "data.batch_size=5"]
    words += ["task=[accuracy,flops,fidelity,knn]", "knn.k=3", "results=rows.jsonl"]
    plain = [sys.executable, "-m", "zoo", "eval"]
    elastic = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "zoo"]
    commands = [
        [*plain, *words],
        [*plain, *words, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
        [*elastic, "eval", *words, "device=cpu"],
    ]
    rows = []
    for command in commands:
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("top-1") == 1
        assert run.stderr.count("3.png: no image that Pillow can read") >= 1
        rows.append(json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1]))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    assert [row["device"] for row in rows] == ["cpu", "2x cpu", "2x cpu"]
    assert [row["n_images"] for row in rows] == [10] * 3
    for row in rows[1:]:
        for field in ("top1", "top5", "ci95", "knn", "dataset", "split"):
            assert row[field] == rows[0][field]
        for field in ("gmacs_sample", "fidelity"):
            assert row[field] == pytest.approx(rows[0][field], abs=1e-6)
    assert 0 < rows[0]["top1"] < 100  # a number that a wrong count would change

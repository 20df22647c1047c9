"""`zoo eval` end to end: what the row holds, sweeps, reports, throughput."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import ZooError
from zoo.measure.accuracy import top_k
from zoo.measure.throughput import measure
from zoo.results.rows import FIELDS, append_row, new_row, read_rows


def rows(tmp_path):
    return read_rows(tmp_path / "results" / "local" / "rows.jsonl")


def test_published_cost_of_deit_small_with_tome(run, tmp_path):
    code, out, err = run("eval backbone=deit_small reducer=tome schedule.r=13 task=flops")
    assert (code, err) == (0, "")
    summary, path = out.splitlines()
    assert "tome r=13 | 2.706 GMACs (-41.2 %) | tokens 197->41" in summary
    assert path == "row: results/local/rows.jsonl"
    [row] = rows(tmp_path)
    assert set(row) == set(FIELDS)
    assert row["gmacs"]["total"] == pytest.approx(2.7061, abs=5e-5)
    assert row["gmacs_dense"] == pytest.approx(4.5989, abs=5e-5)
    assert row["gmacs_fvcore"] == pytest.approx(row["gmacs"]["total"], rel=1e-5)
    assert row["tokens"][0] == [197, 184] and row["tokens"][-1][1] == 41
    # Weights that it never had are not named.
    assert (row["backbone"], row["tag"]) == ("deit_small_patch16_224", None)
    assert row["schedule"]["name"] == "constant_r" and row["schedule"]["r"] == 13
    assert row["command"] == "zoo eval backbone=deit_small reducer=tome schedule.r=13 task=flops"
    assert row["top1"] is None and row["imgs_per_s"] is None
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["eval"]


def test_budget_asked_for_is_in_the_row_and_kept(run, tmp_path):
    line = "eval backbone=test_vit reducer=topk schedule=target_gmacs schedule.fraction=0.6"
    assert run(f"{line} task=flops")[0] == 0
    [row] = rows(tmp_path)
    assert row["schedule"]["fraction"] == 0.6
    assert row["recipe"]["schedule"]["name"] == "keep_rate"
    assert 0.5 < row["gmacs"]["total"] / row["gmacs_dense"] <= 0.6


def test_saved_model_is_evaluated_as_it_was_saved_or_otherwise(run, tmp_path):
    from zoo.checkpoint import save_pretrained, weights_sha256

    model = zoo.create_model("test_vit", "tome", {"name": "constant_r", "r": 8}, num_classes=4)
    save_pretrained(model, tmp_path / "saved")
    for options in ("", "reducer=none", "reducer=topk", "schedule.r=4"):
        assert run(f"eval weights=saved task=flops {options}")[0] == 0
    kept, dense, other, budget = rows(tmp_path)
    assert (kept["method"], kept["schedule"]["r"]) == ("tome", 8)
    assert (dense["method"], dense["schedule"]) == ("none", None)
    assert (other["method"], other["schedule"]["r"]) == ("topk", 8)
    assert (budget["method"], budget["schedule"]["r"]) == ("tome", 4)
    assert kept["weights"] == "saved"
    assert kept["weights_sha"] == weights_sha256(tmp_path / "saved")


def test_accuracy_of_the_row_is_the_model_s(run, tmp_path):
    from zoo.checkpoint import save_pretrained

    torch.manual_seed(0)
    model = zoo.create_model("test_vit", num_classes=10, img_size=32, in_chans=1).eval()
    save_pretrained(model, tmp_path / "saved")
    code, out, _ = run("eval weights=saved task=accuracy data=digits")
    assert code == 0
    [row] = rows(tmp_path)
    assert (row["dataset"], row["split"], row["n_images"]) == ("digits", "test", 360)
    from zoo.data import ImageData

    data = ImageData("digits", test_split="test").attach(model)
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader()]
    assert row["top1"] == pytest.approx(100 * sum(hits) / 360)
    assert row["ci95"][0] < row["top1"] < row["ci95"][1]
    assert f"top-1 {row['top1']:.2f} %" in out
    assert run("eval weights=saved task=accuracy data=digits limit=7")[0] == 0
    assert rows(tmp_path)[-1]["n_images"] == 7


def test_sweep_runs_all_jobs_writes_the_report_and_fails_at_the_end(run, tmp_path):
    code, out, err = run(
        "eval -m backbone=test_vit reducer=none,tome schedule.r=4,90 task=flops control=[] "
        "hydra.sweep.dir=sweep"
    )
    assert code == 1
    found = read_rows(tmp_path / "sweep" / "rows.jsonl")
    assert [row["status"] for row in found] == ["ok", "ok", "ok", "failed"]
    assert [row["method"] for row in found] == ["none", "none", "tome", "tome"]
    command = "zoo eval backbone=test_vit reducer=tome schedule.r=4 task=flops 'control=[]'"
    assert found[2]["command"] == command
    assert len(rows(tmp_path)) == 4
    first, last = err.strip().splitlines()
    assert first.startswith("error: ") and "at most 50" in first and "schedule.r=90" in first
    assert last == "error: 1 job of the sweep failed"
    report = tmp_path / "sweep" / "report.html"
    assert report.stat().st_size > 1000
    assert f"report: {Path('sweep') / 'report.html'}" in out
    assert sum(line.startswith("test_vit") and " | " in line for line in out.splitlines()) == 3
    # A bad option ends a sweep before its first job.
    code, out, err = run("eval -m backbone=test_vit reducer=none,tomme task=flops")
    assert (code, out) == (2, "") and "did you mean tome" in err


def test_report_of_a_sweep_shows_earlier_rows_of_the_same_data(run, tmp_path):
    for data, name in (("digits", "earlier_model"), ("elsewhere", "foreign_model")):
        row = new_row(backbone=name, method="tome", dataset=data, top1=50.0, trained=True)
        row["gmacs"] = {"total": 0.02, "linear": 0.02, "attention": 0.0, "reducer": 0.0}
        append_row(tmp_path / "earlier" / f"{name}.jsonl", row)
    line = "eval -m weights=vit_digits limit=4 task=accuracy control=[] hydra.sweep.dir=sweep"
    code, out, err = run(f"{line} hydra.callbacks.report.also=earlier")
    assert code == 0, err
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert len(read_rows(tmp_path / "sweep" / "rows.jsonl")) == 1
    assert "earlier_model" in page and "foreign_model" not in page
    code, _, err = run(f"{line} hydra.callbacks.report.also=nowhere")
    assert code == 1 and "nowhere" in err and "rows.jsonl" in err


def test_interrupted_sweep_says_where_its_rows_are(run, tmp_path, monkeypatch):
    import zoo.run.evaluate

    evaluate = zoo.run.evaluate.evaluate

    def second_is_interrupted(cfg):
        if cfg.seed == 1:
            raise KeyboardInterrupt
        return evaluate(cfg)

    monkeypatch.setattr(zoo.run.evaluate, "evaluate", second_is_interrupted)
    code, _, err = run("eval -m backbone=test_vit seed=0,1,2 task=flops hydra.sweep.dir=sweep")
    assert code == 130
    assert err == "interrupted; the rows so far are in sweep/rows.jsonl\n"
    assert len(read_rows(tmp_path / "sweep")) == 1


def test_sweep_without_report_packages_keeps_its_rows_and_fails(run, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "plotly" else found(n, *a)
    )
    code, _, err = run("eval -m backbone=test_vit task=flops control=[] hydra.sweep.dir=sweep")
    assert code == 1
    assert "pip install 'tokenzoo[report]'" in err and "sweep/rows.jsonl" in err
    assert len(read_rows(tmp_path / "sweep")) == 1


def test_results_that_cannot_be_written_are_known_before_the_work(run, tmp_path, monkeypatch):
    import zoo.run.evaluate

    monkeypatch.setattr(zoo.run.evaluate, "evaluate", lambda cfg: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    code, _, err = run("eval backbone=test_vit results=file/rows.jsonl")
    assert code == 2 and "results=file/rows.jsonl cannot be written" in err


def test_row_that_cannot_be_written_after_the_work_is_printed(run, tmp_path, monkeypatch):
    import zoo.results.rows

    def full(path, row):
        raise ZooError("no space left on device")

    monkeypatch.setattr(zoo.results.rows, "append_row", full)
    code, out, err = run("eval backbone=test_vit task=flops")
    assert code == 2 and "no space left" in err
    assert json.loads(out.splitlines()[1])["gmacs"]["total"] > 0


def test_trained_means_trained_with_this_reducer(run, tmp_path):
    from zoo.checkpoint import save_pretrained

    model = zoo.create_model("test_vit", "tome", {"name": "constant_r", "r": 8}, num_classes=4)
    save_pretrained(model, tmp_path / "saved", metrics=[{"method": "tome", "trained": True}])
    for options in ("", "reducer=topk", "reducer=none"):
        assert run(f"eval weights=saved task=flops {options}")[0] == 0
    assert [row["trained"] for row in rows(tmp_path)] == [True, False, False]


@pytest.mark.slow  # every method once: half a minute
def test_the_whole_zoo_includes_the_dense_model(run, tmp_path):
    code, _, err = run(
        "eval -m backbone=test_vit 'reducer=glob(*)' schedule=target_gmacs schedule.fraction=0.7 "
        "task=flops ~hydra.callbacks.report"
    )
    assert code == 0, err
    found = rows(tmp_path)
    assert {row["method"] for row in found} >= {"none", *zoo.list_methods()}
    # Those that decide by themselves how much they remove promise no cost.
    assert {row["method"] for row in found if row["status"] == "skipped"} <= {
        *("adavit", "algm", "apt", "g2tm", "pixelprune", "rlt")
    }
    for row in found:
        if row["method"] != "none" and row["status"] == "ok":
            assert row["gmacs"]["total"] <= 0.7 * row["gmacs_dense"] * (1 + 1e-9)


def test_report_command_draws_the_rows_again(run, tmp_path):
    run("eval backbone=test_vit task=flops")
    code, out, _ = run("report results --out drawn")
    assert code == 0
    assert "report: drawn/report.html" in out
    assert (tmp_path / "drawn" / "report.html").exists()


@pytest.mark.parametrize(
    ("strategy", "devices", "refused"),
    [("ddp", 2, True), ("ddp_spawn", 2, False), ("ddp", 1, False), ("fsdp", "[0,1]", True)],
)
def test_sweeps_do_not_start_themselves_again(run, monkeypatch, strategy, devices, refused):
    import zoo.run.train
    from zoo.results.rows import new_row

    monkeypatch.setattr(zoo.run.train, "train", lambda cfg: new_row(method="none", backbone="x"))
    code, _, err = run(f"train -m seed=0,1 trainer.strategy={strategy} 'trainer.devices={devices}'")
    if refused:
        assert code == 2 and "torchrun" in err and len(err.strip().splitlines()) == 1
        assert "type trainer.strategy" not in err  # which training refuses, too
    else:
        assert code == 0


def test_a_sweep_of_evaluations_may_start_processes_by_python(run):
    code, _, err = run("eval -m backbone=test_vit,vit_digits trainer=ddp trainer.devices=2")
    assert code == 2 and "type trainer.strategy=ddp_spawn" in err


def test_top_k_counts_by_hand():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    labels = torch.tensor([0, 4, 5])
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    cpu = torch.device("cpu")
    assert top_k(nn.Identity(), batches, cpu) == (1, 2, 3)
    assert top_k(nn.Identity(), batches, cpu, limit=1) == (1, 1, 1)
    assert top_k(nn.Identity(), batches, cpu, limit=3) == (1, 2, 3)


class Takes(nn.Module):
    """Takes so many seconds on a clock of its own: no test of this file depends on the machine."""

    now = 0.0

    def __init__(self, seconds=0.001, fits=10**9):
        super().__init__()
        self.seconds, self.fits, self.calls = seconds, fits, []

    def forward(self, x):
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("no room")
        self.calls.append(Takes.now)
        Takes.now += self.seconds
        return x


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("zoo.measure.throughput.time.perf_counter", lambda: Takes.now)


def test_throughput_is_images_per_second_of_both_models(clock):
    model, dense = Takes(0.002), Takes(0.006)
    found = measure(model, dense, input_size=(1, 2, 2), batch=4, rounds=5, min_time=0.1)
    assert found.ms == pytest.approx(2)
    assert found.imgs_per_s == pytest.approx(4 / 0.002)
    assert found.imgs_per_s_dense == pytest.approx(4 / 0.006)
    assert found.spread == pytest.approx(0)
    assert found.peak_mem_mb is None
    # In turns of at least min_time: the dense model did not wait until the other had finished.
    assert len(model.calls) >= 5 * 50 and len(dense.calls) >= 5 * 17
    assert dense.calls[-1] > model.calls[-1] > dense.calls[-20]


def test_throughput_is_the_median_of_the_rounds(clock):
    class Hiccup(Takes):
        def forward(self, x):
            Takes.now += 1.0 if len(self.calls) == 6 else 0.0
            return super().forward(x)

    found = measure(Hiccup(0.5), batch=1, input_size=(1, 2, 2), rounds=5, min_time=0.1)
    assert found.ms == pytest.approx(500)
    assert found.spread > 0


def test_throughput_halves_a_batch_that_does_not_fit(clock):
    assert measure(Takes(fits=3), batch=8, input_size=(1, 2, 2), rounds=1).batch == 2
    with pytest.raises(ZooError, match="not even one image"):
        measure(Takes(fits=0), batch=8, input_size=(1, 2, 2), rounds=1)


def test_throughput_restores_the_threads(clock):
    before = torch.get_num_threads()
    found = measure(Takes(), batch=1, input_size=(1, 2, 2), rounds=1, threads=before + 1)
    assert found.threads == before + 1
    assert torch.get_num_threads() == before


def test_throughput_in_the_row(run, tmp_path):
    code, out, _ = run(
        "eval backbone=test_vit reducer=tome schedule.r=8 task=throughput throughput.batch=2 "
        "throughput.rounds=2 throughput.min_time=0.001 dtype=bfloat16"
    )
    assert code == 0 and "img/s" in out
    [row] = rows(tmp_path)
    assert row["imgs_per_s"] > 0 and row["imgs_per_s_dense"] > 0 and row["ms"] > 0
    assert (row["batch"], row["device"], row["dtype"]) == (2, "cpu", "bfloat16")


def test_doctor_finds_a_model_that_is_not_timm_s(run, monkeypatch):
    import zoo.cli.doctor

    monkeypatch.setattr(zoo.cli.doctor, "shipped", lambda: iter([(True, "vit_digits", "left out")]))
    code, out, _ = run("doctor")
    assert code == 0 and "all is well" in out and "FAIL" not in out, out
    monkeypatch.setattr(zoo.cli.doctor, "_gap", lambda *models: 1e-3)
    code, out, _ = run("doctor")
    assert code == 1 and "FAIL VisionTransformer, class token: 1.0e-03" in out


def test_json_of_a_method_is_json(run):
    card = json.loads(run("show tome --json")[1])
    assert card["name"] == "tome" and card["arguments"]["metric"] == "key"

"""The benchmarks: what they compare is equal, and their clocks and rows can be believed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import zoo
from benchmarks import breakdown, speed, table, tasks
from benchmarks.acceptance import AT_1, AT_16, Line
from benchmarks.models import parse_schedule, reduced, schedule_of
from benchmarks.pieces import pieces
from benchmarks.reference import METHODS, kmedoids, straightforward
from benchmarks.timing import Times, in_turns, peak_memory, ratio
from reduction.functional import clustering, kernels
from tests.cases import backbone, images
from zoo.errors import ZooError
from zoo.results.rows import FIELDS, read_rows

CPU = torch.device("cpu")
STAGES = {"name": "keep_rate", "rate": 0.6, "blocks": [1, 2, 3]}
R9 = {"name": "constant_r", "r": 9}
PRUNE_AND_MERGE = {
    "name": "per_block",
    "keep": [64, 50, 40, 20],
    "prune": [64, 58, 40, 30],
    "prefix": 0,
}


@pytest.mark.parametrize("schedule", [STAGES, R9, PRUNE_AND_MERGE], ids=lambda s: s["name"])
@pytest.mark.parametrize("method", METHODS)
def test_straightforward_forms_equal_the_package(method: str, schedule: dict[str, Any]) -> None:
    m = backbone("plain")
    if method in ("tome", "pitome", "tofu"):
        schedule = schedule | {"strict": False}
    model = reduced(m, method, schedule)
    with torch.no_grad():
        ours, theirs = model(images(3)), straightforward(model)(images(3))
        dense = m(images(3))
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - dense).abs().max() > 1e-3


def test_the_loop_over_clusters_finds_the_same_medoids() -> None:
    x, weight = torch.randn(3, 40, 8), torch.rand(3, 40) + 0.1
    distance = clustering.squared_distances(x)
    first = clustering.heaviest(weight, 11)
    found = clustering.kmedoids(distance, first, weight, 5)
    medoid, slot = kmedoids(distance, first, weight, 5)
    assert torch.equal(found.leader, medoid) and torch.equal(found.slot, slot)


def test_folded_bias_is_exact() -> None:
    q, k, v = torch.randn(3, 2, 3, 20, 16).unbind(0)
    bias = torch.randn(2, 1, 1, 20)
    expected = kernels.fused(q, k, v, 0.25, bias)
    assert (kernels.folded(q, k, v, 0.25, bias) - expected).abs().max() < 1e-5
    with kernels.forced("fold"):
        assert kernels.mode() == "fold"
        got = kernels.dot_product_attention(q, k, v, 0.25, bias)
    assert torch.equal(got, kernels.folded(q, k, v, 0.25, bias))


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = in_turns(steps, CPU, rounds=3, warmup=1, min_time=0.0)
    assert "".join(calls) == "aabb" + "aabb" + "bbaa" + "aabb"
    assert all(len(t.seconds) == 3 for t in times.values())


@pytest.fixture(autouse=True)
def memory_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling the C library is for a whole process, here that of all tests."""
    monkeypatch.setattr("benchmarks.speed.keep_pages", lambda: True)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_pages_are_kept() -> None:
    code = """
import resource, torch
from benchmarks.timing import keep_pages
def faults():
    torch.ones(1 << 23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
kept = keep_pages()
faults()
print(int(kept), first > 4 * 1024, faults() < 64)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "True", "True"]


def test_one_candidate_runs_beside_all_others() -> None:
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "dabc"}
    times = in_turns(steps, CPU, rounds=2, warmup=0, min_time=0.0, beside="d")
    assert "".join(calls) == "dabc" + "ddaabbddccdd" + "ddccddbbaadd"
    assert all(len(t.seconds) == len(t.beside) == 2 for t in times.values())
    assert times["d"].relative == [1.0, 1.0]
    slow = Times([2.0, 20.0], beside=[1.0, 10.0])
    assert ratio(slow, Times([4.0, 1.0], beside=[4.0, 1.0])) == 2.0


def test_a_failure_is_noted_and_others_go_on() -> None:
    def broken() -> None:
        raise ValueError("no\nsuch thing")

    times = in_turns({"bad": broken, "good": lambda: None}, CPU, rounds=2, min_time=0.0)
    assert times["bad"].error == "ValueError: no" and len(times["good"].seconds) == 2


def test_clock_and_ratio() -> None:
    steps = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)}
    times = in_turns(steps, CPU, rounds=3, warmup=0, min_time=0.0)
    assert 1.5 < ratio(times["slow"], times["fast"]) < 6
    # The ratio is of each round: a machine that slows down in between does not change it.
    assert ratio(Times([1.0, 10.0, 2.0]), Times([0.5, 5.0, 1.0])) == 2.0
    assert Times([1.0, 1.0, 1.0]).spread == 0.0


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def step() -> None:
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 18)
        del a, b
        torch.empty(1 << 18)

    assert peak_memory(step, CPU) == pytest.approx(5.0, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_memory_stays_below_dense(method: str) -> None:
    m = VisionTransformer(embed_dim=192, depth=3, num_heads=3).eval()
    x = torch.randn(2, 3, 224, 224)
    dense = peak_memory(tasks.inference(m, x), CPU)
    model = reduced(m, method, {"name": "keep_rate", "rate": 0.7, "blocks": [1, 2]})
    assert peak_memory(tasks.inference(model, x), CPU) <= dense


def test_rows_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.jsonl"
    line = f"--backbone test_vit --reducers topk,tomme --batch 2 --quick --min-time 0 --out {out}"
    assert speed.main([*line.split(), "--warmup", "1", "--schedule", "keep_rate:rate=0.5"]) == 0
    dense, row, failed = read_rows(out)
    assert set(row) == set(FIELDS) and dense["method"] == "none" and row["method"] == "topk"
    assert row["schedule"]["rate"] == 0.5 and row["batch"] == 2 and len(row["tokens"]) > 2
    saved = row["gmacs_dense"] / row["gmacs"]["total"]
    assert row["bench"]["efficiency"] == pytest.approx(row["bench"]["speedup"] / saved)
    assert row["ms"] * row["imgs_per_s"] == pytest.approx(2000)
    assert failed["status"] == "failed" and "did you mean 'tome'" in failed["error"]
    text = capsys.readouterr().out
    assert "test_vit, inference, batch 2, float32, cpu" in text and "topk" in text


def test_a_training_step_runs_with_options(tmp_path: Path) -> None:
    out = tmp_path / "speed.jsonl"
    line = "--backbone test_vit --reducers tome --batch 2 --quick --min-time 0 --mode training"
    assert speed.main([*line.split(), "--linear", "onednn", "--out", str(out)]) == 0
    assert read_rows(out)[1]["runtime"] == {"linear": "onednn"}
    assert read_rows(out)[1]["bench"]["mode"] == "training"


def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tasks.inference

    def small(model: Any, x: torch.Tensor, dtype: torch.dtype) -> Any:
        def step() -> Any:
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return real(model, x, dtype)()

        return step

    monkeypatch.setattr(tasks, "inference", small)
    out = tmp_path / "speed.jsonl"
    line = "--backbone test_vit --reducers topk --batch 8 --quick --min-time 0"
    assert speed.main([*line.split(), "--out", str(out)]) == 0
    assert {row["batch"] for row in read_rows(out)} == {2}


def test_the_search_step_runs() -> None:
    model = zoo.wrap(backbone("plain"), "diffrate", R9)
    tasks.diffrate_search(model, images())()
    assert all(p.grad is None for p in model.parameters())


def test_schedules() -> None:
    assert parse_schedule("keep_rate:rate=0.5,blocks=[3, 6]") == {
        "name": "keep_rate",
        "rate": 0.5,
        "blocks": [3, 6],
    }
    with pytest.raises(ZooError, match="expected NAME:KEY=VALUE"):
        parse_schedule("keep_rate:rate=[")
    assert schedule_of("diffrate", "deit_small_patch16_224")["keep"][-1] == 3


def test_targets() -> None:
    assert AT_16["tome"] == AT_16["topk"] == 1.0 and AT_16["evit"] == 0.97 and AT_1["evit"] == 0.92
    assert AT_16["token_pooling"] == 0.9 and AT_1["tome"] == 0.86
    assert Line("x", 1.0, 1.0).met and not Line("x", 0.999, 1.0).met
    assert Line("x", 1.0, 1.0, at_most=True).met and "MISSED" in str(Line("x", 2, 1, at_most=True))


def test_a_breakdown_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    m = backbone("plain")
    models = {speed.DENSE: reduced(m, None, own_kernels=True), "tome": reduced(m, "tome", R9)}
    calls = {n: tasks.inference(x, images()) for n, x in models.items()}
    with breakdown.marked():
        found = breakdown.measure(
            {n: partial(breakdown.parts_of, c) for n, c in calls.items()}, rounds=2
        )
    assert found["tome"]["reducer"] > 0 and found[speed.DENSE]["reducer"] == 0
    for parts in found.values():
        assert set(parts) == set(breakdown.PARTS)
        assert all(parts[p] > 0 for p in parts if p != "reducer")
    breakdown.print_table(found, {speed.DENSE: 1.0, "tome": 1.3}, "tiny", breakdown.PARTS)
    table = capsys.readouterr().out
    # The parts add up to what separates the efficiency from one.
    line = table.strip().splitlines()[-1].split("|")[3:]
    excess = sum(float(c.split("(")[1].split(" %")[0]) for c in line[:-2])
    assert float(line[-2]) == pytest.approx(1 / (1 + excess / 100), abs=0.01)


def test_a_training_step_has_three_parts(capsys: pytest.CaptureFixture[str]) -> None:
    models = {
        n: reduced(backbone("plain"), m, R9) for n, m in ((speed.DENSE, None), ("tome", "tome"))
    }
    steps = {n: breakdown.parts_of_training(m, images()) for n, m in models.items()}
    before = models["tome"].backbone.head.weight.detach().clone()
    found = breakdown.measure(steps, rounds=2)
    assert not torch.equal(models["tome"].backbone.head.weight, before)
    assert all(set(p) == set(breakdown.TRAINING) and min(p.values()) > 0 for p in found.values())
    saved = {speed.DENSE: 1.0, "tome": 1.3}
    breakdown.print_table(found, saved, "tiny", breakdown.TRAINING)
    assert capsys.readouterr().out.count("| ") > 10


ACCEPTANCE = table.PAGE.parents[1] / "results" / "speed" / "acceptance.jsonl"


def test_the_page_shows_the_committed_rows() -> None:
    page, rows = table.PAGE.read_text(encoding="utf-8"), read_rows(ACCEPTANCE)
    assert table.inserted(page, table.table(rows)) == page
    assert not any(row["dirty"] for row in rows) and len({row["git"] for row in rows}) == 1


def test_a_table_tells_met_from_missed() -> None:
    rows = [
        {
            "backbone": "deit_small_patch16_224",
            "batch": batch,
            "method": "topk",
            "runtime": None,
            "peak_mem_mb": 8.0,
            "peak_mem_mb_dense": 10.0,
            "bench": {"mode": "inference", "efficiency": 0.95, "over_straightforward": 1.1},
        }
        for batch in (16, 1)
    ]
    line = next(x for x in table.table(rows).splitlines() if x.startswith("| topk"))
    assert line == "| topk | 0.950 (**<** 1) | 0.950 (≥ 0.92) |  |  | 1.100, 1.100 | 0.800 |"
    page = f"a\n{table.BEGIN}\nold\n{table.END}\nb"
    assert table.inserted(page, "new") == f"a\n{table.BEGIN}\nnew\n{table.END}\nb"


def test_the_page_shows_the_committed_latency_rows() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    rows = read_rows(ACCEPTANCE.with_name("latency.jsonl"))
    for row in rows:
        saved = 1 - row["gmacs"]["total"] / row["gmacs_dense"]
        measured = re.search(r"\((\d\.\d\dx)\) at batch (\d+)", row["notes"])
        assert measured is not None and not row["dirty"]
        line = next(x for x in page.splitlines() if x.endswith(f"| {100 * saved:.1f} % |"))
        assert measured[1] in line and f"| {measured[2]} |" in line
    assert len(rows) == 4


def test_every_piece_runs() -> None:
    with torch.inference_mode():
        for piece in pieces(1):
            piece.plain()
            piece.fast()


@pytest.mark.slow
def test_two_checkouts_are_compared(tmp_path, capsys):
    from benchmarks import compare

    here = str(Path(__file__).resolve().parents[1])
    out = tmp_path / "rows.jsonl"
    arguments = ["--backbone", "test_vit", "--reducers", "none,tome", "--batch", "2"]
    assert compare.main([here, *arguments, "--rounds", "3", "--out", str(out)]) == 0
    rows = read_rows(out)
    assert [row["method"] for row in rows] == ["none", "tome"]
    for row in rows:
        assert row["bench"]["logits_gap"] < 1e-5 and 0.1 < row["bench"]["ratio"] < 10
        assert row["bench"]["ms_before"] > 0 and row["ms"] > 0

"""The suite of modes: its jobs, what they aim at, that none is done twice, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import jobs as suite
from benchmarks import modes, modes_table, speed, table
from benchmarks.jobs import MODELS, Job, jobs, target, target_over_timm
from benchmarks.modes import done_jobs
from zoo.results.rows import new_row, read_rows


def job(precision: str, mode: str, batch: int, model: str = "deit_small", align: int = 32) -> Job:
    return Job(model, precision, mode, align, 1, batch)


def test_every_mode_is_a_job_once_and_those_with_a_target_come_first() -> None:
    found = jobs("cpu")
    assert len({str(one) for one in found}) == len(found)
    assert {one.model for one in found} == set(MODELS)
    assert {one.threads for one in found} == {1, 2} and {one.batch for one in found} == {1, 16}
    assert {(one.precision, one.mode) for one in found} == {
        *((p, m) for p in ("float32", "bfloat16") for m in ("eager", "aligned", "compile")),
        *(("float32", m) for m in ("onnxruntime", "openvino")),
        *((p, "openvino") for p in ("bfloat16", "int8")),
    }
    aims = [target(one, "tome") is not None for one in found]
    assert all(aims[:5]) and sum(aims[:30]) > 20
    assert {one.mode for one in jobs("cuda")} == {"eager", "aligned", "compile", "graphs"}


@pytest.mark.parametrize(
    ("one", "aims"),
    [
        (job("float32", "eager", 16, align=1), (1.0, 1.0)),
        (job("float32", "aligned", 1), (0.82, 0.90)),
        (job("bfloat16", "aligned", 16), (0.92, 1.0)),
        (job("bfloat16", "aligned", 1), (0.68, 0.79)),
        (job("bfloat16", "aligned", 1, "vit_large"), (0.77, 0.82)),
        (job("bfloat16", "aligned", 1, "dinov2_small_518"), (0.95, 1.0)),
        (job("float32", "onnxruntime", 1), (0.90, 0.94)),
        (job("bfloat16", "openvino", 1), (0.82, 0.88)),
        (job("bfloat16", "openvino", 16), (0.92, 0.97)),
        (job("bfloat16", "eager", 1, align=1), (None, None)),
    ],
)
def test_targets(one: Job, aims: tuple[float | None, float | None]) -> None:
    assert (target(one, "tome"), target(one, "topk")) == aims
    assert target(one, "token_pooling") is None
    large = one.model.endswith("518")
    assert target(one, "pitome") == (0.85 if large else aims[0])


def test_the_targets_over_the_untouched_model() -> None:
    one = job("bfloat16", "aligned", 1)
    assert (target_over_timm(one, "tome"), target_over_timm(one, "evit")) == (1.40, 1.58)
    assert target_over_timm(job("bfloat16", "aligned", 16), "tome") is None


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("test_vit", {}, "Tiny")
    for module in (suite, modes, modes_table):
        monkeypatch.setattr(module, "MODELS", {"deit_small": tiny, "siglip_base": tiny})
    monkeypatch.setattr(suite, "FRACTION", 0.8)  # four blocks cannot do with less, aligned


QUICK = "--rounds 3 --min-time 0.001 --job-seconds 0.1 --reducers tome,topk".split()


def run(out: Path, *words: str) -> int:
    return speed.main(["--suite", "modes", *QUICK, "--out", str(out), *words])


def test_a_job_that_is_done_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    out = tmp_path / "modes.jsonl"
    only = ("--only", "deit_small", "--modes", "aligned", "--dtype", "float32", "--threads", "1")
    assert run(out, *only, "--batch", "1,16", "--minutes", "1e-9") == 0
    assert "left: deit_small float32 aligned, align 32, batch 1, 1 thread" in capsys.readouterr()[0]
    assert run(out, *only, "--batch", "1") == 0
    rows = read_rows(out)
    assert [row["method"] for row in rows] == ["none", "tome", "topk"]
    done = []

    def rest(self: modes.Bench, one: Job) -> list[dict[str, Any]]:
        done.append(one)
        return [new_row(**rows[0] | {"bench": {**rows[0]["bench"], "job": str(one)}})]

    monkeypatch.setattr(modes.Bench, "rows", rest)
    assert run(out, *only, "--batch", "1,16") == 0
    assert [one.batch for one in done] == [16] and len(done_jobs(out)) == 2
    assert run(out, *only) == 0 and len(done) == 1 and len(read_rows(out)) == 4
    assert "nothing is left" in capsys.readouterr()[0]
    tome = rows[1]
    assert tome["engine"] == "torch" and tome["machine"]["name"] and tome["cpu_ms"] > 0
    assert tome["imgs_per_s_timm"] > 0 and tome["imgs_per_s_dense"] > 0
    assert tome["bench"]["target"] == 0.82 and tome["bench"]["job"] in done_jobs(out)
    assert all(n % 32 == 0 for n in {pair[1] for pair in tome["tokens"]} - {101})
    text = modes_table.modes_table(read_rows(out))
    assert "| Tiny | float32, aligned, 32 | 1 | 1 |" in text and "Rows of a GPU: none" in text


def test_bfloat16_runs_packed_and_casts_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small(monkeypatch)
    out = tmp_path / "modes.jsonl"
    words = "--only siglip_base --modes aligned --dtype bfloat16 --threads 1 --batch 1"
    assert run(out, *words.split(), "--reducers", "topk") == 0
    for row in read_rows(out):
        assert row["status"] == "ok" and row["weights_dtype"] == "bfloat16"
        assert row["runtime"] == {"linear": "packed"} and row["dtype"] == "float32"


def test_a_job_is_done_once_all_the_methods_that_are_asked_for_have_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small(monkeypatch)
    out = tmp_path / "modes.jsonl"
    words = "--only deit_small --modes eager --dtype float32 --threads 1 --batch 1".split()
    for _ in range(2):
        assert run(out, *words) == 0
    assert [row["method"] for row in read_rows(out)] == ["none", "tome", "topk"]
    assert run(out, *words, "--reducers", "topk,evit") == 0
    assert [row["method"] for row in read_rows(out)][3:] == ["none", "topk", "evit"]
    assert run(out, *words, "--reducers", "tome,topk,evit") == 0
    assert len(read_rows(out)) == 6


def test_jobs_of_the_same_models_follow_each_other() -> None:
    first = job("float32", "onnxruntime", 1)
    found = [
        first, first._replace(align=1), first._replace(mode="openvino"),
        first._replace(mode="openvino", precision="bfloat16"), job("float32", "compile", 1),
        first._replace(batch=16), first._replace(align=1, batch=16), job("float32", "compile", 16),
    ]  # fmt: skip
    ordered = modes.together(found)
    assert sorted(map(str, ordered)) == sorted(map(str, found))
    # One graph per alignment, one session per runtime, one compilation per precision.
    assert [(j.mode, j.align, j.batch) for j in ordered] == [
        ("onnxruntime", 32, 1), ("onnxruntime", 32, 16), ("openvino", 32, 1), ("openvino", 32, 1),
        ("onnxruntime", 1, 1), ("onnxruntime", 1, 16), ("compile", 32, 1), ("compile", 32, 16),
    ]  # fmt: skip
    assert modes.together(jobs("cpu"))[:2] == jobs("cpu")[:2]


def test_controls_are_the_dense_model_on_a_smaller_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    out = tmp_path / "modes.jsonl"
    words = "--only deit_small --modes eager --dtype float32 --threads 1 --batch 1".split()
    for _ in range(2):
        assert run(out, *words, "--reducers", "controls", "--fraction", "0.5") == 0
    dense, control = read_rows(out)
    assert dense["bench"].get("control") is None and control["bench"]["control"] == "112 px"
    assert (dense["img_size"], control["img_size"]) == (160, 112)
    assert control["method"] == "none" and control["status"] == "ok"
    # It takes the place of the whole model, which it is compared with.
    assert control["gmacs_dense"] == dense["gmacs"]["total"]
    share = control["gmacs"]["total"] / control["gmacs_dense"]
    assert 0.4 < share < 0.6
    bench = control["bench"]
    assert bench["efficiency"] == pytest.approx(bench["speedup"] * share)
    assert "112 px" in capsys.readouterr()[0]
    # Rows of methods of the same job are not looked for among them.
    assert run(out, *words, "--reducers", "tome", "--fraction", "0.5") == 0
    assert [row["method"] for row in read_rows(out)][2:] == ["none", "tome"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "deit"], "--only deit: expected one of deit_small"),
        (["--modes", "fast"], "--modes fast: expected one of eager"),
        (["--modes", "onnxruntime", "--dtype", "bfloat16"], "no job of the suite"),
        (["--batch", "4"], "batches are 1 and 16"),
        (["--fraction", "1.5"], "--fraction 1.5: expected numbers between 0 and 1"),
        (["--device", "cuda:7"], "--device=cuda:7 cannot be used here"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "rows.jsonl", *words) == 2
    text = capsys.readouterr()[1]
    assert says in text and len(text.strip().splitlines()) == 1


def one_job(folder: Path, words: str) -> dict[str, Any]:
    """Rows by method, of one image by DeiT-S on one thread."""
    out = folder / "modes.jsonl"
    words = f"--only deit_small --dtype float32 --threads 1 --batch 1 {words}"
    assert run(out, *words.split()) == 0
    return {row["method"]: row for row in read_rows(out)}


def test_a_method_that_cannot_be_run_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small(monkeypatch)
    found = one_job(tmp_path, "--modes eager --reducers topk,nothing")
    assert found["topk"]["status"] == "ok" and found["nothing"]["status"] == "failed"
    assert "nothing" in found["nothing"]["error"]


def test_a_budget_out_of_reach_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch)
    found = one_job(tmp_path, "--modes eager --reducers topk --fraction 0.01")
    assert found["topk"]["status"] == "skipped" and found["none"]["status"] == "ok"
    assert found["topk"]["error"].startswith("UnreachableBudget: ")
    cells = modes_table.points_table(list(found.values())).splitlines()[-1].split("|")
    assert cells[-2].strip() == ""


def test_lengths_that_a_method_cannot_leave_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small(monkeypatch)
    found = one_job(tmp_path, "--modes aligned --reducers topk,heuristic --fraction 0.6")
    assert found["heuristic"]["status"] == "skipped" and found["topk"]["status"] == "ok"
    assert found["heuristic"]["error"].endswith("use align=1")


def test_other_costs_are_other_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch)
    out = tmp_path / "points.jsonl"
    words = "--only deit_small --modes eager --dtype float32 --threads 1 --batch 1"
    assert run(out, *words.split(), "--fraction", "0.9", "0.8") == 0
    rows = read_rows(out)
    by_cost = {(row["method"], (row["schedule"] or {}).get("fraction")) for row in rows}
    assert by_cost == {(m, f) for m in ("tome", "topk") for f in (0.9, 0.8)} | {("none", None)}
    assert done_jobs(out) == {
        "deit_small float32 eager, batch 1, 1 thread, 90 %",
        "deit_small float32 eager, batch 1, 1 thread",  # the cost that is asked for by default
    }
    assert all(row["bench"]["target"] is None for row in rows if row["bench"]["fraction"] == 0.9)
    lines = modes_table.points_table(rows).splitlines()
    assert [line.split("|")[2].strip() for line in lines[4:]] == ["90 %", "80 %"]
    assert all(line.count("x |") == 2 for line in lines[4:])
    # Rows of another machine are neither done here nor in the same table.
    other = {"name": "Another CPU", "isa": ["avx2"]}
    out.write_text("".join(json.dumps({**one, "machine": other}) + "\n" for one in rows))
    assert done_jobs(out) == set()
    text = modes_table.points_table([*rows, *read_rows(out)])
    assert text.count("| model |") == 2 and text.count("On Another CPU: no AMX; torch") == 1


# ------------------------------------------------------------------------------------- tables


def row(one: Job, method: str, efficiency: float, times: float, **more: Any) -> dict[str, Any]:
    bench = {
        "suite": "modes", "job": str(one), "efficiency_by_dense": {"dense": efficiency},
        "speedup": 1.5, "speedup_over_timm": times, "ms_dense": {"dense": 30.0, "timm": 40.0},
        "target": target(one, method), "target_over_timm": target_over_timm(one, method),
    }  # fmt: skip
    known = {"method": method, "device": "cpu", "ms": 20.0, "imgs_per_s": 50.0, "bench": bench}
    about = {"name": "CPU", "isa": ["avx2"]}
    return new_row(**known | {"machine": about, "imgs_per_s_dense": 33.0} | more)


def test_what_cannot_cost_so_little_is_empty_and_what_went_wrong_failed() -> None:
    one = job("float32", "onnxruntime", 1)
    rows = [
        row(one, "tome", 0.9, 1.5),
        row(one, "topk", 0.9, 1.5, status="failed", error="UnreachableBudget: topk: target of 1"),
        row(one, "pitome", 0.9, 1.5, status="failed", error="ZooError: differs from torch by 0.2"),
    ]
    cells = modes_table.points_table(rows).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[-4:]] == ["1.50x", "", "failed", ""]


def test_the_table_says_what_is_missed() -> None:
    one = job("bfloat16", "aligned", 1)
    rows = [row(one, "tome", 0.70, 1.30), row(one, "topk", 0.80, 1.60), row(one, "tome", 0.66, 1.5)]
    text = modes_table.modes_table(rows)
    assert "0.660 (**<** 0.68), 1.500x (≥ 1.40x)" in text  # the latest row counts
    assert "0.800 (≥ 0.79), 1.600x (≥ 1.58x)" in text
    assert "3 of 4 numbers with a target reach it." in text and "CPU: no AMX" in text
    assert "No rows yet" in modes_table.modes_table([])


def test_rows_at_other_costs_do_not_replace_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.results.rows import append_row

    one = job("float32", "onnxruntime", 1)._replace(fraction=0.5)
    made = row(one, "tome", 0.9, 1.5)
    append_row(tmp_path / "rows.jsonl", made | {"bench": made["bench"] | {"fraction": 0.5}})
    before = table.PAGE.read_text(encoding="utf-8")
    assert table.main([str(tmp_path / "rows.jsonl"), "--write"]) == 2
    assert "python -m benchmarks.leaderboard --write" in capsys.readouterr()[1]
    assert table.PAGE.read_text(encoding="utf-8") == before


def test_the_page_on_deploying_gets_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.results.rows import append_row

    one = job("float32", "onnxruntime", 1)
    append_row(tmp_path / "rows.jsonl", row(one, "tome", 0.9, 1.5))
    for name in ("PAGE", "DEPLOY"):
        page = tmp_path / f"{name}.md"
        page.write_text(getattr(table, name).read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(table, name, page)
    assert table.main([str(tmp_path / "rows.jsonl"), "--write"]) == 0
    deploy = (tmp_path / "DEPLOY.md").read_text()
    assert "| DeiT-S | onnxruntime | float32 | 1 | tome | 30.0 | 20.0 | 1.50x |" in deploy
    page = (tmp_path / "PAGE.md").read_text()
    assert "| DeiT-S | float32, onnxruntime, 32 | 1 | 1 | 30.0 |" in page
    assert table.BEGIN in page and "| tome | 1.041" in page  # the other table stays

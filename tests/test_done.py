"""Tables of results: a sweep that an experiment brings along, whose jobs are done once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from tests.commands import Run
from zoo.checkpoint import save_pretrained
from zoo.published import config_folder
from zoo.results.rows import append_row, read_rows

SWEEP = "eval -m weights=vit_digits reducer=topk,tome schedule.r=4 task=flops resolutions=[0.5]"


def rows() -> list[dict[str, Any]]:
    return read_rows("results/local/rows.jsonl")


def test_a_job_that_is_done_is_not_repeated(run: Run) -> None:
    assert run(f"{SWEEP} done=skip")[0] == 0
    first = rows()
    assert len(first) == 4 and len({row["job"] for row in first}) == 4
    code, out, _ = run(f"{SWEEP.replace('r=4', 'r=4,8')} done=skip hydra.sweep.dir=sweep")
    assert code == 0 and out.count("| done before") == 4
    assert len(rows()) == 6
    # The report of the sweep has all of them, in the rows that were there.
    assert {row["run_id"] for row in first} < {r["run_id"] for r in read_rows("sweep/rows.jsonl")}
    assert len(read_rows("sweep/rows.jsonl")) == 6


def test_another_option_is_another_job(run: Run) -> None:
    one = "eval weights=vit_digits reducer=tome schedule.r=4 task=flops done=skip"
    for more in ("", " progress=false", " seed=1", " reducer.prop_attn=false"):
        assert run(one + more)[0] == 0
    assert len(rows()) == 3


def test_other_weights_are_another_job(run: Run) -> None:
    save_pretrained(zoo.load("vit_digits"), "mine")
    one = "eval weights=mine reducer=tome schedule.r=4 task=flops done=skip"
    assert run(one)[0] == 0 and run(one)[0] == 0 and len(rows()) == 1
    model = zoo.load("mine")
    model.backbone.head.bias.data += 1
    save_pretrained(model, "mine")
    assert run(one)[0] == 0 and len(rows()) == 2


def test_a_row_of_more_tasks_answers_a_job_of_fewer(run: Run) -> None:
    both = "eval weights=vit_digits limit=20 'task=[accuracy,flops]' done=skip"
    assert run(both)[0] == 0 and len(rows()) == 1
    for fewer in ("'task=[flops,accuracy]'", "task=accuracy", "'task=[flops]'"):
        code, out, _ = run(both.replace("'task=[accuracy,flops]'", fewer))
        assert code == 0 and "| done before" in out and len(rows()) == 1
    # Neither what was not asked then, nor other options.
    assert run(both.replace("flops]", "flops,fidelity]"))[0] == 0 and len(rows()) == 2
    assert run(both.replace("limit=20", "limit=10"))[0] == 0
    assert len(rows()) == 3


def test_rows_of_fewer_tasks_answer_a_job_of_more_together(run: Run) -> None:
    one = "eval weights=vit_digits reducer=tome schedule.r=4 limit=20 done=skip 'task=[{}]'"
    for tasks in ("accuracy,flops", "fidelity,flops"):
        assert run(one.format(tasks))[0] == 0
    halves = rows()
    code, out, _ = run(one.format("flops,accuracy,fidelity"))
    assert code == 0 and out.count("| done before") == 2 and rows() == halves
    # One of them is all that is asked here; there one task is in none of them.
    code, out, _ = run(one.format("fidelity"))
    assert code == 0 and out.count("| done before") == 1 and rows() == halves
    assert run(one.format("accuracy,fidelity,flops,knn"))[0] == 0 and len(rows()) == 3


def test_a_part_that_failed_is_no_part_of_an_answer(run: Run) -> None:
    one = "eval weights=vit_digits reducer=tome schedule.r=4 limit=20 done=skip 'task=[{}]'"
    for tasks in ("accuracy,flops", "fidelity,flops"):
        assert run(one.format(tasks))[0] == 0
    halves = rows()
    Path("results/local/rows.jsonl").unlink()
    for row in (halves[0], halves[1] | {"status": "failed"}):
        append_row("results/local/rows.jsonl", row)
    assert run(one.format("accuracy,fidelity"))[0] == 0
    assert len(rows()) == 3 and rows()[-1]["fidelity"] is not None


@pytest.mark.parametrize("broken", [{"task": 5}, {"task": [{}]}, {"task": None}, {"engine": []}])
def test_rows_that_are_none_are_passed_over(run: Run, broken: dict[str, Any]) -> None:
    one = "eval weights=vit_digits task=[flops] done=skip"
    assert run(one)[0] == 0
    [whole] = rows()
    path = Path("results/local/rows.jsonl")
    path.write_text(json.dumps({**whole, "job": None, **broken}) + "\n" + json.dumps(whole) + "\n")
    code, out, _ = run(one)
    assert code == 0 and out.count("| done before") == 1


def test_without_the_option_jobs_are_run_again(run: Run) -> None:
    for _ in range(2):
        assert run("eval weights=vit_digits task=flops")[0] == 0
    assert len(rows()) == 2 and rows()[0]["job"] == rows()[1]["job"]


def test_methods_that_need_training_are_left_out_where_asked(run: Run) -> None:
    code, _, err = run(
        "eval -m weights=vit_digits reducer=tome,tokenlearner,atc task=flops control=[] "
        "untrained=skip"
    )
    assert (code, err) == (0, "")
    assert [row["status"] for row in rows()] == ["ok", "skipped", "ok"]
    assert "needs training" in rows()[1]["error"]


def test_budgets_that_a_method_cannot_keep_are_skipped_in_a_sweep(run: Run) -> None:
    code, _, err = run(
        "eval -m weights=vit_digits reducer=tome,topk schedule=target_gmacs schedule.fraction=0.05 "
        "task=flops control=[]"
    )
    assert (code, err) == (0, "") and {row["status"] for row in rows()} == {"skipped"}


# What is swept in place of all methods, and the methods of the rows.
FEW = {
    "ablation": ("task=flops reducer.score=norm", {"none", "ranked"}),
    "selectors": ("selector=visionzip select.keep=9 limit=20 gallery_limit=20", {"none"}),
    "": ("task=flops reducer=tome,tokenlearner", {"none", "tome", "tokenlearner"}),
}
TABLES = sorted(
    path.stem
    for path in (config_folder() / "experiment/leaderboard").glob("*.yaml")
    if "python eval.py" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_one_command(run: Run, name: str) -> None:
    swept, methods = next(few for start, few in FEW.items() if name.startswith(start))
    code, out, err = run(
        f"eval experiment=leaderboard/{name} weights=vit_digits backbone=vit_digits data=digits "
        f"{swept} results=rows.jsonl ++backbone.args.img_size=16 control=dense "
        + ("schedule.fraction=0.75" if name != "selectors" else "")
    )
    assert (code, err) == (0, ""), err
    found = read_rows("rows.jsonl")
    assert {row["status"] for row in found} == ({"ok", "skipped"} if len(methods) > 2 else {"ok"})
    assert {row["method"] for row in found} == methods


@pytest.mark.parametrize("name", ["fashion", "dinov2"])
def test_the_dense_row_of_a_table_is_one_run_by_its_command(run: Run, name: str) -> None:
    swept, _ = FEW[""]
    assert not run(
        f"eval experiment=leaderboard/{name} weights=vit_digits backbone=vit_digits data=digits "
        f"{swept} results=rows.jsonl ++backbone.args.img_size=16 control=dense "
        "schedule.fraction=0.75"
    )[0]
    dense = read_rows("rows.jsonl")[-1]
    words = dense["command"].removeprefix("zoo ").replace("rows.jsonl", "again.jsonl")
    code, _, err = run(f"{words} done=again")
    assert (code, err) == (0, "")
    (again,) = read_rows("again.jsonl")
    assert again["method"] == "none" and again["gmacs"] == dense["gmacs"]


def test_the_options_of_a_sweep_are_shown(run: Run) -> None:
    code, out, err = run("eval experiment=leaderboard/fashion --cfg job")
    assert (code, err) == (0, "") and "fraction: " in out and "answers: true" in out


def test_an_option_of_a_part_that_is_swept_goes_with_every_job(run: Run) -> None:
    code, _, err = run(
        "eval -m weights=vit_digits reducer=tome,topk reducer.prop_attn=false schedule=constant_r "
        "schedule.r=2 task=flops control=[]"
    )
    assert (code, err) == (0, "")
    assert [row["reducer"]["prop_attn"] for row in rows()] == [False, False]
    # The command of a row says so, too.
    assert run(rows()[1]["command"].removeprefix("zoo "))[0] == 0
    assert rows()[2]["reducer"] == rows()[1]["reducer"]


def test_an_option_narrows_the_sweep_of_an_experiment(run: Run) -> None:
    code, _, err = run(
        "eval experiment=size_bias/digits reducer=topk reducer.prop_attn=true "
        "reducer.settle=nearest task=flops results=rows.jsonl"
    )
    assert (code, err) == (0, "")
    found = read_rows("rows.jsonl")
    assert [row["method"] for row in found] == ["topk", "none"]
    assert found[0]["reducer"]["settle"] == "nearest"


def test_an_experiment_of_training_is_refused_by_eval(run: Run) -> None:
    code, _, err = run("eval experiment=vit_digits")
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


def test_of_several_processes_one_says_what_was_done_before(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = "eval weights=vit_digits reducer=tome schedule.r=4 task=flops done=skip"
    assert run(one)[0] == 0
    code, out, _ = run(one)
    assert code == 0 and out.count("| done before") == 1
    for name in ("RANK", "LOCAL_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert run(one) == (0, "", "")
    assert len(rows()) == 1

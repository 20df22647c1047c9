"""The leaderboards: tables follow from rows, and rows can be run again."""

from __future__ import annotations

import shlex

import pytest
from omegaconf import OmegaConf

from benchmarks import agreement, leaderboard, standings
from zoo.results.answers import packed
from zoo.results.rows import FIELDS, read_rows


def row(method: str, fraction: float | None = None, right: int = 80, seed: int = 0, **changed):
    cost = 1.0 if fraction is None else fraction
    answers = [i >= 100 - right for i in range(100)]
    made = {
        **dict.fromkeys(FIELDS),
        "job": f"{method} {fraction} {seed} {sorted(changed.items())}",
        **{"run_id": f"{method}{fraction}{seed}", "status": "ok", "method": method, "seed": seed},
        **{"dataset": "fashion_mnist", "split": "test", "n_images": 100, "img_size": 28},
        "schedule": None if fraction is None else {"name": "target_gmacs", "fraction": fraction},
        "gmacs": {"total": cost},
        **{"weights_dtype": "bfloat16", "gallery": "dense"},
        **{"gmacs_dense": 1.0, "backbone": "vit_fashion", "top1": float(right)},
        "ci95": [right - 5.0, right + 5.0],
        "answers": {"accuracy": packed(answers)},
    }
    return {**made, **changed}


ROWS = [
    row("tome", 0.5, 88),
    row("topk", 0.5, 60),
    row("topk", 0.35, 55),
    *(row("random", 0.5, 70 + seed, seed) for seed in range(3)),
    row("ats", 0.5, 80, gmacs={"total": 0.4}),
    row("none", None, 90),
    row("none", None, 85, img_size=20, gmacs={"total": 0.5}, gmacs_dense=0.5),
]


KNN = {"top1": 46.0, "ci95": [43.0, 49.0], "agreement": 95.0, "agreement_ci95": [93.0, 97.0]}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_methods_stand_by_their_accuracy_at_half_the_cost() -> None:
    lines = standings.fashion_table(ROWS).splitlines()
    names = [cells(line)[0].split("`")[1] for line in lines[2:]]
    assert names == ["tome", "ats", "random", "topk"]
    by_name = dict(zip(names, map(cells, lines[2:]), strict=True))
    assert by_name["topk"][1:3] == ["60.00", "55.00"]
    assert by_name["random"][1] == "71.00 ± 1.00"  # over three seeds
    assert by_name["ats"][1] == "80.00 (40 %)"  # a cost that is not what was asked for is told


def test_two_methods_are_compared_on_the_same_images() -> None:
    lines = standings.fashion_table(ROWS).splitlines()
    assert cells(lines[-1])[-3:] == ["28", "0", "**7e-9**"]
    assert cells(lines[2])[-3:] == ["", "", ""]  # with itself


def test_methods_with_options_stand_apart() -> None:
    on, off = (
        row("tome", 0.5, right, command=f"python eval.py reducer=tome reducer.prop_attn={said}")
        for right, said in ((70, "True"), (66, "False"))
    )
    assert standings.fashion_table([*ROWS, on, off]) == standings.fashion_table(ROWS)
    lines = standings.sizes_table([*ROWS, on, off]).splitlines()
    assert [cells(line)[1:] for line in lines[2:]] == [["50 %", "70.00", "66.00", "4", "0", "0.12"]]


def test_controls_stand_by_their_cost() -> None:
    lines = standings.control_table(ROWS).splitlines()
    assert [cells(line)[1:4] for line in lines[2:]] == [
        ["28", "1.000", "100 %"],
        ["20", "0.500", "50 %"],
    ]


def test_of_rows_for_one_job_the_last_counts_and_failed_ones_do_not() -> None:
    first = row("tome", 0.5, 10)
    failed = {**row("topk", 0.5, 99), "status": "failed"}
    assert standings.good([first, *ROWS, failed]) == ROWS


RECALL = {"crop": {"recall1": 20.77}}


def test_agreement_with_the_dense_tower() -> None:
    rows = [
        row("tome", 0.35, reducer={"name": "tome", "prop_attn": True}, knn=KNN,
            centred_cosine={"mean": 0.999, "worst": 0.9}),
        row("tome", 0.35, reducer={"name": "tome", "prop_attn": False}, knn=KNN | {"agreement": 9}),
    ]  # fmt: skip
    lines = agreement.agreement_table(rows).splitlines()
    assert cells(lines[2])[1:] == ["yes", "95.0", "93.0 to 97.0", "0.999", "0.900"]
    assert cells(lines[3])[1:3] == ["no", "9.0"]
    assert len(agreement.agreement_table(rows, "openclipart").splitlines()) == 2
    again = {**rows[0], "job": "j", "schedule": {"fraction": 0.5}, "retrieval": RECALL}
    lines = agreement.agreement_table([*rows, again]).splitlines()
    assert cells(lines[0])[-2:] == [f"other crop found first at {b} %" for b in (50, 35)]
    assert cells(lines[2])[-2:] == ["20.8", ""]
    # Crops that were looked up by a job of their own.
    alone = {**rows[0], "job": "crops", "knn": None, "retrieval": {"crop": {"recall1": 19.5}}}
    lines = agreement.agreement_table([*rows, again, alone]).splitlines()
    assert len(lines) == 4 and cells(lines[2])[-2:] == ["20.8", "19.5"]


def test_smaller_images_are_compared_with_the_dense_tower() -> None:
    lines = agreement.resolution_table(
        [
            row("none", img_size=size, gmacs={"total": cost}, knn=KNN | {"agreement": agreement})
            for size, cost, agreement in ((154, 2.7, 50.4), (224, 6.0, 100.0))
        ]
    ).splitlines()
    assert [cells(line)[:4] for line in lines[2:]] == [
        ["224", "6.00", "100 %", "100.0"],
        ["154", "2.70", "45 %", "50.4"],
    ]


def test_galleries_stand_beside_each_other() -> None:
    rows = [
        row("tome", 0.35, reducer={"name": "tome", "prop_attn": True}, img_size=224, gallery=which,
            knn=KNN | {"top1": top1})
        for which, top1 in (("dense", 56.9), ("own", 57.2))
    ]  # fmt: skip
    rows.append({**rows[0], "method": "topk", "job": "no own gallery"})
    lines = agreement.gallery_table(rows).splitlines()
    assert [cells(line)[2:] for line in lines[2:]] == [
        ["35 %", "56.9", "43.0 to 49.0", "57.2", "43.0 to 49.0"]
    ]


def test_precisions_are_compared_on_the_same_images() -> None:
    rows = [
        *ROWS,
        row("tome", 0.5, 86, weights_dtype=None),
        row("topk", 0.2, 9, weights_dtype=None),
    ]
    lines = standings.precision_table(rows).splitlines()
    assert [cells(line)[1:] for line in lines[2:]] == [["50 %", "86.00", "88.00", "0", "2", "0.50"]]
    assert standings.fashion_table(rows) == standings.fashion_table(ROWS)


def test_trained_models_stand_beside_those_off_the_shelf() -> None:
    tuned = "python train.py experiment=leaderboard/trained reducer="
    backbone = {"args": {"patch_size": 4}}
    plain, clca = (
        {"job": None, "recipe": {"plugins": plugins, "backbone": backbone}}
        for plugins in ([], [{"name": "clca"}])
    )
    short, long = ({"training": {"epochs": n}} for n in (1, 3))
    scratch, all_parts = "python train.py experiment=vit_fashion_coarse", "everything, from scratch"
    rows = [
        row("none", None, 91, command=f"{tuned}none", **plain, **short),
        row("topk", 0.5, 85, command=f"{tuned}topk", **plain, **short),
        row("topk", 0.5, 83, command=f"{tuned}topk seed=1", seed=1, **plain, **short),
        row("topk", 0.5, 86, command=f"{tuned}topk plugin=clca", **clca, **short),
        row("dtem", 0.5, 89, command=f"{tuned}dtem module=reducer_only", **plain, **long),
        row("none", None, 80, command=scratch, gmacs={"total": 0.2}, **plain, **long),
    ]
    lines = standings.trained_table(rows, ROWS).splitlines()
    assert [cells(line)[:6] for line in lines[2:]] == [
        ["`vit_fashion`", "everything", "400 steps", "100 %", "90.00", "91.00"],
        ["`dtem`", "the reducer", "3 epochs", "50 %", "", "89.00"],
        ["`topk` + `clca`", "everything", "400 steps", "50 %", "", "86.00"],
        ["`topk`", "everything", "400 steps", "50 %", "60.00", "84.00 ± 1.41"],
        ["`vit_fashion`, patches of 4", all_parts, "3 epochs", "20 %", "", "80.00"],
    ]


def test_a_short_training_is_as_long_as_the_table_says() -> None:
    config = OmegaConf.load(leaderboard.ROOT / "configs/experiment/leaderboard/trained.yaml")
    assert standings.SHORT == f"{config.trainer.limit_train_batches} steps"


def test_a_smaller_model_is_a_control_and_no_dense_model() -> None:
    small = row("none", None, 86, backbone="vit_fashion_small", gmacs={"total": 0.5}, job="small")
    low = row("none", None, 84, backbone="vit_fashion_small", weights_dtype=None, job="low")
    lines = [cells(line) for line in standings.control_table([*ROWS, small]).splitlines()[2:]]
    assert ["`vit_fashion_small`, dense", "28", "0.500", "50 %", "86.00", "81.0 to 91.0"] in lines
    assert standings.precision_table([*ROWS, small, low]) == standings.precision_table(ROWS)
    assert leaderboard.chosen_quickly([*ROWS, small])[0]["backbone"] == "vit_fashion"


def test_selectors_stand_above_their_controls() -> None:
    def seen(agreement: float) -> dict[str, float]:
        return {"agreement": agreement, "centred_cosine": 0.5, "coverage_mean": 0.1}

    rows = [
        {
            "job": name, "command": name, "seed": 0, "status": "ok",
            "select": {
                "selector": {"name": name},
                "by_keep": [
                    {"keep": 32, "selector": seen(value), "random": seen(60), "resolution": None}
                ],
            },
        }
        for name, value in (("apet", 70), ("scope", 80))
    ]  # fmt: skip
    lines = agreement.selector_table(rows).splitlines()
    assert [cells(line)[0] for line in lines[2:]] == [
        "[`scope`](selectors/scope.md)",
        "[`apet`](selectors/apet.md)",
        "*random*",
        "*resolution*",
    ]
    assert cells(lines[4])[1:] == ["60.0", "0.500", "100.00"] and cells(lines[5])[1:] == [""] * 3


def test_a_row_falls_inside_its_interval_or_outside() -> None:
    old = row("tome", 0.5, 88)
    assert leaderboard.verdict(old, {**old, "top1": 91.0})[0]
    inside, line = leaderboard.verdict(old, {**old, "top1": 80.0})
    assert not inside
    assert line == "tome at 50 %: top-1 80.00, OUTSIDE [83.00, 93.00]"


@pytest.mark.parametrize("file", sorted(leaderboard.ROWS.glob("*.jsonl")), ids=lambda f: f.stem)
def test_every_committed_row_can_be_compared(file) -> None:
    for old in standings.good(read_rows(file)):
        _, value, (low, high) = leaderboard.measured(old)
        assert low <= value <= high
        assert leaderboard.verdict(old, old)[0]


def test_a_training_is_run_again_without_words_that_only_evaluation_knows(
    monkeypatch, tmp_path
) -> None:
    typed: list[str] = []
    monkeypatch.setattr(leaderboard.subprocess, "run", lambda words, **_: typed.extend(words))
    old = {**row("topk"), "command": "python train.py reducer=topk results=lost progress=false"}
    with pytest.raises(RuntimeError, match="left no row"):
        leaderboard.run_again(old, tmp_path)
    assert typed[1:3] == ["train.py", "reducer=topk"] and "results=lost" not in typed
    assert not [word for word in typed if word.startswith(("done=", "control="))]


@pytest.mark.slow  # starts Python twice
def test_a_row_is_run_again_by_its_command(tmp_path) -> None:
    command = "python eval.py weights=vit_digits limit=20 task=accuracy done=skip results=lost"
    again = leaderboard.run_again({**row("none"), "command": command}, tmp_path)
    assert again["n_images"] == 20
    assert shlex.split(again["command"])[0] == "python"
    with pytest.raises(RuntimeError, match="left no row"):
        leaderboard.run_again({**row("tome"), "command": "python eval.py nothing=1"}, tmp_path)


def test_the_committed_table_is_that_of_the_rows() -> None:
    page = leaderboard.PAGE.read_text(encoding="utf-8")
    assert leaderboard.write_tables(page) == page
    for file in sorted(leaderboard.ROWS.glob("*.jsonl")):
        for found in read_rows(file):
            assert found["dirty"] is False and found["git"] and found["command"], found["run_id"]


def test_the_quick_points_are_in_the_table() -> None:
    found = leaderboard.chosen_quickly(read_rows(leaderboard.FASHION))
    assert len(found) == 1 + len(leaderboard.QUICK)

"""The speed of every method at the leaderboard's costs: which rows count, and what a line says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import clock, jobs
from benchmarks.jobs import METHODS, Job
from benchmarks.methods_table import methods_tables
from benchmarks.speed import names_of
from reduction.registry import METHODS as REGISTERED
from zoo.results.rows import new_row

MORE = (*METHODS, "atc", "ats")


def row(one: Job, method: str, speedup: float, **more: Any) -> dict[str, Any]:
    bench = {
        "suite": "modes", "job": str(one), **one._asdict(), "mode": "inference", "kind": one.mode,
        "speedup": speedup, "ms_dense": {"dense": 30.0, "timm": 40.0},
    }  # fmt: skip
    known = {"method": method, "device": "cpu", "ms": 20.0, "imgs_per_s": 50.0, "bench": bench}
    about = {"name": "CPU", "isa": ["avx2"]}
    return new_row(**known | {"machine": about, "command": "python -m benchmarks.speed"} | more)


def run(one: Job, speedup: float, **more: Any) -> list[dict[str, Any]]:
    """A run of more than the usual methods; the first is the fastest."""
    found = [row(one, "none", 1.0, **more)]
    return found + [row(one, m, speedup - i / 100, **more) for i, m in enumerate(MORE)]


def job(batch: int, mode: str = "eager", align: int = 1, fraction: float = 0.5) -> Job:
    return Job("vit_fashion", "float32", mode, align, 1, batch, fraction=fraction)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_method_has_a_line_with_both_batch_sizes_the_fastest_first() -> None:
    rows = [*run(job(1), 1.5), *run(job(16), 2.0), *run(job(1, fraction=0.75), 1.2)]
    top1 = new_row(
        method="tome", top1=88.5, weights_dtype="bfloat16", schedule={"fraction": 0.5}, job="a"
    )
    text = methods_tables(rows, [top1, {**top1, "job": "b", "seed": 1, "top1": 89.5}])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert cells(lines[0]) == ["method", "top-1 at 50 %", "float32, 75 %", "float32, 50 %"]
    assert cells(lines[2]) == ["dense, ms per batch", "", "30.0 / –", "30.0 / 30.0"]
    assert cells(lines[3]) == ["[`tome`](methods/tome.md)", "89.00", "1.20 / –", "1.50 / 2.00"]
    names = [cells(line)[0].partition("`")[2].partition("`")[0] for line in lines[3:]]
    assert names == list(MORE)
    # What keeps as many tokens as an image asks for, noise here, is marked.
    assert [line for line in lines if "\\*" in line] == [lines[-1]]


def test_other_modes_stand_below_and_runs_of_the_usual_methods_are_left_out() -> None:
    some = [row(job(1), m, 9.0) for m in ("none", *METHODS)]
    assert "--reducers untrained" in methods_tables(some)
    rows = [
        *run(job(1), 1.5),
        *run(job(1, "openvino", 32), 1.4),
        *[{**r, "command": "another"} for r in some],
    ]
    text = methods_tables(rows)
    assert "9.00" not in text
    assert text.index("| method | top-1 at 50 % | float32, 50 % |") < text.index("In other modes")
    assert "| method | top-1 at 50 % | float32, openvino, 32, 50 % |" in text


def test_a_cost_out_of_reach_is_empty_and_a_failure_says_so() -> None:
    rows = run(job(1), 1.5) + run(job(16), 1.5)
    out = {"status": "skipped", "error": "UnreachableBudget: atc: target of 1 GMACs"}
    rows = [r if r["method"] != "atc" else {**r, **out} for r in rows]
    broken = {"status": "failed", "error": "ZooError: differs"}
    rows = [r if r["method"] != "evit" or r["batch"] else {**r, **broken} for r in rows]
    text = methods_tables(rows)
    assert "`atc`" not in text  # nothing to tell of it at any cost
    rows = [
        r | ({"status": "failed", "error": "no"} if r["method"] == "evit" else {}) for r in rows
    ]
    rows += [{**r, "status": "ok", "error": None} for r in run(job(1, fraction=0.75), 1.2)]
    line = next(line for line in methods_tables(rows).splitlines() if "`atc`" in line)
    assert cells(line)[2:] == ["1.14 / –", ""]
    line = next(line for line in methods_tables(rows).splitlines() if "`evit`" in line)
    assert cells(line)[2:] == ["1.18 / –", "failed / failed"]


def test_counts_that_cannot_be_aligned_are_empty_too() -> None:
    own = "leaves as many tokens as its pattern gives, so align=32 cannot be met; use align=1"
    cannot = {"status": "failed", "error": f"ZooError: atc {own}"}
    exported = [
        r | (cannot if r["method"] == "atc" else {}) for r in run(job(1, "openvino", 32), 1.5)
    ]
    text = methods_tables([*run(job(1), 1.5), *exported, *run(job(1, "compile"), 1.6)])
    line = next(line for line in reversed(text.splitlines()) if "`atc`" in line)
    assert cells(line)[2:] == ["1.54", ""]


def test_without_rows_of_eager_mode_the_fastest_in_another_is_first() -> None:
    text = methods_tables(run(job(16, "compile"), 1.5))
    assert "In eager mode" not in text
    names = [line.split("`")[1] for line in text.splitlines() if line.startswith("| [")]
    assert names == list(MORE)


def control(one: Job, label: str, speedup: float) -> list[dict[str, Any]]:
    made = row(one, "none", speedup)
    bench = made["bench"] | {"control": label, "efficiency": speedup / 2}
    return [row(one, "none", 1.0), made | {"command": "c", "bench": bench}]


TOP1 = {"weights_dtype": "bfloat16", "method": "none", "status": "ok", "seed": 0, "job": None}


def test_a_smaller_image_stands_among_the_methods() -> None:
    rows = [
        *run(job(1), 1.5),
        *run(job(1, fraction=0.75), 1.3),
        *control(job(1), "20 px", 1.49),
        *control(job(1, fraction=0.75), "24 px", 1.2),
        *control(job(1), "vit_fashion_small", 1.1),
    ]
    known = [
        new_row(**TOP1, backbone="vit_fashion", img_size=20, top1=89.3, command="20"),
        new_row(**TOP1, backbone="vit_fashion", img_size=24, top1=90.0, command="24"),
        new_row(**TOP1, backbone="vit_fashion_small", img_size=28, top1=89.1, command="small"),
    ]
    lines = [line for line in methods_tables(rows, known).splitlines() if line.startswith("|")]
    assert cells(lines[4]) == ["a smaller image", "89.30", "1.20", "1.49"]
    assert cells(lines[-1]) == ["`vit_fashion_small`", "89.10", "", "1.10"]


def test_by_the_clock_the_same_points_lie_elsewhere() -> None:
    rows = []
    for batch, times in ((1, 0.9), (16, 1.8)):
        found = run(job(batch), times, batch=batch)
        rows += [
            r | {"bench": r["bench"] | {"efficiency": r["bench"]["speedup"] / 2}} for r in found
        ]
        rows += [r | {"batch": batch} for r in control(job(batch), "20 px", times + 0.1)]
    whole = {**TOP1, "img_size": 28, "backbone": "vit_fashion"}
    known = [
        new_row(**whole | {"method": "tome", "schedule": {"fraction": 0.5}}, top1=88.5),
        new_row(**whole, top1=90.0, command="28"),
        new_row(**whole | {"img_size": 20}, top1=89.3, command="20"),
    ]
    promised, many, one = clock.curves(clock.SUBJECTS["clock_fashion"], rows, known)
    assert set(promised) == {"tome", "a smaller image"}  # the others have no top-1
    assert promised == {"tome": [(2.0, 88.5)], "a smaller image": [(2.0, 89.3)]}
    assert many["tome"] == [(1.8, 88.5)] and one["tome"] == [(0.9, 88.5)]
    assert one["a smaller image"] == [(1.0, 89.3)]
    pytest.importorskip("matplotlib")
    figure = clock.draw(clock.SUBJECTS["clock_fashion"], rows, known)
    said = {text.get_text() for text in figure.texts}
    assert {"ToMe", "a smaller image"} <= said and "MCTF" not in said
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(clock.PANELS)


def test_numbers_that_were_measured_twice_say_how_sure_they_are() -> None:
    usual = [row(job(1), m, 1.5, command="other") for m in ("none", *METHODS)]
    rows = run(job(1), 1.5)
    assert "in two runs" not in methods_tables(rows)
    # The second method had 1.49 in the whole run, the sixth 1.45.
    text = methods_tables([*usual, *rows])
    assert "6 of the numbers from this machine were measured in two runs" in text
    assert "by 1.7 % in the median and by 3 % at most" in text


def test_machines_are_not_mixed() -> None:
    other = {"name": "Another CPU", "isa": ["avx2"]}
    rows = run(job(1), 1.5) + run(job(16), 2.0, machine=other)
    text = methods_tables(rows)
    assert text.count("On CPU") == 1 and text.count("On Another CPU") == 1
    assert "1.50 / –" not in text and "1.50" in text and "2.00" in text


def test_untrained_are_the_methods_that_need_no_training() -> None:
    found = names_of("untrained,dtem,tome")
    assert "tome" in found and found.count("tome") == 1 and found[-1] == "dtem"
    assert "dynamicvit" not in found
    assert set(found) - {"dtem"} == {
        name for name in REGISTERED.names() if not REGISTERED.get(name).card.trained
    }
    assert set(jobs.METHODS) <= set(found)
    assert set(names_of("all")) == set(REGISTERED.names())


def test_a_number_whose_turns_lie_far_apart_is_marked() -> None:
    rows = run(job(1), 1.5)
    for one, spread in zip(rows, (0.5, 0.24, 0.26), strict=False):
        one["bench"]["spread"] = spread
    lines = [line for line in methods_tables(rows).splitlines() if line.startswith("| [")]
    assert [cells(line)[2] for line in lines[:2]] == ["1.50", "~1.49"]

"""A sweep over all methods: what each needs of a model is taken into account, and said."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

import reduction
import zoo
from tests.cases import backbone
from tests.commands import Run
from zoo.errors import NoClassToken
from zoo.results.rows import read_rows

GAP = "backbone=test_vit +backbone.args.class_token=false +backbone.args.global_pool=avg"
SWEEP = f"eval -m {GAP} task=flops control=[] hydra.sweep.dir=sweep"


def rows() -> list[dict[str, Any]]:
    return read_rows("results/local/rows.jsonl")


def test_a_method_takes_another_score_on_a_model_without_class_token(run: Run) -> None:
    code, out, err = run(f"{SWEEP} reducer=evit,ranked,zero_tprune,tome,ats")
    assert (code, err) == (0, "")
    evit, ranked, tprune, tome, ats = rows()
    assert [r["status"] for r in rows()] == ["ok"] * 4 + ["skipped"]
    assert evit["reducer"]["score_from"] == "column_mean"
    assert ranked["reducer"]["score"] == "column"
    assert tprune["reducer"]["start_from"] == "uniform"
    said = "score_from=column_mean, as the model has no class token"
    assert evit["notes"] == said and tome["notes"] is None
    assert evit["command"].endswith(" reducer.score_from=column_mean")
    assert "reducer 'ats' scores tokens by the class token" in ats["error"]
    lines = [line for line in out.splitlines() if line.startswith("test_vit")][:5]
    assert lines[0].endswith(" | reducer.score_from=column_mean") and "column" not in lines[3]
    assert lines[4].startswith("test_vit + ats | skipped: reducer 'ats' scores tokens")
    assert "1 skipped run:" in out and "FAILED" not in out
    assert "skipped: reducer" in Path("sweep/report.html").read_text(encoding="utf-8")
    # The command of the row does the same again, by itself.
    assert run(evit["command"].removeprefix("zoo "))[0] == 0
    again = rows()[-1]
    same = ("reducer", "gmacs", "tokens", "schedule", "recipe")
    assert {k: again[k] for k in same} == {k: evit[k] for k in same}


def test_what_was_chosen_for_this_model_is_an_error(run: Run) -> None:
    code, out, err = run(f"eval {GAP} task=flops reducer=evit")
    assert code == 2 and "use score_from='column_mean'" in err
    # Nor does a sweep over something else choose the method.
    code, out, err = run(f"{SWEEP} reducer=evit schedule=keep_rate schedule.rate=0.5,0.7")
    assert code == 1 and "2 jobs of the sweep failed" in err


def test_a_score_that_was_typed_stays(run: Run) -> None:
    code, out, err = run(f"{SWEEP} reducer=evit,topk ++reducer.score_from=class")
    assert code == 0 and [r["status"] for r in rows()] == ["skipped"] * 2


@pytest.mark.parametrize("name", reduction.list_methods())
def test_what_a_refusal_advises_is_accepted(name: str) -> None:
    dense = backbone("gap")
    try:
        zoo.wrap(dense, name)
    except NoClassToken as error:
        for option, value in error.instead.items():
            assert f"use {option}={value!r} (" in str(error)
        if error.instead:
            zoo.wrap(dense, {"name": name, **error.instead})
        assert pickle.loads(pickle.dumps(error)).instead == error.instead


def test_untrained_parts_are_in_the_row_and_on_the_line_not_beside_it(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    line = "weights=vit_digits schedule=keep_rate task=flops"
    code, out, err = run(f"eval -m {line} control=[] reducer=dynamicvit,tome schedule.rate=0.5,0.7")
    assert (code, err, caplog.text) == (0, "", "")
    assert [r["notes"] for r in rows()] == ["untrained reducer"] * 2 + [None] * 2
    lines = [text for text in out.splitlines() if text.startswith("vit_digits + ")]
    assert [text.endswith(" | untrained reducer") for text in lines] == [True, True, False, False]
    # Alone it is a warning.
    code, out, err = run(f"eval {line} reducer=dynamicvit")
    assert code == 0 and "holds no parameters for reducer." in caplog.text
    assert rows()[-1]["notes"] == "untrained reducer"


def test_features_alone_are_compared_without_labels(run: Run) -> None:
    headless = "backbone=test_vit +backbone.args.num_classes=0 data=synthetic limit=4"
    code, out, err = run(f"eval {headless} reducer=tome schedule.r=4 task=fidelity")
    assert code == 0, err
    [row] = rows()
    assert row["fidelity"]["cosine"] is not None and row["fidelity"]["agreement"] is None
    assert row["top1"] is None


def test_a_schedule_needs_a_reducer(run: Run) -> None:
    for line in ("schedule=keep_rate", "schedule.r=4", "schedule=target_gmacs schedule.gmacs=0.01"):
        code, out, err = run(f"eval backbone=test_vit task=flops {line}")
        assert code == 2 and "without a reducer" in err
    assert not Path("results").exists() or all(r["status"] == "failed" for r in rows())


def test_controls_of_a_sweep_say_in_their_rows_what_loading_said(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    line = "weights=vit_digits reducer=tome task=flops resolutions=[0.5]"
    code, out, err = run(f"eval -m {line} schedule.r=2,4")
    assert (code, err, caplog.text) == (0, "", "")
    notes = [r["notes"] for r in rows()]
    assert notes[:3] == [None] * 3 and "position embedding resampled from 8x8 to" in notes[3]
    # Alone it is a warning, and in the row as well.
    size = "+backbone.args.img_size=12"
    code, out, err = run(f"eval weights=vit_digits task=flops {size}")
    assert code == 0 and "resampled from 8x8 to 6x6" in caplog.text
    assert rows()[-1]["notes"] == "position embedding resampled from 8x8 to 6x6"

"""What a row is: which runs are one entry, which are compared, and with which dense model."""

import csv
import io
import random
import statistics

import pytest

from tests.test_report import dense, payload, row
from zoo.report import evidence, table, write_report
from zoo.report.compare import compare
from zoo.report.spreadsheet import csv_table
from zoo.report.tables import markdown_table
from zoo.results.rows import FIELDS, append_row, new_row

FULL, SMOKE = {"n_images": 360}, {"n_images": 20, "top1": 100.0, "ci95": [83.9, 100.0]}
SHA = {"weights_sha": "a" * 64}
OTHER = {"weights": "mine", "weights_sha": "b" * 64}


def entry(rows, **wanted):
    """The one entry that is not dense and whose row has these fields."""
    found = [e for e in compare(rows).entries if not e.dense]
    [one] = [e for e in found if all(e.row.get(k) == v for k, v in wanted.items())]
    return one


# ------------------------------------------------------------------------------ smoke runs


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_short_run_changes_nothing_for_whole_runs(when):
    whole = [dense(**FULL), row(hits=340, **FULL)]
    short = [dense(**SMOKE), row(**SMOKE)]
    rows = [*short, *whole] if when == "before" else [*whole, *short]
    assert entry(rows, n_images=360).delta == pytest.approx(entry(whole).delta)
    assert entry(rows, n_images=360).top1 == pytest.approx(340 / 3.6)
    short_views = [v for v in compare(rows).views if v.partial]
    assert [v.label for v in short_views] == ["vit_digits · digits (test), 20 images"]
    assert compare(rows).views[0].label == "vit_digits · digits (test)"
    assert "Measured on 20 images only" in " ".join(short_views[0].notes)


def test_short_runs_among_themselves_are_compared():
    rows = [dense(**SMOKE | {"top1": 95.0}), row(**SMOKE)]
    assert entry(rows).delta == pytest.approx(5.0)
    assert not compare(rows).views[0].partial  # they are all that there is


def test_a_short_run_does_not_replace_a_fidelity_or_a_measured_cost():
    whole = {"agreement": 90.0, "kl": 0.5, "cosine": 0.9, "n_images": 360}
    short = {"agreement": 100.0, "kl": 0.0, "cosine": 1.0, "n_images": 20}
    rows = [row(fidelity=whole), row(hits=None, fidelity=short, dataset="digits", split="test")]
    assert entry(rows, n_images=360).fidelity["agreement"] == 90.0
    sample = {"mean": 1.0, "min": 1.0, "max": 1.0, "limit": 3.0}
    costs = [
        row("ats", hits=None, gmacs=1.5, gmacs_sample={**sample, "images": 256}),
        row("ats", hits=None, gmacs=1.0, gmacs_sample={**sample, "images": 20}),
    ]
    judged = row("ats", gmacs=None)
    assert entry([judged, *costs]).gmacs == 1.5


def test_a_short_run_is_no_proof_that_what_failed_works():
    failed = row(status="failed", error="NaN at image 300", hits=None, dataset="digits", seed=0)
    for later, gaps in ((row(seed=0, **SMOKE), 1), (row(seed=0, **FULL), 0)):
        assert len(compare([dense(seed=0), failed, later]).gaps) == gaps


def test_evidence_knows_whole_runs_and_means_only(tmp_path):
    def half(*method, **more):
        return row(*method, gmacs=2.0, **more)

    path = tmp_path / "digits" / "rows.jsonl"
    for one in (dense(), half(seed=0, hits=340), half(seed=1, hits=350), half(**SMOKE)):
        append_row(path, one)
    append_row(path, half("evit", **SMOKE))
    append_row(path, half("topk", hits=359, **OTHER))  # with weights of somebody's own
    found = evidence.digits(tmp_path)
    scores = [340 / 3.6, 350 / 3.6]
    assert set(found) == {"tome"}
    assert found["tome"].untrained == pytest.approx(statistics.mean(scores))
    assert found["tome"].untrained_spread == pytest.approx(statistics.stdev(scores))
    assert str(found["tome"]) == "95.8 ± 2.0 / -"


# ----------------------------------------------------------------------------------- seeds


def test_runs_with_several_seeds_are_a_mean_and_a_spread():
    rows = [
        row(trained=True, task=["train", "accuracy"], seed=seed, hits=hits, weights=f"run{seed}")
        for seed, hits in enumerate((252, 324, 256))
    ]
    one = entry([dense(), *rows])
    scores = [252 / 3.6, 324 / 3.6, 256 / 3.6]
    assert one.top1 == pytest.approx(statistics.mean(scores))
    assert one.spread == pytest.approx(statistics.stdev(scores))
    assert list(one.runs) == ["seed 0", "seed 1", "seed 2"]
    assert one.delta == pytest.approx(statistics.mean(scores) - 354 / 3.6)
    assert one.interval is None and one.ends == pytest.approx((70, 90))
    for text in (table([dense(), *rows]), markdown_table(compare([dense(), *rows]), "t")):
        assert f"{one.top1:.2f} ± {one.spread:.2f}" in text
    found = list(csv.DictReader(io.StringIO(csv_table(compare(rows)))))
    assert [line["runs"] for line in found] == ["3"] * 3 == [line["runs"] for line in found]
    assert {line["current"] for line in found} == {"true"}
    assert float(found[0]["top1_spread"]) == pytest.approx(one.spread)


def test_of_the_same_seed_the_latest_run_counts():
    rows = [row(seed=0, hits=100), row(seed=1, hits=360), row(seed=0, hits=350)]
    one = entry(rows)
    assert one.scores == pytest.approx([350 / 3.6, 100.0])
    assert [r["top1"] for r, _ in compare(rows).others] == pytest.approx([100 / 3.6, 100.0])


def test_draws_of_a_reducer_are_runs_and_no_arguments():
    rows = [
        row("random", reducer={"name": "random", "seed": seed}, seed=0, hits=300 + seed)
        for seed in range(4)
    ]
    one = entry(rows)
    assert (one.name, len(one.runs)) == ("random", 4)
    assert one.top1 == pytest.approx(statistics.mean((300, 301, 302, 303)) / 3.6)


def test_an_evaluation_of_trained_weights_is_a_run_of_their_training():
    made = [
        row(trained=True, task=["train"], seed=s, weights=f"run{s}", weights_sha=str(s) * 64)
        for s in (1, 2)
    ]
    again = row(trained=True, task=["accuracy"], seed=0, hits=340, weights_sha="1" * 64)
    one = entry([*made, again])
    assert sorted(one.runs) == ["seed 1", "seed 2"]
    assert one.runs["seed 1"]["top1"] == pytest.approx(340 / 3.6)


def test_other_trainings_are_no_runs_of_the_same_setting():
    def run(seed, epochs, hits):
        training = {"epochs": epochs, "start": "vit_digits", "options": f"e{epochs}"}
        return row(trained=True, task=["train"], seed=seed, hits=hits, training=training)

    rows = [run(0, 5, 300), run(1, 5, 302), run(0, 30, 350)]
    found = {e.label: e.top1 for e in compare(rows).entries}
    assert len(found) == 2 and found["tome (trained) r=8 epochs=5"] == pytest.approx(301 / 3.6)
    # Older rows do not say it; what was typed for them does.
    old = [
        row(trained=True, task=["train"], seed=s, command=f"python train.py {more} seed={s}")
        for s, more in ((0, "trainer.max_epochs=5"), (1, "trainer.max_epochs=5"), (0, "lr=1"))
    ]
    assert sorted(len(e.runs) for e in compare(old).entries) == [1, 2]


def test_a_seed_that_failed_is_not_hidden_by_one_that_did_not():
    failed = row(status="failed", error="loss is NaN", hits=None, task=["train"], seed=1)
    good = [row(trained=True, task=["train"], seed=seed) for seed in (0, 2)]
    comparison = compare([dense(), good[0], failed, good[1]])
    assert comparison.gaps == [failed]
    assert comparison.views[0].failures == [failed]
    assert "FAILED: loss is NaN" in table([dense(), good[0], failed, good[1]])


# -------------------------------------------------------------------------- the dense model


def test_weights_are_compared_with_the_dense_model_of_the_same_weights():
    rows = [dense(**SHA), dense(hits=200, **OTHER), row(hits=350, **SHA), row(hits=199, **OTHER)]
    assert entry(rows, **SHA).delta == pytest.approx(-4 / 3.6)
    assert entry(rows, **OTHER).delta == pytest.approx(-1 / 3.6)
    lonely = [dense(**SHA), row(hits=199, **OTHER)]
    assert entry(lonely).delta is None
    assert "dense model with the weights of tome" in " ".join(compare(lonely).views[0].notes)


def test_trained_weights_are_compared_with_those_that_training_began_with():
    training = {"start": "vit_digits", "start_sha": SHA["weights_sha"], "options": "x"}
    made = {"weights": "run/model", "weights_sha": "c" * 64}
    trained = row(trained=True, task=["train"], hits=350, training=training, **made)
    # The dense model of the trained weights, and of others, measured later.
    rows = [dense(**SHA), trained, dense(hits=300, **made), dense(hits=200, **OTHER)]
    assert entry(rows).delta == pytest.approx(-4 / 3.6)
    # Where there is no other, it is said.
    [view] = compare([trained, dense(hits=300, **made)]).views
    assert view.entries[0].label == "dense weights trained with tome"
    assert "the dense model of weights that were trained with tome" in " ".join(view.notes)
    # So it is where only the row itself knows.
    [view] = compare([dense(hits=300, training={"method": "tome"}, **OTHER)]).views
    assert view.entries[0].label == "dense weights trained with tome"
    rest = [trained, dense(hits=200, **OTHER)]
    assert "tome (trained) r=8: compared with the dense model of other weights" in " ".join(
        compare(rest).views[0].notes
    )


def test_run_time_options_are_compared_with_a_dense_model_that_has_them():
    fast = {"runtime": {"fast_linear": "on"}}
    rows = [
        dense(imgs_per_s=100.0),
        dense(hits=353, imgs_per_s=150.0, **fast),
        row(hits=350, imgs_per_s=200.0),
        row(hits=349, imgs_per_s=300.0, **fast),
    ]
    plain, quick = entry(rows, runtime=None), entry(rows, **fast)
    assert plain.delta == pytest.approx(-4 / 3.6) and quick.delta == pytest.approx(-4 / 3.6)
    assert plain.speeds["cpu, float32"].speedup == pytest.approx(2.0)
    assert quick.speeds["cpu, float32, fast_linear=on"].speedup == pytest.approx(2.0)
    assert "fast_linear=on" in quick.label
    lacking = [rows[0], rows[3]]
    assert entry(lacking).speeds["cpu, float32, fast_linear=on"].speedup is None
    assert "with no run-time options" in " ".join(compare(lacking).views[0].notes)


def test_precisions_are_kept_apart_and_compared_with_their_own():
    rows = [dense(), dense(hits=340, dtype="bfloat16"), row(), row(hits=339, dtype="bfloat16")]
    assert entry(rows, dtype="bfloat16").delta == pytest.approx(-1 / 3.6)
    assert entry(rows, dtype="float32").delta == pytest.approx(-4 / 3.6)
    # Lightning calls the same precision by another name.
    assert len(compare([row(dtype="32-true", seed=0), row(seed=0)]).entries) == 1


# ------------------------------------------------------------------------------- NaN, again


def test_an_accuracy_that_is_no_number_is_a_failure():
    made = new_row(method="tome", task=["accuracy"], top1=float("nan"))
    assert (made["status"], made["top1"]) == ("failed", None)
    assert "top1 is no finite number" in made["error"]
    for lost in ({"agreement": float("inf")}, {"kl": float("nan")}):
        assert new_row(fidelity=lost)["status"] == "failed"
    # A row that was written by others, or by an older version.
    old = row(task=["accuracy"], hits=None, dataset="digits", top1=None)
    comparison = compare([dense(), old])
    assert [r["error"] for r in comparison.failed] == ["its accuracy is no number"]
    assert [e.name for e in comparison.entries] == ["dense"]


# ---------------------------------------------------------------------------------- the page


def test_there_is_one_count_of_methods(tmp_path):
    rows = [
        dense(),
        *[row(r=r) for r in (4, 8)],
        row(reducer={"name": "tome", "metric": "value"}),
        row(recipe={"plugins": [{"name": "clca"}]}),
        row(trained=True),
        row("evit"),
        dense(recipe={"plugins": [{"name": "clc"}]}),
    ]
    page = write_report(rows, tmp_path).html.read_text(encoding="utf-8")
    data = payload(page)
    assert "3 token-reduction methods on 1 backbone" in page  # tome, evit, and clc alone
    tiles = [value for view in data["views"] for tile in view["tiles"].values() for value in tile]
    assert not any("method" in text for tile in tiles for text in tile)


def test_names_lead_to_paper_code_and_documentation(tmp_path):
    page = write_report([dense(), row(), row("nobody")], tmp_path).html.read_text(encoding="utf-8")
    assert 'href="https://arxiv.org/abs/2210.09461"' in page
    assert 'href="https://github.com/facebookresearch/ToMe"' in page
    assert page.count("docs/methods/tome.md") == 1
    assert page.count('rel="noreferrer"') == 3  # and none for a method that nobody knows


def test_parameters_and_input_size_stand_in_front(tmp_path):
    rows = [dense(params_m=0.568), row(params_m=0.57, img_size=[16, 24])]
    paths = write_report(rows, tmp_path)
    head = paths.html.read_text(encoding="utf-8").partition("<thead>")[2]
    assert head.index("Input") < head.index("Params") < head.index("GMACs")
    text = paths.markdown.read_text(encoding="utf-8")
    assert "**16x24 px** | **0.57 M**" in text and "**16 px** | **0.568 M**" in text


def test_intervals_are_printed_as_they_are():
    text = table([dense(hits=359)])
    assert "98.44 – 99.95" in text and "±" not in text


def test_rows_may_hold_anything():
    junk = [None, -1, 1e400, "", "NaN", [], [[1, 2]], {}, {"name": None}, {"a": [1]}, True, 10**30]
    draw = random.Random(0)
    for _ in range(300):
        rows = [dense(), row(), row("evit", trained=True, task=["train"])]
        for one in rows:
            one.update({draw.choice(list(FIELDS)): draw.choice(junk) for _ in range(3)})
        comparison = compare(rows)
        csv_table(comparison), markdown_table(comparison, "t"), table(rows)

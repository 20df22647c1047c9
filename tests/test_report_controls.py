"""Controls of a sweep, their names in the report, and the fidelity to the dense model."""

import csv
import io
import shlex

import pytest
import torch
from torch import nn

import zoo
from tests.test_report import dense, row
from zoo.errors import ZooError
from zoo.measure.fidelity import compare_answers
from zoo.report.compare import compare
from zoo.report.controls import LONGER, RESOLUTION, SMALLER
from zoo.report.spreadsheet import csv_table
from zoo.report.tables import markdown_table
from zoo.results.rows import read_rows
from zoo.run.controls import lower_sizes

# --------------------------------------------------------------------------- the sweep's rows


def test_a_sweep_adds_the_dense_model_and_smaller_inputs_once(run, tmp_path):
    code, _, err = run(
        "eval -m weights=vit_digits reducer=tome,topk schedule=target_gmacs limit=8 "
        "resolutions=[0.75,12] task=[accuracy,fidelity] hydra.sweep.dir=sweep"
    )
    assert code == 0, err
    found = read_rows(tmp_path / "sweep" / "rows.jsonl")
    assert [(r["method"], r["img_size"]) for r in found] == [
        ("tome", 16),
        ("topk", 16),
        ("none", 16),
        ("none", 14),
        ("none", 12),
    ]
    assert len(read_rows(tmp_path / "results")) == len(found)
    assert [r["n_images"] for r in found] == [8] * 5
    measured = [r["fidelity"] for r in found]
    assert measured[2] is None  # the dense model is what others are compared with
    assert all(m["n_images"] == 8 and m["kl"] > 0 and m["cosine"] < 1 for m in measured if m)
    # The command of a control makes its row again, without a sweep.
    command = shlex.split(found[4]["command"])
    assert command[:2] == ["zoo", "eval"] and "++backbone.args.img_size=12" in command
    assert run(shlex.join(command[1:]))[0] == 0
    again = read_rows(tmp_path / "results")[-1]
    assert (again["img_size"], again["top1"]) == (12, found[4]["top1"])
    assert again["fidelity"] == pytest.approx(found[4]["fidelity"])


def test_a_dense_job_of_the_sweep_is_no_reason_for_another(run, tmp_path):
    line = "eval -m backbone=test_vit reducer=none,tome task=flops resolutions=[96] "
    assert run(line + "hydra.sweep.dir=sweep")[0] == 0
    found = read_rows(tmp_path / "sweep" / "rows.jsonl")
    assert [(r["method"], r["img_size"]) for r in found] == [
        ("none", 160),
        ("tome", 160),
        ("none", 96),
    ]
    assert found[2]["gmacs"]["total"] < found[0]["gmacs"]["total"]


def test_a_control_that_fails_leaves_its_error(run, tmp_path):
    line = "eval -m backbone=test_vit reducer=tome task=flops hydra.sweep.dir=sweep control=density"
    _, _, err = run(line)
    assert "control=density: no such control; choose from dense, resolution" in err
    [_, failed] = read_rows(tmp_path / "sweep" / "rows.jsonl")
    assert failed["status"] == "failed" and "no such control" in failed["error"]


def test_an_architecture_that_reduces_by_itself_has_no_controls(run, tmp_path):
    assert run("eval -m backbone=lookupvit_digits task=flops hydra.sweep.dir=sweep")[0] == 0
    assert [r["method"] for r in read_rows(tmp_path / "sweep")] == ["lookupvit"]


def test_lower_sizes():
    assert lower_sizes(16, 2, [0.75, 0.5, 0.35]) == [14, 12, 10]
    assert lower_sizes(224, 16, [192, 0.5, 224, 500]) == [192, 160]
    assert lower_sizes(32, 32, [0.5]) == []
    with pytest.raises(ZooError, match="shares of the patches or pixels, got -1"):
        lower_sizes(16, 2, [-1])


# -------------------------------------------------------------------------------- the report


def test_controls_have_names_and_are_measured_against_the_dense_model():
    rows = [
        dense(imgs_per_s=100.0),
        dense(img_size=12, gmacs=2.2, gmacs_dense=2.2, hits=340, imgs_per_s=150.0),
        dense(task=["train"], trained=True, weights="outputs/a", hits=357),
        dense(backbone="vit_small", gmacs=1.0, gmacs_dense=1.0, hits=330),
        dense(backbone="vit_large", gmacs=9.0, gmacs_dense=9.0, hits=359),
        row(trained=True, task=["train"], weights="outputs/b"),
    ]
    view = next(v for v in compare(rows).views if v.label.startswith("vit_digits"))
    found = {e.control: e for e in view.entries}
    assert set(found) == {None, RESOLUTION, LONGER, SMALLER}
    small = found[RESOLUTION]
    assert small.budget == "12 px" and small.saved == pytest.approx(45)
    assert small.delta == pytest.approx(-14 / 3.6)
    assert small.speeds["cpu, float32"].speedup == pytest.approx(1.5)
    assert found[SMALLER].budget == "vit_small" and found[SMALLER].saved == pytest.approx(75)
    assert found[LONGER].delta == pytest.approx(3 / 3.6)
    # Trained models too are compared with the dense model as it was given.
    assert found[None].name == "tome" and found[None].delta == pytest.approx(-4 / 3.6)
    assert view.reference.top1 == pytest.approx(354 / 3.6)
    # In the view of the larger model this one is the smaller one.
    large = next(v for v in compare(rows).views if v.label.startswith("vit_large"))
    assert sorted(e.budget for e in large.entries if e.control) == ["vit_digits", "vit_small"]
    assert len(compare(rows).entries) == len(rows)  # guests are no entries of their own


def test_dense_of_another_size_with_its_own_reduced_models_is_no_control():
    rows = [
        dense(),
        row(),
        dense(img_size=12, gmacs=2.2, hits=340),
        row(img_size=12, gmacs=1.1, hits=330, gmacs_dense=2.2),
    ]
    [view] = compare(rows).views
    assert all(e.control is None for e in view.entries)
    deltas = sorted(e.delta for e in view.entries if not e.dense)
    assert deltas == pytest.approx([-10 / 3.6, -4 / 3.6])


def test_fronts_with_and_without_training():
    rows = [dense(), row(gmacs=2.0, hits=340), row("evit", gmacs=1.9, hits=350, trained=True)]
    [view] = compare(rows).views
    assert [e.name for e in view.front] == ["evit", "dense"]
    assert [e.name for e in view.front_untrained] == ["tome", "dense"]
    lines = csv.DictReader(io.StringIO(csv_table(compare(rows))))
    assert [line["pareto_untrained"] for line in lines] == ["true", "true", "false"]


def test_speed_per_batch_size_memory_share_and_fidelity_are_columns():
    sizes = [
        {"batch": 1, "imgs_per_s": 10.0, "imgs_per_s_dense": 8.0, "peak_mem_mb": 100.0},
        {"batch": 16, "imgs_per_s": 90.0, "imgs_per_s_dense": 45.0, "peak_mem_mb": 900.0},
    ]
    gmacs = {"total": 2.0, "linear": 1.8, "attention": 0.1, "reducer": 0.1}
    fidelity = {"agreement": 97.5, "kl": 0.0512, "cosine": 0.91, "n_images": 360}
    comparison = compare([dense(), row(by_batch=sizes, fidelity=fidelity) | {"gmacs": gmacs}])
    entry = next(e for e in comparison.entries if not e.dense)
    speedups = {name: speed.speedup for name, speed in entry.speeds.items()}
    assert speedups == {"cpu, float32, batch 1": 1.25, "cpu, float32, batch 16": 2.0}
    line = next(x for x in markdown_table(comparison, "t").splitlines() if "tome" in x)
    cells = [cell.strip(" *") for cell in line.split("|")]
    for cell in ("5.0 %", "97.5 %", "0.0512", "0.910", "100 MiB", "×1.25"):
        assert cell in cells


def test_a_training_step_is_not_compared_with_inference():
    common = {"hits": None, "gmacs": 2.0, "batch": 8, "imgs_per_s_dense": 10.0}
    rows = [
        row(hits=350),
        row(**common, imgs_per_s=20.0, bench={"mode": "inference", "cuda_graphs": False}),
        row(**common, imgs_per_s=5.0, bench={"mode": "training", "cuda_graphs": False}),
        row(**common, imgs_per_s=30.0, runtime={"fast_linear": "auto"}),
    ]
    [entry] = compare(rows).entries
    assert {name: speed.rate for name, speed in entry.speeds.items()} == {
        "cpu, float32, batch 8": 20.0,
        "cpu, float32, training, batch 8": 5.0,
        "cpu, float32, fast_linear=auto, batch 8": 30.0,
    }


def test_what_failed_stands_in_the_table_until_it_succeeds():
    broken = row("topk", status="failed", error="no | way", hits=None, dataset="digits")
    comparison = compare([dense(), broken])
    [view] = comparison.views
    assert view.failures == [broken]
    assert "| topk | r=8 | FAILED: no \\| way |" in markdown_table(comparison, "t")
    assert not compare([dense(), broken, row("topk")]).views[0].failures


# ------------------------------------------------------------------------------------ fidelity


class Fixed(nn.Module):
    """Answers with what it was given, its features being the images."""

    def __init__(self, weight):
        super().__init__()
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight.data = torch.tensor(weight)

    def get_classifier(self):
        return self.head

    def forward(self, images):
        return self.head(images.flatten(1))


def test_fidelity_by_hand():
    one = Fixed([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    other = Fixed([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    images = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])[:, :, None, None]
    found = compare_answers(one, other, [(images[:2], images[:2]), (images[2:], images[2:])])
    with torch.no_grad():
        p = other.head(images.flatten(1)).double().softmax(1)
        q = one.head(images.flatten(1)).double().softmax(1)
    assert found["agreement"] == 50 and found["n_images"] == 4
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert found["cosine"] == pytest.approx(1)
    turned = torch.stack([images[:, 1], images[:, 0]], dim=1)
    assert compare_answers(one, one, [(images, turned)])["cosine"] == pytest.approx(0)
    assert compare_answers(one, other, [(images, images)], limit=1)["agreement"] == 100
    with pytest.raises(ZooError, match="at least one image"):
        compare_answers(one, other, [])


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "deit_tiny_distilled_patch16_224"])
def test_a_model_that_reduces_nothing_is_its_own_dense_model(name):
    args = {} if name.startswith("test") else {"depth": 2, "embed_dim": 48, "img_size": 64}
    torch.manual_seed(0)
    model = zoo.create_model(name, "tome", {"name": "constant_r", "r": 0}, num_classes=7, **args)
    reduced = zoo.create_model(name, "tome", {"name": "constant_r", "r": 4}, num_classes=7, **args)
    side = args.get("img_size", 160)
    images = torch.randn(3, 3, side, side)
    same = compare_answers(model, model.unwrap(), [(images, images)])
    assert same["agreement"] == 100 and same["kl"] == 0 and same["cosine"] == pytest.approx(1)
    moved = compare_answers(reduced, reduced.unwrap(), [(images, images)])
    assert 0 < moved["kl"] and moved["cosine"] < 1 - 1e-9

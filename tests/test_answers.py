"""A model that answers with NaN or infinity has no accuracy, no fidelity, no speed and no cost."""

import json

import pytest
import torch
from torch import nn

import zoo
from zoo.budget.search import ScheduleSearch
from zoo.checkpoint import save_pretrained
from zoo.errors import ZooError
from zoo.measure.accuracy import top_k
from zoo.measure.fidelity import compare_answers
from zoo.measure.throughput import interleaved, measure
from zoo.model.answers import NotFinite, check_finite
from zoo.results.rows import read_rows

CPU = torch.device("cpu")


class Spoilt(nn.Module):
    """Answers the pixels of an image, and something else where the first one is above 1."""

    def __init__(self, value=float("nan")):
        super().__init__()
        self.value = value

    def forward(self, images):
        answers = images.flatten(1).clone()
        answers[answers[:, 0] > 1, 1] = self.value
        return answers


def batches(spoilt=5, count=8, size=3):
    images = torch.rand(count, 1, 2, 2)
    if spoilt is not None:
        images[spoilt, 0, 0, 0] = 2
    labels = torch.zeros(count, dtype=torch.long)
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, count, size)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A saved model, one weight of which is NaN."""
    m = zoo.load("vit_digits")
    with torch.no_grad():
        m.backbone.head.weight[3, 0] = float("nan")
    return save_pretrained(m, tmp_path_factory.mktemp("broken") / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_such_image_is_named(value):
    with pytest.raises(NotFinite, match=r"image 5 \(cat.png\), counted from 0") as caught:
        top_k(Spoilt(value), batches(), CPU, name=lambda place: {5: "cat.png"}.get(place))
    assert caught.value.image == 5
    assert ("NaN" if value != value else "infinity") in str(caught.value)
    assert top_k(Spoilt(value), batches(None), CPU)[2] == 8
    assert top_k(Spoilt(value), batches(), CPU, limit=5)[2] == 5  # it is not looked at


def test_fidelity_is_measured_on_numbers_of_both_models():
    pairs = [(x, x) for x, _ in batches()]
    whole, spoilt = Spoilt(0.0), Spoilt()
    with pytest.raises(NotFinite, match="the model answers image 5"):
        compare_answers(spoilt, whole, pairs)
    with pytest.raises(NotFinite, match="the dense model answers image 5"):
        compare_answers(whole, spoilt, pairs)


def test_nothing_is_timed_that_answers_with_nan():
    class Nan(nn.Module):
        def forward(self, images):
            return images.flatten(1) * float("nan")

    options = {"input_size": (1, 2, 2), "batch": 2, "rounds": 1, "min_time": 1e-4}
    with pytest.raises(NotFinite, match=r"the model answers image 0 \(random numbers\)"):
        measure(Nan(), **options)
    with pytest.raises(NotFinite, match="the dense model"):
        measure(nn.Flatten(), Nan(), **options)
    with pytest.raises(NotFinite):
        interleaved([Nan()], torch.rand(1, 1, 2, 2), 1)


def test_no_cost_is_measured_and_no_schedule_found_on_nan(broken):
    images = torch.rand(4, 1, 16, 16)
    with pytest.raises(NotFinite):
        zoo.profile(zoo.load(broken, reducer="ats"), images=images)
    search = ScheduleSearch(zoo.load(broken, reducer="tome"), [images], evaluations=2)
    with pytest.raises(NotFinite):
        search.run()


@pytest.mark.parametrize("task", ["accuracy", "fidelity", "throughput"])
def test_the_row_has_failed_and_knows_what_it_is_of(run, broken, tmp_path, task):
    quick = "throughput.rounds=1" if task == "throughput" else ""
    code, _, err = run(f"eval weights={broken} reducer=tome schedule.r=4 task={task} {quick}")
    assert code == 2 and err.startswith("error: the model answers image 0")
    [row] = read_rows(tmp_path / "results")
    assert row["status"] == "failed" and "image 0" in row["error"] and "NaN" in row["error"]
    assert (row["method"], row["backbone"], row["schedule"]["r"]) == ("tome", "vit_digits", 4)
    assert row["gmacs"]["total"] > 0 and len(row["weights_sha"]) == 64
    assert row["top1"] is row["fidelity"] is row["imgs_per_s"] is None
    assert row["dataset"] == (None if task == "throughput" else "digits")


def test_a_sweep_goes_on_and_its_report_shows_the_failure(run, broken, tmp_path):
    code, out, err = run(
        f"eval -m weights=vit_digits,{broken} reducer=tome schedule.r=4 task=accuracy limit=20 "
        "control=[] hydra.sweep.dir=sweep"
    )
    assert code == 1 and "1 job of the sweep failed" in err
    assert [row["status"] for row in read_rows(tmp_path / "sweep")] == ["ok", "failed"]
    assert "FAILED: the model answers image 0" in out
    assert "1 failed run" in (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")


def test_labels_that_no_answer_can_meet_are_no_errors_of_the_model():
    for label, words in (
        (-1, "image 4, counted from 0, has no label"),
        (4, "label 4, the model 4"),
    ):
        given = batches(None)
        given[1][1][1] = label
        with pytest.raises(ZooError, match=words):
            top_k(nn.Flatten(), given, CPU)


def test_numbers_are_no_reason_to_complain():
    check_finite(torch.zeros(0, 3))
    check_finite(torch.tensor([[1e30, -1e30]]))


def test_json_of_a_failed_row_is_plain(run, broken, tmp_path):
    run(f"eval weights={broken} task=accuracy")
    text = (tmp_path / "results" / "local" / "rows.jsonl").read_text()
    assert "NaN" not in text.replace("with NaN", "") and json.loads(text)["status"] == "failed"


def test_the_file_is_named_also_behind_a_damaged_one(run, broken, tmp_path):
    from PIL import Image

    for name in range(10):
        folder = tmp_path / "data" / "val" / str(name)
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("L", (16, 16), 10 * name).save(folder / f"{i}.png")
    (tmp_path / "data" / "val" / "0" / "0.png").write_bytes(b"\x89PNG and no more")
    for task in ("accuracy", "fidelity"):
        line = f"eval weights={broken} reducer=tome schedule.r=4 task={task} data=folder"
        code, _, err = run(f"{line} data.root={tmp_path}/data data.num_workers=0")
        assert code == 2, err
        assert f"image 0 ({tmp_path}/data/val/0/1.png), counted from 0" in err.replace("\n", " ")

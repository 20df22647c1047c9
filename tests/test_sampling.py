"""The cost of methods that keep a different number of tokens in every image."""

from __future__ import annotations

import shlex

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import reduction
import zoo
from tests.cases import METHODS, Row, backbone, images, model
from tests.families import TINY, family
from tests.test_naflex import batch
from zoo.cli.main import main
from zoo.cost.counters import torch_gmacs
from zoo.errors import ZooError
from zoo.report.compare import compare
from zoo.report.spreadsheet import csv_table
from zoo.report.tables import table
from zoo.report.words import summary_line
from zoo.results.rows import new_row, read_rows

ADAPTIVE = [r for r in METHODS if isinstance(reduction.create(**r.reducer()), reduction.Adaptive)]
rows = pytest.mark.parametrize("row", ADAPTIVE, ids=lambda r: r.id)


@rows
@pytest.mark.parametrize("name", ["plain", "map"])
def test_a_sample_is_the_mean_of_images_alone(row: Row, name: str) -> None:
    """Padding is not counted: each image costs what it costs when it runs by itself."""
    try:
        m = model(row, name)
    except ZooError:
        return
    x = images(4)
    found = zoo.profile(m, images=x)
    alone = [zoo.profile(m, images=x[i : i + 1]) for i in range(4)]
    for one, image in zip(alone, x, strict=True):
        with torch.no_grad():
            _, info = m(image[None], return_info=True)
        assert one.tokens == list(info.tokens)
        assert one.sample.min == one.sample.max == one.gmacs
    costs = [one.gmacs for one in alone]
    assert found.sample.images == 4
    assert found.gmacs == found.sample.mean == pytest.approx(sum(costs) / 4)
    assert (found.sample.min, found.sample.max) == (min(costs), max(costs))
    assert found.gmacs == pytest.approx(found.linear + found.attention + found.reducer)
    limit = zoo.profile(m)
    assert found.sample.limit == limit.gmacs >= max(costs) and limit.sample is None
    assert found.dense == limit.dense and found.params == limit.params


@rows
def test_the_sample_stays_within_a_target(row: Row) -> None:
    m = backbone("plain")
    target = 0.6 * zoo.profile(m).gmacs
    schedule = {"name": "target_gmacs", "gmacs": target}
    if not reduction.create(**row.reducer()).limited:
        with pytest.raises(ZooError, match="below what family"):
            zoo.wrap(m, row.reducer(), schedule)
        return
    reduced = zoo.wrap(m, row.reducer(), schedule).eval()
    sample = zoo.profile(reduced, images=images(3)).sample
    assert sample.min <= sample.mean <= sample.max <= sample.limit <= target


def test_a_measured_cost_is_that_of_a_schedule_with_the_same_counts() -> None:
    """Whatever made the tokens leave."""
    free = {"name": "avit", "scale": 3.0, "center": 2.0}
    m = zoo.wrap(backbone("plain"), free, {"name": "keep_rate", "rate": 1.0}).train()
    with torch.no_grad():
        m.backbone.cls_token[..., 0] -= 20.0  # the class token stays, or nothing else does
    found = zoo.profile(m, images=images(1))
    keep = [n - 1 for _, n in found.tokens]
    schedule = {"name": "per_block", "keep": [k if k < 64 else None for k in keep]}
    fixed = zoo.wrap(backbone("plain"), {"name": "avit", "center": 1e4}, schedule)
    assert found.gmacs == pytest.approx(zoo.profile(fixed).gmacs)
    assert found.gmacs < 0.9 * zoo.profile(m).gmacs


class Above(reduction.Adaptive, reduction.Reducer):
    """A toy: tokens stay whose first channel is positive."""

    site = "mid"

    def assign(self, t, s, step):
        order = t.patches[..., 0].argsort(dim=1, descending=True)[:, : step.keep]
        valid = t.patches[..., 0].gather(1, order) > 0
        valid = valid if t.mask is None else valid & t.mask[:, t.prefix :].gather(1, order)
        longest = max(1, int(valid.sum(1).max()))
        return reduction.Keep(order[:, :longest], valid[:, :longest])


def test_a_short_last_block_is_cheaper_by_what_it_leaves_out() -> None:
    x = images(3)
    whole = zoo.profile(zoo.wrap(backbone("plain"), Above()).eval(), images=x)
    m = zoo.wrap(backbone("plain"), Above(), last_block="class_token").eval()
    short = zoo.profile(m, images=x)
    assert short.gmacs < whole.gmacs and short.sample.min < short.sample.max
    assert short.sample.limit == zoo.profile(m).gmacs
    assert short.tokens[:-1] == whole.tokens[:-1] and short.tokens[-1][1] == 1


def test_other_methods_cost_the_same_with_and_without_images() -> None:
    m = zoo.wrap(backbone("plain"), "topk")
    assert zoo.profile(m, images=images()) == zoo.profile(m)


@pytest.mark.parametrize("name", ["naflex", "dynamic"])
@pytest.mark.parametrize("reducer", ["tome", None])
def test_images_of_several_sizes_cost_what_each_does(name: str, reducer: str | None) -> None:
    if name == "dynamic":
        dense = VisionTransformer(dynamic_img_size=True, **TINY).eval()
    else:
        dense = family(name)
    m = zoo.wrap(dense, reducer, {"name": "constant_r", "r": 2} if reducer else None)
    small, large = torch.randn(3, 3, 16, 20), torch.randn(1, 3, 32, 24)
    for x in (small, large):
        found = zoo.profile(m, images=x)
        assert found == zoo.profile(m, img_size=tuple(x.shape[2:])) and found.sample is None
        assert found.gmacs == pytest.approx(torch_gmacs(m, x), rel=1e-6)
    each = [zoo.profile(m, images=x) for x in (small, large)]
    both = zoo.profile(m, images=[small, large, large[:0]])
    assert both.gmacs == pytest.approx((3 * each[0].gmacs + each[1].gmacs) / 4)
    assert both.gmacs == pytest.approx(both.linear + both.attention + both.reducer)
    assert both.dense == pytest.approx((3 * each[0].dense + each[1].dense) / 4)
    assert both.sample[1:4] == (each[0].gmacs, each[1].gmacs, 4)
    assert both.tokens[0][0] == round((3 * each[0].tokens[0][0] + each[1].tokens[0][0]) / 4)


@pytest.mark.parametrize("reducer", ["tome", "dtome"])
def test_a_padded_batch_costs_what_its_images_do(reducer: str) -> None:
    alone, given = batch()
    m = zoo.wrap(family("naflex"), reducer).eval()
    found, costs = zoo.profile(m, images=given), [zoo.profile(m, images=x).gmacs for x in alone]
    assert len(set(costs)) > 1
    assert found.gmacs == found.sample.mean == pytest.approx(sum(costs) / len(alone))
    assert (found.sample.min, found.sample.max) == (min(costs), max(costs))
    assert zoo.profile(m, images=[given, given]).gmacs == pytest.approx(found.gmacs)


def test_images_that_a_model_refuses_cost_nothing_that_could_be_told() -> None:
    m = zoo.wrap(backbone("plain"), "tome")
    with pytest.raises(ZooError, match="expected images of 32x32, got 48x48"):
        zoo.profile(m, images=images(2, 48))
    with pytest.raises(ZooError, match="expected images, a tensor .*, got dict"):
        zoo.profile(m, images=batch()[1])
    with pytest.raises(ZooError, match="at least one image"):
        zoo.profile(m, images=[])
    with pytest.raises(ZooError, match="leave img_size"):
        zoo.profile(m, images=images(2), img_size=32)


def test_what_cannot_be_measured_is_said() -> None:
    m = zoo.wrap(backbone("plain"), "ats").train()
    with pytest.raises(ZooError, match="at least one image"):
        zoo.profile(m, images=images(2)[:0])
    with pytest.raises(ZooError, match="leave img_size"):
        zoo.profile(m, images=images(2), img_size=32)
    with pytest.raises(ZooError, match="leave convention"):
        zoo.profile(m, images=images(2), convention="diffrate")
    assert m.training  # as before


def test_the_printed_profile_names_the_spread() -> None:
    text = str(zoo.profile(zoo.wrap(backbone("plain"), "ats"), images=images(3)))
    assert "mean of 3 images" in text and "upper limit" in text


@pytest.mark.parametrize("task", ["flops", "[accuracy,flops]", "accuracy"])
def test_eval_measures_on_the_evaluation_images(task, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"eval weights=vit_digits reducer=ats limit=24 task={task}"
    assert main(shlex.split(line)) == 0
    [row] = read_rows(tmp_path / "results" / "local" / "rows.jsonl")
    sample = row["gmacs_sample"]
    assert sample["images"] == 24 and row["gmacs"]["total"] == sample["mean"]
    assert sample["min"] < sample["mean"] < sample["max"] <= sample["limit"]
    assert row["gmacs_fvcore"] is None
    assert "[0.0" in capsys.readouterr().out


def test_untrained_weights_and_other_methods_keep_the_exact_count(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split("eval backbone=test_vit reducer=ats task=flops")) == 0
    assert main(shlex.split("eval weights=vit_digits reducer=tome limit=8")) == 0
    found = read_rows(tmp_path / "results" / "local" / "rows.jsonl")
    assert [row["gmacs_sample"] for row in found] == [None, None]
    assert all(row["gmacs_fvcore"] for row in found)


def _row(**known: object) -> dict[str, object]:
    sample = {"mean": 0.5, "min": 0.4, "max": 0.6, "images": 10, "limit": 0.8}
    gmacs = {"total": 0.5, "linear": 0.4, "attention": 0.1, "reducer": 0.0}
    return new_row(
        **{
            "method": "ats",
            "backbone": "b",
            "gmacs": gmacs,
            "gmacs_sample": sample,
            "gmacs_dense": 1.0,
            **known,
        }
    )


def test_the_spread_is_in_summary_and_report() -> None:
    assert "0.5000 [0.4000, 0.6000] GMACs (-50.0 %)" in summary_line(_row())
    comparison = compare([_row(top1=50.0)])
    header, line = csv_table(comparison).splitlines()
    cells = dict(zip(header.split(","), line.split(","), strict=False))
    assert (cells["gmacs_min"], cells["gmacs_max"], cells["gmacs_limit"]) == ("0.4", "0.6", "0.8")
    assert "0.5000 [0.4000, 0.6000]" in table([_row(top1=50.0)])
    old = _row()
    del old["gmacs_sample"]  # rows written before the field was there
    assert "0.5000 GMACs (-50.0 %)" in summary_line(old)


def test_a_throughput_belongs_to_a_measured_cost_of_the_same_limit() -> None:
    limit = {"total": 0.8, "linear": 0.7, "attention": 0.1, "reducer": 0.0}
    speed = {"gmacs": limit, "gmacs_sample": None, "imgs_per_s": 100.0, "device": "cpu"}
    [entry] = compare([_row(top1=50.0), _row(**speed)]).entries
    assert entry.gmacs == 0.5 and len(entry.speeds) == 1
    other = {**speed, "gmacs": {**limit, "total": 0.5}}
    [entry] = compare([_row(top1=50.0), _row(**other)]).entries
    assert not entry.speeds

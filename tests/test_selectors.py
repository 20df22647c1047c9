"""What every selector must do, whatever it chooses by."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import reduction
from reduction import Selection, ZooError, retained_count, retained_mask, select
from tests.selector_cases import EXTRAS, SELECTOR_CASES, signals

NAMES = sorted(SELECTOR_CASES)
HARD = [(name, hard) for name in NAMES for hard in (0, 1)]
GRID = (6, 6)


def run(name: str, hard: int, keep: Any, given: dict[str, Tensor], grid: Any = GRID) -> Selection:
    return select(
        keep=keep, method={"name": name, **SELECTOR_CASES[name][hard]}, grid=grid, **given
    )


def same(one: Selection, other: Selection) -> None:
    for what, a, b in zip(Selection._fields, one, other, strict=True):
        if what == "features":
            assert torch.allclose(a, b, atol=1e-6), what
        else:
            assert torch.equal(a, b), what


def test_every_selector_has_a_row_here() -> None:
    assert reduction.list_selectors() == NAMES
    assert len(NAMES) >= 15


@pytest.mark.parametrize(("name", "hard"), HARD)
@pytest.mark.parametrize("keep", [2, 7, 13, 30, 35])
def test_exactly_k_tokens_in_ascending_order(name: str, hard: int, keep: int) -> None:
    given = signals()
    got = run(name, hard, keep, given)
    extra = EXTRAS.get(name, 0) if hard else 0
    assert got.features.shape == (2, keep, 12)
    assert got.features.isfinite().all()
    assert got.indices.dtype == torch.int64
    assert (got.valid == keep).all()
    for image in got.indices:
        patches = image[image >= 0]
        assert len(patches) == keep - extra
        assert (patches.diff() > 0).all()
        assert 0 <= patches.min() and patches.max() < 36
    assert retained_mask(got).sum(1).tolist() == [keep - extra] * 2
    # A kept patch is in its own row; nothing is said to be in a row that does not exist.
    assert got.slot.shape == (2, 36) and got.slot.min() >= -1 and got.slot.max() < keep
    rows = torch.arange(keep).expand(2, -1)
    held = got.indices >= 0
    assert torch.equal(got.slot.gather(1, got.indices.clamp_min(0))[held], rows[held])
    # The method's own order names the same patches.
    assert torch.equal(got.order.sort(1).values, got.indices[held].view(2, -1))


@pytest.mark.parametrize(("name", "hard"), HARD)
def test_every_image_by_itself_and_every_time_the_same(name: str, hard: int) -> None:
    given = signals(5)
    whole = run(name, hard, 12, given)
    same(whole, run(name, hard, 12, given))
    for i in (0, 3):
        alone = run(name, hard, 12, {k: v[i : i + 1] for k, v in given.items()})
        same(alone, Selection(*(part[i : i + 1] for part in whole)))


@pytest.mark.parametrize(("name", "hard"), HARD)
@pytest.mark.parametrize("keep", [36, 50])
def test_as_many_as_there_are_changes_nothing(name: str, hard: int, keep: int) -> None:
    given = signals()
    got = run(name, hard, keep, given)
    assert torch.equal(got.features, given["features"])
    assert torch.equal(got.indices, torch.arange(36).expand(2, -1))
    assert retained_mask(got).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_enough(name: str) -> None:
    got = run(name, 0, 1, signals())
    assert got.features.shape == (2, 1, 12) and got.features.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 3), (3, 7), (7, 1), (13, 1), (5, 6)])
def test_small_and_odd_grids(name: str, grid: tuple[int, int]) -> None:
    given = signals(grid=grid)
    n = grid[0] * grid[1]
    for keep in {1, max(1, n // 2), n - 1, n} - {0}:
        got = run(name, 0, keep, given, grid)
        assert got.features.shape == (2, keep, 12) and got.features.isfinite().all()
        assert retained_mask(got).sum(1).tolist() == [keep] * 2


@pytest.mark.parametrize(("name", "hard"), HARD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_in_float32_whatever_comes_in(name: str, hard: int, dtype: torch.dtype) -> None:
    given = {k: v.to(dtype) for k, v in signals().items()}
    got = run(name, hard, 12, given)
    assert got.features.dtype == dtype
    if dtype == torch.float64:
        return
    exact = run(name, hard, 12, {k: v.float() for k, v in given.items()})
    assert torch.equal(got.indices, exact.indices) and torch.equal(got.order, exact.order)
    assert torch.allclose(got.features.float(), exact.features, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_to_choose_by_there_are_still_k_different_tokens(name: str) -> None:
    given = {k: torch.ones_like(v) for k, v in signals().items()}
    one_hot = torch.zeros_like(given["cls_row"])
    one_hot[:, :, 20] = 1
    for row in (given["cls_row"] / 37, one_hot):
        for x in (given["features"], torch.zeros_like(given["features"])):
            now = {**given, "features": x, "cls_row": row, "column": row.mean(1)}
            got = run(name, 0, 10, now)
            assert got.features.isfinite().all()
            assert retained_mask(got).sum(1).tolist() == [10, 10]


@pytest.mark.parametrize("name", ["fastervlm", "hired", "prumerge", "vispruner"])
def test_of_equal_scores_the_lower_index_wins(name: str) -> None:
    given = signals()
    given = {k: v for k, v in given.items() if k != "q"}
    given["cls_row"] = torch.full_like(given["cls_row"], 1 / 37)
    options = {"important": 1.0} if name == "vispruner" else {}
    got = select(keep=9, method=name, **given, **options)
    assert got.indices.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize(("name", "hard"), HARD)
def test_gradients_pass_through_the_features_alone(name: str, hard: int) -> None:
    given = {k: v.requires_grad_() for k, v in signals().items()}
    got = run(name, hard, 12, given)
    got.features.square().sum().backward()
    grad = given["features"].grad
    assert grad is not None and grad.isfinite().all()
    kept = retained_mask(got)
    assert (grad[kept].abs().sum(-1) > 0).all()
    assert all(v.grad is None for k, v in given.items() if k not in ("features", "class_token"))


@pytest.mark.parametrize(("name", "hard"), HARD)
def test_prefix_tokens_are_no_candidates(name: str, hard: int) -> None:
    if name in ("prumerge", "prumerge_plus"):
        pytest.skip("reads queries and keys of the prefix tokens")
    one, five = signals(prefix=1), signals(prefix=5)
    for key in ("cls_row", "cls_row_shallow", "column", "column_shallow"):
        five[key] = torch.cat([five[key][..., :5], one[key][..., 1:]], -1)
    five |= {"features": one["features"], "class_token": one["class_token"]}
    five["k"] = torch.cat([five["k"][:, :, :5], one["k"][:, :, 1:]], 2)
    same(run(name, hard, 12, one), run(name, hard, 12, five))


@pytest.mark.parametrize(("name", "hard"), HARD)
def test_options_are_written_and_read_again(name: str, hard: int) -> None:
    made = reduction.create_selector(name, **SELECTOR_CASES[name][hard])
    config = made.config()
    assert config["name"] == name
    again = reduction.create_selector(config)
    assert again.config() == config
    assert pickle.loads(pickle.dumps(made)).config() == config
    assert copy.deepcopy(made).config() == config
    for key, value in SELECTOR_CASES[name][hard].items():
        assert config[key] == value
    card = type(made).card
    assert card.title and card.venue and card.training == "none"
    assert name == "random" or (card.arxiv and card.code and card.licence)


@pytest.mark.parametrize(("name", "hard"), HARD)
def test_the_count_before_is_the_count_after(name: str, hard: int) -> None:
    options = SELECTOR_CASES[name][hard]
    for grid in ((6, 6), (4, 9)):
        given, n = signals(grid=grid), 36
        for removed in (0, 0.1, 0.5, 0.9):
            count = retained_count(n, removed, name, grid=grid, **options)
            assert count == max(1, int(n * (1 - removed)))
            if removed and count > EXTRAS.get(name, 0):
                got = run(name, hard, 1 - removed, given, grid)
                assert got.features.shape[1] == count


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name: str) -> None:
    given = signals(grid=(4, 4))
    torch._dynamo.reset()
    made = reduction.create_selector(name, **SELECTOR_CASES[name][0])

    def chosen(**given: Tensor) -> Selection:
        return select(keep=6, method=made, grid=(4, 4), **given)

    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    same(compiled(**given), chosen(**given))


@pytest.mark.parametrize("name", NAMES)
def test_exports(name: str) -> None:
    given = signals(grid=GRID)
    made = reduction.create_selector(name, **SELECTOR_CASES[name][0])

    class Choose(torch.nn.Module):
        def forward(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            got = select(keep=6, method=made, grid=GRID, **given)
            return got.features, got.indices

    program = torch.export.export(Choose(), ({k: v for k, v in given.items()},))
    features, indices = program.module()(given)
    got = select(keep=6, method=made, grid=GRID, **given)
    assert torch.equal(indices, got.indices) and torch.allclose(features, got.features, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep must be a number of tokens from 1"),
        ({"keep": 1.5}, "share in"),
        ({"keep": True}, "keep must be"),
        ({"keep": None}, "needs keep"),
        ({"method": "vision_zip"}, "did you mean 'visionzip'"),
        ({"features": torch.zeros(2, 36)}, "features must be"),
        ({"features": torch.zeros(2, 36, 12, dtype=torch.int64)}, "floating-point"),
        ({"grid": (5, 7)}, "grid must be"),
        ({"cls_row": torch.zeros(2, 3, 20)}, "cls_row must be"),
        ({"cls_row": [1.0]}, "must be a tensor"),
        ({"k": torch.zeros(1, 3, 37, 4)}, "k must be"),
        ({"k": None}, "visionzip needs k="),
        ({"cls_row": None, "column": None}, "visionzip needs cls_row"),
        ({"group": 3}, "group must be 1, 4, 9"),
        ({"alpha": 0.5}, "neither an option"),
        ({"contextual": "max"}, "contextual must be one of"),
        ({"compat": "paper"}, "compat must be one of"),
        ({"targets": 40}, "lower targets"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"keep": 12, "method": "visionzip", **signals(), **change}
    with pytest.raises(ZooError, match=message) as error:
        select(**call)
    assert "\n" not in str(error.value)


def test_groups_are_chosen_by_the_mean_of_their_patches() -> None:
    given = signals(grid=(6, 8), width=5)
    row = given["cls_row"][:, :, 1:].mean(1).view(2, 3, 2, 4, 2).mean((2, 4)).flatten(1)
    merged = torch.randn(2, 12, 5)
    got = select(merged, 5, "fastervlm", cls_row=given["cls_row"], group=4, grid=(6, 8))
    assert torch.equal(got.order, row.argsort(dim=1, descending=True, stable=True)[:, :5])
    # The same patches, group after group.
    runs = given["cls_row"][:, :, 1:].view(2, 3, 3, 2, 4, 2).transpose(3, 4).flatten(2)
    other = select(merged, 5, "fastervlm", cls_row=runs, group=4, group_order="runs", grid=(6, 8))
    assert torch.equal(other.order, got.order)
    more = {k: v for k, v in given.items() if k != "features"}
    for name in NAMES:
        both = select(merged, 5, name, grid=(6, 8), group=4, **more)
        assert both.features.shape == (2, 5, 5)


def test_without_attention_some_go_on_features_alone() -> None:
    x = signals()["features"]
    for name in ("scope", "divprune", "dpp", "apet", "random"):
        assert select(x, 9, name).features.shape == (2, 9, 12)
    for name in ("fastervlm", "vispruner", "holov", "hired", "prunesid"):
        with pytest.raises(ZooError, match="tower without class token"):
            select(x, 9, name)


def test_received_attention_stands_in_for_the_class_row() -> None:
    given = signals()
    column = given["column"][:, 1:]
    got = select(given["features"], 9, "fastervlm", column=given["column"])
    assert torch.equal(got.order, column.argsort(dim=1, descending=True, stable=True)[:, :9])


def test_what_a_tower_is_asked_for() -> None:
    assert reduction.signals_of("fastervlm", 24) == (("cls_row", 22),)
    assert reduction.signals_of("visionzip", 24) == (("cls_row", 22), ("k", 22))
    assert reduction.signals_of("visionzip", 12, class_token=False) == (("column", 10), ("k", 10))
    assert reduction.signals_of("hiprune", 24) == (("column_shallow", 8), ("column", 22))
    assert reduction.signals_of("vscan", 24) == (("cls_row_shallow", 5), ("cls_row", 22))
    assert reduction.signals_of("prumerge", 24) == (("q", 23), ("k", 23))
    assert reduction.signals_of("divprune", 24) == ()
    assert reduction.signals_of("hired", 24, crops=[2, 2])[0] == ("cls_row_shallow", 0)
    for name in NAMES:
        for depth in (1, 2, 3, 12):
            blocks = [b for _, b in reduction.signals_of(name, depth)]
            assert all(0 <= b < depth for b in blocks)


def test_adaptive_selectors_pad_and_say_how_many_are_valid() -> None:
    given = signals(4)
    for name in ("prumerge", "prumerge_plus"):
        got = select(keep=20, method=name, adaptive=True, **given)
        assert got.features.shape == (4, 20, 12)
        for i, count in enumerate(got.valid.tolist()):
            assert 1 <= count <= 20
            assert (got.indices[i, :count] >= 0).all() and (got.indices[i, count:] == -1).all()
            assert (got.features[i, count:] == 0).all()
            alone = {k: v[i : i + 1] for k, v in given.items()}
            assert select(keep=20, method=name, adaptive=True, **alone).valid.tolist() == [count]
        free = select(keep=None, method=name, adaptive=True, **given)
        assert free.features.shape[1] == free.valid.max()


def test_crops_share_a_budget_by_region() -> None:
    grid = (8, 8)
    given = signals(5, grid)
    shallow = torch.full((5, 2, 65), 1e-3)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:4, 4:] = True
    shallow[0, :, 1:][:, corner.flatten()] = 1.0
    given["cls_row_shallow"] = shallow
    call: dict[str, Any] = {"keep": 0.2, "method": "hired", "grid": grid, **given}
    ours = select(crops=[2, 2], alpha=0.75, **call)
    total = int(5 * 64 * 0.2)
    assert ours.valid.tolist() == [48, 0, 16, 0, 0] and int(ours.valid.sum()) == total
    assert torch.equal(retained_mask(ours).sum(1), ours.valid)
    official = select(crops=[2, 2], alpha=0.75, compat="official", **call)
    assert official.valid.tolist() == [48, 8, 8, 0, 0]
    # More than a crop holds goes on to the others.
    much = select(crops=[2, 2], alpha=0.1, **{**call, "keep": 0.5})
    assert much.valid.sum() == 160 and much.valid.max() <= 64


def test_official_defects_are_there_on_demand_and_repaired_by_default() -> None:
    given = signals(1, (12, 12))
    x = given["features"]
    # Duplicates: the official DivPrune repeats itself.
    double = torch.cat([x[:, :8]] * 18, 1)
    assert select(double, 32, "divprune", compat="official").indices.unique().numel() < 32
    assert select(double, 32, "divprune").indices.unique().numel() == 32
    # More picks than the features have directions.
    flat = torch.randn(1, 144, 6, generator=torch.Generator().manual_seed(0))
    assert select(flat, 20, "dpp", compat="official").indices.unique().numel() < 20
    assert select(flat, 20, "dpp").indices.unique().numel() == 20
    # Windows that do not divide their share.
    few = select(keep=11, method="vscan", compat="official", **given)
    assert (
        few.features.shape[1]
        == 10
        == retained_count(144, 1 - 11.5 / 144, "vscan", compat="official")
    )
    assert select(keep=11, method="vscan", **given).features.shape[1] == 11
    # A segment with more budget than patches.
    a = torch.full((1, 144), 1e-4)
    a[:, :9] = 1
    zeros = select(x, 72, "holov", cls_row=a, compat="official")
    assert int((zeros.indices < 0).sum()) > 0
    assert (zeros.features[zeros.indices < 0] == 0).all()
    assert select(x, 72, "holov", cls_row=a).indices.min() >= 0
    # HoloV's diversity weight does nothing.
    one, other = (
        select(keep=40, method="holov", compat="official", beta=b, **given) for b in (0.0, 10.0)
    )
    assert torch.equal(one.indices, other.indices)
    with pytest.raises(ZooError, match="cannot halve"):
        select(keep=11, method="vispruner", compat="official", **given)


def test_a_merged_token_of_visionzip_is_a_sum_unless_a_mean_is_asked_for() -> None:
    given = signals()
    call: dict[str, Any] = {"keep": 12, "method": "visionzip", "targets": 3, **given}
    summed, mean = select(**call), select(contextual="mean", **call)
    assert torch.equal(summed.indices, mean.indices)
    x = given["features"]
    for i in range(2):
        targets = summed.order[i, 9:]
        for t in targets.tolist():
            row = summed.indices[i].tolist().index(t)
            members = (summed.slot[i] == row).nonzero().flatten()
            others = [m for m in members.tolist() if m != t]
            expected = x[i, t] + (x[i, others].mean(0) if others else 0)
            assert torch.allclose(summed.features[i, row], expected, atol=1e-5)
            assert torch.allclose(mean.features[i, row], x[i, members].mean(0), atol=1e-5)

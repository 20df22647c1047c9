"""Images of very different lengths run in groups, and nobody but the clock can tell."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import reduction
import zoo
from benchmarks import buckets as benchmark
from reduction.mixins.calibrating import Calibrates
from reduction.tokens import Tokens
from tests.cases import METHODS, Row, backbone, images, model, refused
from tests.covering import crossed
from zoo.model import buckets
from zoo.model.reduced import ReducedViT
from zoo.results.rows import read_rows

ADAPTIVE = [r for r in METHODS if isinstance(reduction.create(**r.reducer()), reduction.Adaptive)]
PIXELS = {"name": "pixelprune"}
#: Without padding between blocks: all tokens are there, or the schedule alone says how many.
WHOLE = ("adavit", "flowcut")
STAGES = {"name": "keep_rate", "rate": 0.9, "blocks": [1, 3]}


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the groups that were formed, where any difference of length is worth one."""
    for name in ("ROWS", "CALLS", "MARGIN"):
        monkeypatch.setattr(buckets, name, 0.0)
    monkeypatch.setattr(buckets, "STEP", 1)
    found: list[int] = []
    real = buckets._cut

    def noted(t: Tokens, chosen: Sequence[int], *rest: Any) -> Tokens:
        found.append(len(chosen))
        return real(t, chosen, *rest)

    monkeypatch.setattr(buckets, "_cut", noted)
    yield found


def flat_from(*columns: int) -> Tensor:
    """Images, each of one colour from a column on."""
    x = images(len(columns))
    for image, column in zip(x, columns, strict=True):
        image[:, :, column:] = image[:, :1, :1]
    return x


MANY = flat_from(32, 4, 20, 8, 32, 12)


def uneven(row: Row, name: str) -> ReducedViT:
    """A model in which thresholds let every image keep as many tokens as it needs."""
    m = model(row, name)
    reducer: Any = m.reducer
    if isinstance(reducer, Calibrates):
        reducer.set_thresholds([0.9, 0.8, 0.8, 0.7])
    elif reducer.name in ("ltp", "ltm", "ltmp"):
        with torch.no_grad():
            for threshold in reducer.parameters():
                threshold.fill_(0.9 if threshold is reducer.merge_threshold else 1 / 66)
    elif reducer.name == "asvit":
        m = zoo.wrap(backbone(name), row.reducer(), STAGES)
        with torch.no_grad():
            m.reducer.thresholds.fill_(0.014)  # type: ignore[union-attr, operator]
    elif reducer.name == "flowcut" and reducer.target is not None:
        m = zoo.wrap(backbone(name, depth=7), {**row.reducer(), "target": 10})
    elif reducer.name == "avit":
        reducer.scale, reducer.center = 3.0, 2.0
    return m.eval()


@pytest.mark.parametrize(("row", "name"), crossed(ADAPTIVE, ["plain", "eva02"], lambda _: ""))
def test_groups_answer_as_one_image_at_a_time(row: Row, name: str, formed: list[int]) -> None:
    if refused(row, name):
        pytest.skip("this method does not run on this model")
    m = uneven(row, name)
    with torch.no_grad():
        alone = torch.cat([m(x[None]) for x in MANY])
        expected, before = m.set_runtime(buckets=1)(MANY, return_info="trace")
        assert not formed
        logits, info = m.set_runtime(buckets=4)(MANY, return_info="trace")
        again = m(MANY)
    ragged = [t.mask is not None and not bool(t.mask.all()) for t in before.trace]
    assert bool(formed) == any(ragged[:-1]) and (formed or row.id.startswith(WHOLE))
    for other in (alone, expected, again):
        torch.testing.assert_close(logits, other, atol=1e-5, rtol=0)
    assert info.tokens == before.tokens
    assert torch.equal(info.source, before.source)
    for t, old in zip(info.trace, before.trace, strict=True):
        _same(t, old)


def _same(t: Tokens, old: Tokens) -> None:
    real = torch.ones_like(old.size, dtype=torch.bool) if old.mask is None else old.mask
    assert torch.equal(real if t.mask is None else t.mask, real)
    assert (t.prefix, t.unit, t.grid) == (old.prefix, old.unit, old.grid)
    torch.testing.assert_close(t.x[real], old.x[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(t.size[real], old.size[real])
    if old.origin is not None:
        assert t.origin is not None
        patches = real[:, old.prefix :]
        assert torch.equal(t.origin[patches], old.origin[patches])
    assert t.memory.keys() == old.memory.keys()
    assert all(t.memory[k].shape == v.shape for k, v in old.memory.items())


def test_the_order_of_the_batch_stays(formed: list[int]) -> None:
    m = zoo.wrap(backbone("plain"), PIXELS).eval().set_runtime(buckets=3)
    with torch.no_grad():
        expected = m(MANY)
        for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
            torch.testing.assert_close(m(MANY[order]), expected[order], atol=1e-5, rtol=0)
    assert sum(formed) == 3 * len(MANY) and len(formed) <= 9


@pytest.mark.parametrize("restore", ["merged", "nearest"])
def test_features_and_a_shorter_last_block(formed: list[int], restore: str) -> None:
    m = zoo.wrap(backbone("plain"), PIXELS, last_block="class_token").eval()
    with torch.no_grad():
        grouped = m(MANY), m.forward_features(MANY)
        _, maps = m.forward_intermediates(MANY, restore=restore)
        assert formed
        m.set_runtime(buckets=1)
        torch.testing.assert_close(grouped[0], m(MANY), atol=1e-5, rtol=0)
        assert grouped[1].shape == m.forward_features(MANY).shape
        expected = m.forward_intermediates(MANY, restore=restore)[1]
    for found, old in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, old, atol=1e-5, rtol=0)


def test_costs_are_what_they_were(formed: list[int]) -> None:
    m = zoo.wrap(backbone("plain"), PIXELS)
    grouped = zoo.profile(m, images=MANY)
    assert formed
    assert grouped == zoo.profile(m.set_runtime(buckets=1), images=MANY)


# ------------------------------------------------------------------ who must not notice


def _hooked_inside(m: ReducedViT) -> None:
    part: nn.Module = m.backbone.blocks[2].mlp.fc1  # type: ignore[union-attr, index, assignment]
    part.register_forward_hook(lambda *_: None)


def _together(m: ReducedViT) -> None:
    m.reducer.together = lambda: True  # type: ignore[union-attr, assignment]


@pytest.mark.parametrize(
    "change", [_hooked_inside, _together, ReducedViT.train], ids=lambda f: f.__name__
)
def test_who_looks_at_a_whole_batch_gets_one(change: Any, formed: list[int]) -> None:
    m = zoo.wrap(backbone("plain"), PIXELS).eval()
    change(m)
    with torch.no_grad():
        m(MANY)
    assert not formed


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_gradients_graphs_plugins_and_single_images_are_in_one_piece(formed: list[int]) -> None:
    m = zoo.wrap(backbone("plain"), PIXELS).eval()
    m(MANY)
    with torch.no_grad():
        m(MANY[:1])
        torch.jit.trace(m, MANY, check_trace=False)
        with FlopCounterMode(display=False):
            m(MANY)
        zoo.wrap(backbone("plain"), PIXELS, plugins=["clc"]).eval()(MANY)
    assert not formed


class Counted(reduction.Adaptive, reduction.Reducer):
    """A toy that remembers something of every token, and does not say so."""

    site = "mid"

    def assign(self, t: Tokens, s: Any, step: Any) -> reduction.Keep:
        order = t.patches[..., 0].argsort(dim=1, descending=True)
        valid = t.patches[..., 0].gather(1, order) > 0.4
        valid[:, 0] = True
        longest = int(valid.sum(1).max())
        return reduction.Keep(order[:, :longest], valid[:, :longest])

    def reduce(self, t: Tokens, s: Any, step: Any) -> Tokens:
        out = super().reduce(t, s, step)
        return out._replace(memory={"score": out.x[..., 0]})


@pytest.mark.parametrize("says", [False, True])
def test_memory_is_cut_only_where_a_method_says_what_it_is(says: bool, formed: list[int]) -> None:
    reducer = Counted()
    if says:
        reducer.by_token = frozenset({"score"})
    m = zoo.wrap(backbone("plain"), reducer, {"name": "keep_rate", "rate": 0.9, "blocks": [1]})
    with torch.no_grad():
        logits, info = m.eval()(MANY, return_info="trace")
        expected, old = m.set_runtime(buckets=1)(MANY, return_info="trace")
    assert bool(formed) == says
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    real = old.final.mask
    torch.testing.assert_close(info.final.memory["score"][real], old.final.memory["score"][real])


# ------------------------------------------------------------------ how they are cut


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "lengths", [[9, 9, 9], [1, 2, 50, 51, 100, 3], [64, 80, 96, 128, 160, 192]]
)
def test_cuts_are_the_cheapest_there_are(lengths: list[int], most: int) -> None:
    ends, best = buckets.cuts(lengths, most, 384, 8)
    levels = sorted({-(-n // 8) * 8 for n in lengths})
    assert ends[-1] == levels[-1] and len(ends) <= most

    def total(chosen: Sequence[int]) -> float:
        counts = [
            sum(low < n <= high for n in lengths) for low, high in itertools.pairwise((0, *chosen))
        ]
        return sum(buckets.cost(c, n, 384) for c, n in zip(counts, chosen, strict=True))

    tried = (
        (*some, levels[-1]) for k in range(most) for some in itertools.combinations(levels[:-1], k)
    )
    assert best == pytest.approx(min(map(total, tried))) == pytest.approx(total(ends))


def test_similar_lengths_and_small_batches_stay_together() -> None:
    assert buckets.cuts([190, 180, 185, 197], 4, 384, 8)[0] == [200]
    assert buckets.cuts([50, 65], 4, 64, 8)[0] == [72]
    assert len(buckets.cuts([64, 80, 96, 112, 128, 144, 160, 192] * 2, 4, 384, 16)[0]) > 2


def test_bfloat16_groups_are_as_long_as_kernels_want(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "ROWS", 0.0)
    monkeypatch.setattr(buckets, "CALLS", 0.0)
    lengths: list[int] = []
    real = buckets._cut
    monkeypatch.setattr(buckets, "_cut", lambda *a: (lengths.append(a[2]), real(*a))[1])
    m = zoo.wrap(backbone("plain"), PIXELS).eval().bfloat16()
    with torch.no_grad():
        m(MANY.bfloat16())
    assert lengths and all(n % 16 == 0 or n == max(lengths) for n in lengths)


# ------------------------------------------------------------------ the benchmark


def test_the_benchmark_writes_rows_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "CASES", benchmark.CASES[:1])
    monkeypatch.setattr(benchmark, "keep_pages", lambda: False)  # of this process, for good
    path, threads = tmp_path / "rows.jsonl", str(torch.get_num_threads())
    words = ["--backbone", "test_vit", "--batch", "4", "--rounds", "1", "--threads", threads]
    assert benchmark.main([*words, "--results", str(path)]) == 0
    found = read_rows(path)
    assert [r["runtime"]["buckets"] for r in found] == [1, 2, 4] * 2
    assert all(r["machine"]["name"] and r["ms"] > 0 for r in found)
    assert all(r["bench"]["error"] < 1e-5 for r in found if r["weights_dtype"] is None)
    lengths = found[0]["bench"]["lengths"]
    assert len(lengths) == 4 and lengths[0] < lengths[-1] / 2
    text = benchmark.table(found)
    assert text in capsys.readouterr().out
    assert len(text.splitlines()) == 4 and f"| {lengths[0]}, " in text

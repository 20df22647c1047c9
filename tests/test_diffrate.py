"""DiffRate with real removal: a slow reference, published schedules, what must not matter."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import hydra.utils
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

import reduction
import zoo
from reduction import Budget, Signals, Step, Tokens
from reduction.functional.diffrate_cost import effective_counts
from reduction.functional.matching import most_similar
from reduction.methods.diffrate import DiffRate
from tests.cases import backbone, images
from zoo.adapters.hollow import hollow
from zoo.errors import UnsupportedModel, ZooError
from zoo.published import config_folder
from zoo.report.words import summary_line
from zoo.results.rows import new_row

PUBLISHED = json.loads(
    (Path(__file__).parent / "golden/diffrate_compression_rates.json").read_text()
)
OPTIONS = {
    "ViT-T-DeiT": "deit_tiny",
    "ViT-S-DeiT": "deit_small",
    "ViT-B-DeiT": "deit_base",
    "ViT-B-MAE": "mae_base",
    "ViT-L-MAE": "mae_large",
    "ViT-H-MAE": "mae_huge",
}
CASES = [
    (model, option, target)
    for model, option in OPTIONS.items()
    for target in PUBLISHED[model]["schedules"]
]


def per_block(prune: list[int], merge: list[int]) -> dict[str, object]:
    return {"name": "per_block", "keep": merge, "prune": prune, "prefix": 1}


def wrap(prune: list[int], merge: list[int], name: str = "plain", **args: object):
    schedule = per_block(prune, merge)
    return zoo.wrap(backbone(name), {"name": "diffrate", **args}, schedule).eval()


def state(batch: int = 2, n: int = 12, width: int = 6, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    t = Tokens.start(torch.randn(batch, 1 + n, width, generator=g), 1, track=True)
    t = t._replace(size=1 + torch.rand(batch, 1 + n, generator=g))
    row = torch.rand(batch, 3, 1 + n, generator=g).softmax(-1)
    return t, Signals(cls_row=row)


def slow(t: Tokens, s: Signals, prune: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The method in loops: features, sizes, slot of each patch. Counts without the class token."""
    features, sizes, slots = [], [], []
    for b in range(t.x.shape[0]):
        score = s.cls_row[b].mean(0)[1:].tolist()
        order = sorted(range(len(score)), key=lambda i: -score[i])[:prune]
        x, size = t.x[b, 1:], t.size[b, 1:]
        groups = {i: [i] for i in order[:keep]}
        total = {i: size[i].item() for i in order[:keep]}
        for i in order[keep:]:
            cosine = {d: torch.cosine_similarity(x[i], x[d], 0).item() for d in groups}
            best = max(cosine, key=lambda d: cosine[d])
            groups[best].append(i)
            total[best] += cosine[best] * size[i].item()
        slot = torch.full((len(score),), -1)
        for place, members in enumerate(groups.values()):
            slot[members] = place
        features.append(torch.stack([x[m].mean(0) for m in groups.values()]))
        sizes.append(torch.tensor(list(total.values())))
        slots.append(slot)
    return torch.stack(features), torch.stack(sizes), torch.stack(slots)


@pytest.mark.parametrize(("prune", "keep"), [(12, 12), (9, 9), (12, 5), (10, 4), (20, 7), (6, 1)])
def test_equals_the_slow_reference(prune: int, keep: int) -> None:
    t, s = state()
    step = Step(1, 4, Budget(keep, prune), (3, 4))
    out = DiffRate(sort_always=True).reduce(t, s, step)
    x, size, slot = slow(t, s, min(prune, 12), keep)
    assert torch.allclose(out.x[:, 1:], x, atol=1e-6)
    assert torch.allclose(out.size[:, 1:], size, atol=1e-6)
    assert torch.equal(out.source, slot)
    assert torch.equal(out.x[:, 0], t.x[:, 0]) and torch.equal(out.size[:, 0], t.size[:, 0])


def test_prune_share_splits_what_leaves() -> None:
    t, s = state()
    for share, dropped in ((0.0, 0), (0.5, 4), (1.0, 8)):
        out = DiffRate(prune_share=share).reduce(t, s, Step(1, 4, Budget(4), (3, 4)))
        assert out.n == 4 and (out.source == -1).sum(1).tolist() == [dropped] * 2


def test_most_similar_in_half_precision_does_not_overflow() -> None:
    source, goal = torch.randn(2, 5, 64) * 300, torch.randn(2, 7, 64) * 300
    index, cosine = most_similar(source, goal)
    half, similarity = most_similar(source.half(), goal.half())
    assert torch.equal(index, half) and torch.allclose(cosine, similarity, atol=5e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (most_similar(source, goal)[1] - cosine).abs().max() < 2e-2
    zero = torch.zeros(2, 1, 64)
    assert most_similar(zero, goal)[1].abs().max() == 0


# -- properties ------------------------------------------------------------------------------------


def test_everything_kept_is_the_dense_model() -> None:
    m = backbone("plain")
    full = zoo.wrap(m, {"name": "diffrate", "sort_always": True}, per_block([65] * 4, [65] * 4))
    with torch.no_grad():
        assert (full.eval()(images()) - m(images())).abs().max() < 1e-5
        skipping = zoo.wrap(m, "diffrate", per_block([65] * 4, [65] * 4)).eval()
        assert (skipping(images()) - m(images())).abs().max() == 0


def test_pruning_leaves_sizes_at_one_and_merging_loses_nobody() -> None:
    with torch.no_grad():
        _, pruned = wrap([65, 50, 40, 30], [65, 65, 65, 65])(images(), return_info="trace")
        _, merged = wrap([65] * 4, [65, 50, 40, 30])(images(), return_info="trace")
    assert all(t.unit and (t.size == 1).all() for t in pruned.trace)
    assert all((t.source >= 0).all() and (t.size[:, 0] == 1).all() for t in merged.trace)
    # Similarity scales what is added, so sizes fall short of the patches they stand for.
    assert merged.size.sum(1).max() < 65


def test_sorting_where_nothing_leaves_changes_nothing() -> None:
    lists = [65, 60, 60, 40], [65, 50, 60, 30]
    with torch.no_grad():
        always, info = wrap(*lists, sort_always=True)(images(), return_info=True)
        gap = (wrap(*lists)(images()) - always).abs().max()
    assert gap < 1e-5 and list(info.tokens) == wrap(*lists).token_counts()


def test_the_last_block_only_costs() -> None:
    a, b = wrap([65, 50, 40, 40], [65, 45, 40, 40]), wrap([65, 50, 40, 20], [65, 45, 40, 3])
    with torch.no_grad():
        assert (a(images()) - b(images())).abs().max() < 1e-5
    assert zoo.profile(b).gmacs < zoo.profile(a).gmacs


def test_the_last_block_matters_where_patches_are_pooled() -> None:
    lists = [[65, 50, 40, 40], [65, 45, 40, 40]], [[65, 50, 40, 20], [65, 45, 40, 3]]
    with torch.no_grad():
        a, b = (wrap(*both, name="mae")(images()) for both in lists)
    assert (a - b).abs().max() > 1e-3


def test_the_order_of_patches_does_not_matter() -> None:
    m = wrap([65, 50, 40, 30], [65, 45, 40, 25])
    g = torch.Generator().manual_seed(3)
    order = torch.randperm(64, generator=g)
    with torch.no_grad():
        x = m.backbone._pos_embed(m.backbone.patch_embed(images()))
        results = []
        for index in (torch.arange(64), order):
            start = torch.cat([x[:, :1], x[:, 1:][:, index]], 1)
            m.backbone._pos_embed = lambda _, start=start: start
            results.append(m(images(), return_info=True))
    (a, one), (b, two) = results
    assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(two.source, one.source[:, order])


def test_effective_counts_are_the_minimum() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        prune, merge = torch.randint(2, 80, (2, 4), generator=g).tolist()
        counts = wrap(prune, merge).token_counts()
        assert [n for _, n in counts] == effective_counts(65, prune, merge)


def test_more_tokens_never_cost_less_in_the_papers_count() -> None:
    prune, merge = [65, 55, 40, 30], [65, 50, 45, 25]
    base = zoo.profile(wrap(prune, merge), convention="diffrate").macs
    for which in (prune, merge):
        for block in range(4):
            which[block] += 1
            assert zoo.profile(wrap(prune, merge), convention="diffrate").macs >= base
            which[block] -= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_do_not_depend_on_precision(dtype: torch.dtype) -> None:
    m = wrap([65, 58, 46, 33], [65, 50, 38, 27]).to(dtype)
    with torch.no_grad():
        logits, info = m(images().to(dtype), return_info=True)
    assert logits.isfinite().all() and [n for _, n in info.tokens] == [65, 50, 38, 27]


def test_opposite_tokens_do_not_end_in_nan() -> None:
    """A source that points away takes size away; the official code takes the log of it."""
    t = Tokens.start(torch.tensor([[[1.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 1e-3]]]), 1)
    s = Signals(cls_row=torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(1, 3, 4))
    out = DiffRate().reduce(t, s, Step(1, 4, Budget(1, 3), (1, 3)))
    assert out.size[0, 1] < 0  # as defined, and as an average over patches would use it
    from reduction.functional.attention import attention_bias

    assert attention_bias(out.size, None).isfinite().all()
    positive = torch.tensor([[1.0, 0.25, 1e-6]])
    assert torch.equal(attention_bias(positive, None)[0, 0, 0], positive[0].log())


def test_counts_of_the_class_token_alone_are_refused() -> None:
    with pytest.raises(ZooError, match="at least 2"):
        wrap([65, 50, 40, 30], [65, 50, 40, 1])


def test_training_with_fixed_counts_removes_tokens() -> None:
    m = wrap([65, 50, 40, 30], [65, 45, 40, 25]).train()
    logits, info = m(images(), return_info=True)
    assert [n for _, n in info.tokens] == [65, 45, 40, 25]
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("name", ["registers", "distilled", "dinov2", "eva02"])
def test_prefix_tokens_stay(name: str) -> None:
    m = backbone(name)
    schedule = {"name": "per_block", "keep": [64, 40, 30, 20], "prune": [64, 50, 30, 30]}
    reduced = zoo.wrap(m, "diffrate", schedule).eval()
    with torch.no_grad():
        logits, info = reduced(images(), return_info="trace")
    assert logits.isfinite().all()
    assert [n - m.num_prefix_tokens for _, n in info.tokens] == [64, 40, 30, 20]
    assert all((t.size[:, : t.prefix] == 1).all() for t in info.trace)


@pytest.mark.parametrize(
    "args", [{"prune_share": 1.5}, {"prune_share": True}, {"sort_always": 1}, {"score_from": "x"}]
)
def test_arguments_out_of_range_are_refused(args: dict[str, object]) -> None:
    with pytest.raises(ZooError, match=next(iter(args))):
        reduction.create("diffrate", **args)


# -- published schedules ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@functools.cache
def ghost(name: str) -> torch.nn.Module:
    """A model without weights."""
    with hollow():
        pool = {"global_pool": "avg"} if name.endswith(".mae") else {}
        return timm.create_model(name, num_classes=1000, **pool)


def test_every_published_vit_schedule_ships() -> None:
    files = {p.stem for p in (config_folder() / "schedule" / "diffrate").glob("*.yaml")}
    assert files == {f"{option}_{target}" for _, option, target in CASES}
    assert len(files) == 28


@pytest.mark.parametrize(
    ("model", "option", "target"), CASES, ids=[f"{o}_{t}" for _, o, t in CASES]
)
def test_published_schedule(model: str, option: str, target: str, configs: None) -> None:
    entry = PUBLISHED[model]["schedules"][target]
    overrides = [f"schedule=diffrate/{option}_{target}", f"backbone={option}", "reducer=diffrate"]
    cfg = compose("eval", overrides)
    schedule = hydra.utils.instantiate(cfg.schedule)
    assert schedule.keep == entry["merge_kept"] and schedule.prune == entry["prune_kept"]
    model = zoo.wrap(ghost(cfg.backbone.name), hydra.utils.instantiate(cfg.reducer), schedule)
    found = zoo.profile(model, convention="diffrate")
    assert found.macs == entry["macs_exact"]
    assert [n for _, n in found.tokens] == entry["tokens_after_block"]


def test_both_counts_are_reported(configs: None) -> None:
    from zoo.measure.describe import describe
    from zoo.run.evaluate import count_costs

    net = ghost("deit_small_patch16_224")
    schedule = PUBLISHED["ViT-S-DeiT"]["schedules"]["2.9"]
    model = zoo.wrap(net, "diffrate", per_block(schedule["prune_kept"], schedule["merge_kept"]))
    row = new_row(**describe(model), **count_costs(model, trace=False))
    assert row["gmacs_paper"]["convention"] == "diffrate"
    assert row["gmacs_paper"]["total"] == pytest.approx(2.905256448)
    assert row["gmacs_paper"]["dense"] == pytest.approx(4.599177216)
    assert "2.910 GMACs (-36.7 %), 2.905 GMACs as diffrate counts" in summary_line(row)
    plain = zoo.wrap(net, "tome", {"name": "constant_r", "r": 13})
    assert count_costs(plain, trace=False)["gmacs_paper"] is None


def test_caformer_is_refused() -> None:
    with hollow(), pytest.raises(UnsupportedModel, match="in stages"):
        zoo.create_model("caformer_s36", reducer="diffrate")

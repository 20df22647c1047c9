"""DiffRate's search: proxies, masks and cost with their gradients, and the training around them."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

import zoo
from reduction.functional.diffrate_cost import effective_counts, vit_macs
from reduction.functional.diffrate_search import (
    Cost,
    RateProxies,
    ceil_through,
    search_macs,
    straight_mask,
)
from tests.cases import backbone, images
from zoo.errors import ZooError
from zoo.lit.diffrate_search import DiffRateSearch, cost_of
from zoo.published import config_folder
from zoo.run.train import train

SMALL = Cost.of_vit(197, 384, 16, 12)  # DeiT-S


@pytest.fixture(autouse=True)
def keep_signal_handler():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def proxies(patches: int = 20, depth: int = 4, granularity: int = 1, seed: int = 0) -> RateProxies:
    rates = RateProxies(patches, depth, granularity)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rates.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return rates


# -- proxies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "granularity", "kept"),
    [(196, 4, 101), (196, 2, 100), (196, 1, 100), (256, 4, 131), (256, 2, 130), (256, 1, 130)],
)
def test_untrained_counts(patches: int, granularity: int, kept: int) -> None:
    rates = RateProxies(patches, 3, granularity)
    counts = [patches, kept - 1, kept - 1]
    assert rates.counts() == (counts, counts)
    rates = rates.half()  # the counts are still computed in full precision
    assert rates.counts() == (counts, counts)


@pytest.mark.parametrize(
    ("gmacs", "start", "width", "patch", "depth", "free"),
    [
        (0.691, 197, 192, 16, 12, (0,)),
        (2.568, 197, 384, 16, 12, (0,)),
        (9.877, 197, 768, 16, 12, (0,)),
        (32.886, 197, 1024, 16, 24, (0, 23)),
        (87.572, 257, 1280, 14, 32, (0, 31)),
    ],
)
def test_untrained_costs(gmacs, start, width, patch, depth, free) -> None:
    rates = RateProxies(start - 1, depth, 4, free)
    cost = Cost.of_vit(start, width, patch, depth)
    found = search_macs(rates().kept, start - 1, cost).item() / 1e9
    assert found == pytest.approx(gmacs, abs=5e-4)


@pytest.mark.parametrize("granularity", [1, 3, 7])
def test_one_certain_candidate_is_the_count(granularity: int) -> None:
    rates = RateProxies(20, 2, granularity)
    for k, count in enumerate(range(20, 0, -granularity)):
        with torch.no_grad():
            for z in (rates.prune[1], rates.merge[1]):
                z.zero_()[k] = 200.0
        assert rates.counts() == ([20, count], [20, count])


def test_keep_probabilities() -> None:
    for granularity in (1, 4):
        rates = proxies(granularity=granularity)
        kept, probability = rates()
        share = torch.stack([z.double().softmax(0) for z in [*rates.prune, *rates.merge][1:4]])
        expected = (share * rates.candidates()).sum(1)
        assert torch.allclose(probability[0, 1:].sum(1).double(), expected, atol=1e-4)
        assert torch.equal(kept[0, 1:], expected.ceil())
        assert (probability.diff(dim=-1) <= 1e-7).all()
        assert torch.allclose(probability[..., 0], torch.ones(2, 4))
        assert torch.equal(probability[:, 0], torch.ones(2, 20))  # the block without a choice


def test_gradients_of_counts_and_masks_are_the_closed_forms() -> None:
    rates = proxies()
    z = rates.merge[2]
    share, c = z.detach().double().softmax(0), rates.candidates()
    e = (share * c).sum()
    (grad,) = torch.autograd.grad(rates().kept[1, 2], z)
    assert torch.allclose(grad.double(), share * (c - e), atol=1e-6)

    w = torch.randn(20, generator=torch.Generator().manual_seed(1))
    probability = rates().probability[1, 2]
    mask = straight_mask(probability, 8, 14)
    assert mask.tolist() == [1.0] * 8 + [0.0] * 6 + [1.0] * 6
    (grad,) = torch.autograd.grad((w * mask).sum(), z)
    below = (torch.arange(20)[None] < c[:, None]).double()  # [i < c_k] by candidate and rank
    mean = (share[:, None] * below).sum(0)
    closed = share * (w.double() * (below - mean)).sum(1)
    assert torch.allclose(grad.double(), closed, atol=1e-6)


def test_ceiling_ignores_rounding() -> None:
    x = torch.tensor([3.0, 3.0 + 1e-12, 3.001], dtype=torch.float64, requires_grad=True)
    y = ceil_through(x)
    assert y.tolist() == [3.0, 3.0, 4.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1.0] * 3


# -- cost ------------------------------------------------------------------------------------------


def test_cost_is_the_papers_integer() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        kept = torch.randint(1, 220, (2, 12), generator=g)
        counts = effective_counts(197, (kept[0] + 1).tolist(), (kept[1] + 1).tolist())
        found = search_macs(kept.double(), 196, SMALL)
        assert found.item() == vit_macs(counts, 197, 384, 16)


def test_cost_of_a_model_is_its_profile() -> None:
    g = torch.Generator().manual_seed(0)
    for name in ("plain", "registers", "gap", "mae", "eva02"):
        m = zoo.wrap(backbone(name), {"name": "diffrate", "score_from": "column_mean"})
        cost = cost_of(m)
        for _ in range(3):
            kept = torch.randint(1, 70, (2, 4), generator=g)
            prune, merge = (kept + m.prefix).tolist()
            lists = {"keep": merge, "prune": prune, "prefix": m.prefix}
            m.schedule = zoo.wrap(
                m.backbone, "random", {"name": "per_block", **lists, "strict": False}
            ).schedule
            macs = zoo.profile(m, convention="diffrate").macs
            assert search_macs(kept.double(), 64, cost).item() == pytest.approx(macs, abs=0.5)


def test_cost_gradient_is_the_closed_form() -> None:
    rates = proxies(196, 12)
    kept = rates().kept
    grads = torch.autograd.grad(search_macs(kept, 196, SMALL), [*rates.prune, *rates.merge])
    n = [c - 1 for c in effective_counts(197, *((kept.detach() + 1).long().tolist()))]
    c = rates.candidates()
    for i, (z, grad) in enumerate(zip([*rates.prune, *rates.merge], grads, strict=True)):
        block = i % 12
        if block == 0:
            assert grad.tolist() == [0.0]
            continue
        # In full to both counts, also to the one that is not the smaller; none to earlier blocks.
        slope = 8 * 384**2 + (block < 11) * (4 * 384**2 + 4 * (n[block] + 1) * 384)
        share = z.detach().double().softmax(0)
        closed = slope * share * (c - (share * c).sum())
        assert torch.allclose(grad.double(), closed, rtol=1e-4, atol=1e-3 * closed.abs().max())


def descend(granularity: int, target: float, steps: int) -> tuple[dict[int, float], RateProxies]:
    rates = RateProxies(196, 12, granularity)
    optimizer = torch.optim.AdamW(rates.parameters(), lr=0.01, weight_decay=0.0)
    seen = {}
    for step in range(steps):
        gmacs = search_macs(rates().kept, 196, SMALL) / 1e9
        seen[step] = gmacs.item()
        optimizer.zero_grad()
        (5 * (gmacs - target).square()).backward()
        optimizer.step()
    return seen, rates


# GMACs after so many steps as the official formula goes, the cross-entropy left out.
TABLE = [
    (1, 2.9, {0: 2.547, 10: 2.649, 100: 2.896, 300: 2.896, 1000: 2.896, 1499: 2.896}, 117, 117),
    (1, 1.5, {0: 2.547, 10: 2.445, 100: 1.822, 300: 1.525, 1000: 1.487, 1499: 1.505}, 48, 47),
    (1, 4.0, {0: 2.547, 10: 2.649, 100: 3.334, 300: 3.862, 1000: 4.012, 1499: 3.992}, 169, 169),
    (4, 2.9, {0: 2.568, 10: 2.670, 100: 2.896, 300: 2.896, 1000: 2.896, 1499: 2.896}, 117, 117),
]


@pytest.mark.parametrize("steps", [101, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", TABLE, ids=lambda c: f"g{c[0]}-{c[1]}")
def test_search_for_cost_alone(case, steps: int) -> None:
    granularity, target, table, count, last = case
    seen, rates = descend(granularity, target, steps)
    for step, gmacs in table.items():
        if step < steps:
            assert seen[step] == pytest.approx(gmacs, abs=0.025), step
    prune, merge = rates.counts()
    assert prune == merge and prune[0] == 196 and rates.prune[0].tolist() == [0.0]
    if steps == 1500:
        # One token in all blocks is 0.02 GMACs, which the search hovers around.
        assert all(abs(c + 1 - count) <= 1 for c in prune[1:11]) and abs(prune[11] + 1 - last) <= 1


# -- masked forward --------------------------------------------------------------------------------


def searching(name: str = "plain", uncompressed=(0,), prune=None, merge=None, **args: object):
    """A frozen model in training mode whose counts are (nearly) certain."""
    m = zoo.wrap(backbone(name), {"name": "diffrate", **args}, {"name": "keep_rate"})
    rates = m.reducer.begin_search(64, m.depth, 1, uncompressed)
    with torch.no_grad():
        for vectors, counts in ((rates.prune, prune), (rates.merge, merge)):
            for z, count in zip(vectors, counts or [64] * m.depth, strict=True):
                if len(z) > 1:
                    # Three neighbours, so that there is a gradient, with an exact expectation.
                    z.fill_(-60.0)
                    low, high = max(0, 63 - count), min(63, 65 - count)
                    z[64 - count], z[low], z[high] = 2.0, 0.0, 0.0
    m.backbone.requires_grad_(False)
    return m.train(), rates


def removed(m, prune: list[int], merge: list[int]):
    lists = {"keep": [c + m.prefix for c in merge], "prune": [c + m.prefix for c in prune]}
    return zoo.wrap(m.backbone, m.reducer.config() | {"search": None}, {
        "name": "per_block", **lists, "prefix": m.prefix
    }).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "mae", "registers", "distilled", "dinov3"])
def test_pruning_by_mask_is_pruning(name: str) -> None:
    counts = [64, 50, 40, 30]
    m, rates = searching(name, prune=counts)
    assert rates.counts()[0] == counts
    masked, info = m(images(), return_info="trace")
    assert all(t.n == 64 for t in info.trace)
    for t, count in zip(info.trace[1:], counts[1:], strict=True):
        assert set(t.policy.unique().tolist()) == {0.0, 1.0}
        assert (t.policy.sum(1) == count + m.prefix).all() and (t.size == 1).all()
    with torch.no_grad():
        gap = (removed(m, counts, [64] * 4)(images()) - masked).abs().max()
    assert gap < 1e-4


def test_merging_by_mask_differs_by_the_clamp_only() -> None:
    prune, merge = [64, 60, 50, 40], [64, 50, 45, 30]
    m, _ = searching(prune=prune, merge=merge)
    with torch.no_grad():
        masked, info = m(images(), return_info="trace")
        real, after = removed(m, prune, merge)(images(), return_info="trace")
    assert 1e-3 < (masked - real).abs().max() < 1
    first, second = info.trace[1], after.trace[1]
    assert torch.allclose(first.x[:, :51], second.x[:, :51], atol=1e-5)
    # Newcomers count at least one here, and their cosine there.
    grown = second.size > 1
    assert (first.size[:, :51][grown] > second.size[grown] + 1e-4).any()
    assert (first.size >= 1).all()


def grads(m, rates: RateProxies) -> dict[str, Tensor | None]:
    loss = m(images()).square().mean()
    names, vectors = zip(*rates.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, vectors, allow_unused=True)
    return dict(zip(names, found, strict=True))


def silent(grad: Tensor | None) -> bool:
    return grad is None or bool((grad == 0).all())


def test_where_the_loss_reaches() -> None:
    # Block 1 prunes and merges; block 2 only merges (it prunes to more than are left); block 3 is
    # the last one, whose masks nobody reads in a model with a class token.
    m, rates = searching(prune=[64, 60, 60, 30], merge=[64, 50, 40, 25])
    found = grads(m, rates)
    quiet = {name for name, grad in found.items() if silent(grad)}
    assert quiet == {"prune.0", "merge.0", "prune.2", "prune.3", "merge.3"}
    # Merging asks for more than pruning left: no merge, no gradient.
    m, rates = searching(prune=[64, 40, 30, 20], merge=[64, 45, 25, 20])
    assert silent(grads(m, rates)["merge.1"]) and not silent(grads(m, rates)["merge.2"])


def test_the_mask_reaches_an_average_over_patches() -> None:
    lists = {"prune": [64, 60, 50, 40], "merge": [64, 55, 45, 30]}
    m, rates = searching("mae", **lists)
    found = grads(m, rates)
    assert not silent(found["prune.3"]) and not silent(found["merge.3"])
    m, rates = searching("mae", (0, 3), [64, 60, 50, 64], [64, 55, 45, 64])
    found = grads(m, rates)
    assert silent(found["prune.3"]) and len(rates.prune[3]) == 1


def test_at_the_start_only_one_count_hears_the_loss() -> None:
    m = zoo.wrap(backbone("plain"), "diffrate", {"name": "keep_rate"})
    rates = m.reducer.begin_search(64, 4)
    loud = {name for name, grad in grads(m.train(), rates).items() if not silent(grad)}
    assert loud == {"prune.1"}


def test_no_graph_before_the_first_mask_and_no_weight_gradients() -> None:
    m, _ = searching(prune=[64, 50, 40, 30])
    logits, info = m(images(), return_info="trace")
    assert [t.x.requires_grad for t in info.trace] == [False, False, True, True]
    logits.sum().backward()
    assert all(p.grad is None for p in m.backbone.parameters())


def test_checkpointing_copying_and_autocast_while_searching() -> None:
    lists = {"prune": [64, 60, 50, 40], "merge": [64, 50, 45, 30]}
    m, rates = searching(**lists)
    before = grads(m, rates)
    twin = copy.deepcopy(m)  # after a training forward, which the official code cannot
    assert twin.reducer.rates.counts() == rates.counts()
    m.set_grad_checkpointing(True)
    for name, grad in grads(m, rates).items():
        assert silent(grad) == silent(before[name]), name
        assert grad is None or torch.allclose(grad, before[name], atol=1e-7), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, info = twin(images(), return_info="trace")
    assert logits.isfinite().all()
    assert (info.final.policy.sum(1) == 31).all()


def test_counts_live_in_the_state() -> None:
    m, rates = searching(prune=[64, 60, 50, 40], merge=[64, 50, 45, 30])
    recipe = m.recipe
    again = zoo.wrap(backbone("plain"), recipe["reducer"], recipe["schedule"])
    again.load_state_dict(m.state_dict())
    assert again.reducer.searched_schedule(1) == m.reducer.searched_schedule(1)
    assert again.reducer.searched_schedule(1).keep == [65, 51, 46, 31]


def test_what_the_search_cannot_do_is_refused() -> None:
    m, _ = searching("map", score_from="column_mean", prune=[64, 50, 40, 30])
    with pytest.raises(ZooError, match="class token or on the average, not 'map'"):
        m(images())
    m = zoo.wrap(backbone("plain", dynamic_img_size=True), "diffrate", {"name": "keep_rate"})
    m.reducer.begin_search(64, 4)
    with pytest.raises(ZooError, match="counts of 64 patches, got 144"):
        m.train()(images(size=48))
    with pytest.raises(ZooError, match="granularity must be in"):
        RateProxies(64, 4, 65)
    with pytest.raises(ZooError, match="uncompressed must hold blocks"):
        RateProxies(64, 4, 1, [4])
    with pytest.raises(ZooError, match="call begin_search first"):
        zoo.wrap(backbone("plain"), "diffrate").reducer.searched_schedule(1)
    with pytest.raises(ZooError, match="search must be null or a mapping"):
        zoo.wrap(backbone("plain"), {"name": "diffrate", "search": {"size": 1}})


# -- the training around it ------------------------------------------------------------------------


TINY = [
    "experiment=diffrate_search",
    "weights=null",
    "backbone=vit_digits",
    "+backbone.args={depth: 4, embed_dim: 32}",
    "schedule.fraction=0.6",
    "data.batch_size=32",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "logger=none",
]


def config(*overrides: str, out: Path):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", [*TINY, *overrides, f"output_dir={out}"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("search")
    return out, train(config("trainer.max_epochs=2", out=out))


def test_a_search_writes_a_schedule(run) -> None:
    out, row = run
    found = json.loads((out / "schedule.json").read_text())
    assert found["prefix"] == 1 and len(found["keep"]) == len(found["prune"]) == 4
    assert found["keep"][0] == found["prune"][0] == 65  # the first block is left alone
    assert row["gmacs_paper"]["total"] == found["gmacs"]["diffrate"]
    assert row["gmacs"]["total"] == found["gmacs"]["zoo"]
    assert row["trained"] is False and "counts searched" in row["notes"]
    assert row["schedule"]["name"] == "target_gmacs" and row["schedule"]["fraction"] == 0.6
    assert row["recipe"]["schedule"]["keep"] == found["keep"]
    model = zoo.create_model(
        "vit_digits",
        reducer="diffrate",
        schedule={"name": "per_block", "file": str(out / "schedule.json")},
        depth=4,
        embed_dim=32,
    )
    assert [list(pair) for pair in model.token_counts()] == row["tokens"]


def test_the_model_that_is_saved_removes_tokens(run) -> None:
    out, row = run
    model = zoo.load(str(out / "model"))
    assert model.reducer.rates is None and model.reducer.search is None
    assert [list(pair) for pair in model.token_counts()] == row["tokens"]
    assert not any("rates" in name for name in model.state_dict())


def test_the_checkpoint_holds_logits_and_counts(run) -> None:
    out, row = run
    path = out / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    logits = stored["state_dict"]["net.reducer.rates.prune.1"]
    assert logits.abs().max() > 1e-3  # moved away from zero
    assert len(stored["optimizer_states"][0]["state"]) == 8  # two vectors per block, no weights
    model = zoo.load(str(path))
    assert model.reducer.searched_schedule(1).keep == row["recipe"]["schedule"]["keep"]
    assert model.schedule == model.reducer.searched_schedule(1)


def test_a_resumed_search_goes_on_and_leaves_the_weights_alone(run, tmp_path) -> None:
    out, _ = run
    before = zoo.load(str(out / "model")).backbone.state_dict()
    whole = train(config("trainer.max_epochs=3", out=tmp_path))
    ckpt = f"ckpt={out}/checkpoints/last.ckpt"
    resumed = train(config("trainer.max_epochs=3", ckpt, out=out))
    assert resumed["recipe"]["schedule"] == whole["recipe"]["schedule"]
    after = zoo.load(str(out / "model")).backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_modes_and_units(run) -> None:
    tiny = zoo.create_model("vit_digits", "diffrate", {"name": "target_gmacs", "fraction": 0.5})
    module = DiffRateSearch(tiny)
    dense = zoo.profile(tiny, convention="diffrate").dense
    assert module.target == pytest.approx(0.5 * dense)
    assert module.unit == pytest.approx(dense / 4.6)
    assert tiny.reducer.search == {"granularity": 1, "uncompressed": [0]}
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in tiny.reducer.rates.parameters()}
    pooled = zoo.wrap(backbone("mae"), "diffrate", {"name": "target_gmacs"})
    assert DiffRateSearch(pooled).rates.counts()[0][3] == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reducer=tome"], "expected reducer=diffrate, got tome"),
        (["schedule=keep_rate"], "schedule=target_gmacs"),
        (["schedule.gmacs=1e-9"], "target of 1e-09 GMACs is"),
    ],
)
def test_a_search_that_cannot_be_is_refused(overrides, message, tmp_path) -> None:
    base = [o for o in TINY if "schedule" not in overrides[0] or not o.startswith("schedule.")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", [*base, *overrides, f"output_dir={tmp_path}"])
    with pytest.raises(ZooError, match=message):
        train(cfg)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path) -> None:
    """Same images per step, split over two processes: the same counts, equal on both."""
    found = {}
    plain = [
        "augment=none",
        "loss=ce",
        "trainer.max_epochs=2",
    ]
    for devices, batch in ((1, 32), (2, 16)):
        out = tmp_path / str(devices)
        strategy = ["trainer.strategy=ddp", "trainer.devices=2"] if devices == 2 else []
        command = [sys.executable, "train.py", *TINY, *plain, *strategy, f"data.batch_size={batch}"]
        command += [f"hydra.run.dir={out}", f"results={tmp_path}/rows.jsonl"]
        root = Path(zoo.__file__).parents[1]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found[devices] = json.loads((out / "schedule.json").read_text())
    gap = [abs(a - b) for a, b in zip(found[1]["keep"], found[2]["keep"], strict=True)]
    assert max(gap) <= 1, found

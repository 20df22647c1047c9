"""The search for token counts: soft removal is removal, and a run ends in a schedule that works."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn

import zoo
from reduction import Keep, KeepRate, PerBlock, Reducer, Signals, Step, Tokens, UnreachableBudget
from tests.cases import backbone, images
from zoo.errors import ZooError
from zoo.lit.power_bert import PowerBertSearch, SoftExtract, at_target, counts
from zoo.run.build import build_model
from zoo.run.train import train

CONFIGS = str(Path(__file__).parents[1] / "configs")
TINY = [
    "backbone=vit_digits",
    "+backbone.args.depth=3",
    "+backbone.args.embed_dim=32",
    "module=power_bert",
    "callbacks=search",
    "logger=none",
    "data.batch_size=32",
    "test=last",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
    "trainer.max_epochs=4",
    "module.rate=0.15",
    "module.penalty=1.0",
]


@pytest.fixture(autouse=True)
def keep_signal_handler():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def config(root: str, *overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose(root, list(overrides))


class Hard(Reducer):
    """Keep the tokens that receive most attention from others."""

    site = "mid"
    needs = frozenset({"attn"})

    def assign(self, t: Tokens, s: Signals, step: Step) -> Keep:
        map_ = s.attn.mean(1)
        received = (map_.sum(1) - map_.diagonal(dim1=1, dim2=2))[:, t.prefix :]
        return Keep(received.topk(step.keep, dim=1).indices)


def steps(*keep: int) -> nn.Parameter:
    """Factors that are one for the first so many places."""
    return nn.Parameter((torch.arange(64) < torch.tensor(keep)[:, None]).float())


@pytest.mark.parametrize("name", ["plain", "distilled", "gap", "registers", "eva02", "map"])
def test_factors_of_one_and_zero_are_removal(name: str) -> None:
    m, x = backbone(name), images()
    soft = zoo.wrap(m, SoftExtract(steps(64, 40, 40, 17)), KeepRate(1.0)).eval()
    hard = zoo.wrap(m, Hard(), PerBlock([64, 40, 40, 17])).eval()
    with torch.no_grad():
        removed = hard(x)
        assert torch.allclose(soft(x), removed, atol=2e-4)
        assert (removed - m(x)).abs().max() > 1e-2
        ones = zoo.wrap(m, SoftExtract(steps(64, 64, 64, 64)), KeepRate(1.0)).eval()
        assert torch.allclose(ones(x), m(x), atol=2e-4)


def test_the_loss_says_which_factors_matter() -> None:
    retention = steps(64, 64, 64, 64)
    soft = zoo.wrap(backbone("plain"), SoftExtract(retention), KeepRate(1.0)).eval()
    soft(images()).square().sum().backward()
    grad: Tensor = retention.grad
    # What the last block fades out is not read by any attention.
    assert (grad[:3] != 0).any(1).all() and (grad[3] == 0).all()
    assert (grad[:3] != 0).float().mean() > 0.9


def test_counts_never_rise_and_never_reach_zero() -> None:
    retention = torch.tensor([[1.0, 1.0, 1.0, 0.9], [1, 0.5, 0.4, 0], [1, 1, 1, 1], [0.2, 0, 0, 0]])
    assert counts(retention) == [3, 1, 1, 1]
    assert counts(torch.ones(2, 64)) == [64, 64]


def test_counts_are_brought_to_a_cost() -> None:
    keep = [60, 40, 30, 20]
    for fraction in (0.9, 0.6, 0.5):
        m = zoo.wrap(backbone("plain"), "topk", {"name": "target_gmacs", "fraction": fraction})
        dense = zoo.profile(m).dense
        m.schedule = at_target(m, keep, 64)
        found = zoo.profile(m)
        assert (fraction - 0.05) * dense < found.gmacs <= fraction * dense
        kept = [n - 1 for _, n in found.tokens]
        assert all(a > b for a, b in zip(kept, kept[1:], strict=False))
    m.target.fraction = 1.0
    assert at_target(m, keep, 64).keep == [64] * 4
    m.target.fraction = 0.5
    with pytest.raises(UnreachableBudget, match="counts shaped like"):
        at_target(m, [64] * 4, 64)
    free = zoo.wrap(backbone("plain"), "topk")
    assert at_target(free, keep, 64) == PerBlock(keep, strict=False)


@pytest.mark.parametrize(
    ("reducer", "options", "message"),
    [
        (None, {}, "choose one, e.g. reducer=topk"),
        ("sinkhorn", {}, "cannot change its counts while it trains"),
        ("topk", {"share": 0}, "module.share must be in"),
        ("topk", {"rate": -1.0}, "module.rate must be above 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(reducer, options, message) -> None:
    with pytest.raises(ZooError, match=message):
        PowerBertSearch(zoo.wrap(backbone("plain"), reducer), **options)


def test_factors_have_a_rate_of_their_own_and_no_copy_of_the_backbone() -> None:
    module = PowerBertSearch(zoo.wrap(backbone("plain"), "topk"), rate=0.5)
    optimizer = module.make_optimizer(module.net)
    last = optimizer.param_groups[-1]
    assert last["params"] == [module.retention]
    assert (last["lr"], last["weight_decay"]) == (0.5, 0.0)
    assert not any(name.startswith("_soft") for name in module.state_dict())
    assert all(p is not module.retention for g in optimizer.param_groups[:-1] for p in g["params"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("search")
    return out, train(config("train", *TINY, "reducer=token_pooling", f"output_dir={out}"))


def test_a_run_ends_in_a_schedule_that_evaluation_reads(run) -> None:
    out, row = run
    report = json.loads((out / "schedule.json").read_text())
    assert 1 <= report["keep"][-1] <= report["keep"][0] < 64
    assert report["keep"] == report["searched"] == sorted(report["keep"], reverse=True)
    assert row["schedule"]["keep"] == report["keep"] and row["method"] == "token_pooling"
    assert "counts searched in the first 2 epochs" in row["notes"]
    assert row["gmacs"]["total"] == pytest.approx(report["gmacs"])
    saved = zoo.load(str(out / "model"))
    assert saved.schedule.keep == report["keep"]
    options = ["schedule=per_block", f"schedule.file={out / 'schedule.json'}", "reducer=topk"]
    other = build_model(config("eval", f"weights={out / 'model'}", *options))
    assert [n - 1 for _, n in other.token_counts()] == report["keep"]


def test_resuming_keeps_the_counts(run, tmp_path) -> None:
    out, row = run
    copy = shutil.copytree(out, tmp_path / "run")
    (copy / "schedule.json").unlink()
    # The optimiser's momentum has moved the factors on since the counts were fixed.
    ckpt = f"ckpt={copy / 'checkpoints' / 'last.ckpt'}"
    again = train(config("train", *TINY, "reducer=token_pooling", ckpt, f"output_dir={tmp_path}"))
    assert again["schedule"] == row["schedule"]
    old, new = (json.loads((f / "schedule.json").read_text()) for f in (out, copy))
    assert old == new


def test_a_search_for_a_cost(tmp_path) -> None:
    target = ["schedule=target_gmacs", "schedule.fraction=0.6", "trainer.max_epochs=2"]
    row = train(config("train", *TINY, *target, "reducer=tome", f"output_dir={tmp_path}"))
    assert 0.5 < row["gmacs"]["total"] / row["gmacs_dense"] <= 0.6
    assert (
        json.loads((tmp_path / "schedule.json").read_text())["keep"]
        == row["recipe"]["schedule"]["keep"]
    )

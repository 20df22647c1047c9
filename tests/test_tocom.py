"""ToCom: which units act, what they add and to what, and how they are trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import zoo
from tests.cases import backbone, images
from zoo.cost.counters import fvcore_gmacs, torch_gmacs
from zoo.errors import ZooError
from zoo.lit.tocom import TokenCompensation
from zoo.model.reduced import ReducedViT
from zoo.plugins.tocom import ToCom
from zoo.published import config_folder

FAMILIES = ["plain", "gap", "registers", "qk_norm", "eva02", "eva02_fused", "dinov3", "rope_mixed"]


def plugged(
    r: float = 6, name: str = "plain", reducer: str | None = "tome", **args: object
) -> ReducedViT:
    m = backbone(name)
    torch.manual_seed(3)
    schedule = {"name": "constant_r", "r": r, "strict": False}
    made = zoo.wrap(
        m, reducer, schedule if reducer else None, [{"name": "tocom", "scale": 1.0, **args}]
    )
    with torch.no_grad():
        for parameter in made.plugins.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def delta(m: ReducedViT, source: float, target: float) -> torch.Tensor:
    """What is added to queries and values of block 1."""
    [plugin] = m.plugins
    plugin.source, plugin.target = source, target
    shift, x = plugin.shift(1, None), torch.ones(2, 5, 48)
    return torch.zeros(2, 5, 96) if shift is None else torch.cat(shift(x), dim=-1).detach()


def test_deltas_add_up_along_rates() -> None:
    m = plugged()
    assert torch.allclose(delta(m, 3, 9), -delta(m, 9, 3), atol=1e-6)
    assert torch.allclose(delta(m, 0, 3) + delta(m, 3, 11), delta(m, 0, 11), atol=1e-5)
    assert torch.equal(delta(m, 7, 7), torch.zeros(2, 5, 96))
    assert not torch.equal(delta(m, 7, 8), torch.zeros(2, 5, 96))
    # A rate stands for the last units: 12 of 32 for a rate of 6.
    [plugin] = m.plugins
    plugin.source, plugin.target = 0, 6
    assert plugin.band(None) == (slice(20, 32), 1)
    plugin.source, plugin.target = 6, 2.5
    assert plugin.band(None) == (slice(20, 27), -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_rates_and_new_adapters_change_nothing(name: str) -> None:
    plain, x = plugged(name=name, source=6), images()
    without = zoo.wrap(plain.unwrap(), "tome", {"name": "constant_r", "r": 6}).eval()
    other = plugged(name=name)
    other.unwrap().load_state_dict(plain.unwrap().state_dict())
    with torch.no_grad():
        expected = without(x)
        assert torch.equal(plain(x), expected)
        assert not torch.allclose(other(x), expected, atol=1e-4)
        for block in other.plugins[0].blocks:
            block.q.up.weight.zero_()
            block.v.up.weight.zero_()
        assert torch.allclose(other(x), expected, atol=1e-6)


def test_it_is_a_change_of_the_weights_of_queries_and_values() -> None:
    m, x = plugged(), images()
    with torch.no_grad():
        expected = m(x)
        for block, own in zip(m.backbone.blocks, m.plugins[0].blocks, strict=True):
            for part, adapter in ((0, own.q), (2, own.v)):
                change = adapter.up.weight[:, 20:] @ adapter.down.weight[20:]
                block.attn.qkv.weight[part * 48 : (part + 1) * 48] += change
        merged = zoo.wrap(m.unwrap(), "tome", {"name": "constant_r", "r": 6}).eval()
        assert torch.allclose(merged(x), expected, atol=1e-4)


@pytest.mark.parametrize("reducer", ["tome", "diffrate", "evit", None])
def test_it_goes_around_any_method_with_a_rate(reducer: str | None) -> None:
    m, x = plugged(reducer=reducer, source=2), images()
    [plugin] = m.plugins
    assert plugin.rate(m.schedule) == (0 if reducer is None else 6)
    with torch.no_grad():
        logits, info = m(x, return_info=True)
    assert list(info.tokens) == m.token_counts() and logits.isfinite().all()
    cost = zoo.profile(m).gmacs
    assert fvcore_gmacs(m, x) == pytest.approx(cost, rel=1e-5)
    assert torch_gmacs(m, x) == pytest.approx(cost, rel=1e-5)
    plugin.source = plugin.rate(m.schedule)
    assert zoo.profile(m).gmacs < cost


def test_the_rate_follows_the_schedule_of_a_saved_model(tmp_path) -> None:
    from zoo.checkpoint import save_pretrained

    first = zoo.load("vit_digits", reducer="tome", schedule={"name": "constant_r", "r": 4})
    m = zoo.wrap(first.unwrap(), "tome", {"name": "constant_r", "r": 4}, ["tocom"]).eval()
    m.backbone_args = first.backbone_args
    for parameter in m.plugins.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_pretrained(m, tmp_path / "model")
    again = zoo.load(str(tmp_path / "model"), schedule={"name": "constant_r", "r": [9, 5]})
    assert again.plugins[0].band(again.schedule)[0] == slice(32 - 14, 32)
    assert again.recipe["plugins"] == m.recipe["plugins"]


def test_a_schedule_without_a_rate_needs_a_target() -> None:
    schedule = {"name": "keep_rate", "rate": 0.6}
    m = zoo.wrap(backbone("plain"), "topk", schedule, ["tocom"])
    with pytest.raises(ZooError, match="type plugin.target=R"):
        m(images())
    fixed = zoo.wrap(backbone("plain"), "topk", schedule, [{"name": "tocom", "target": 9}])
    assert fixed(images()).shape == (2, 10)


@pytest.mark.parametrize("args", [{"source": 17}, {"target": -1}, {"dim": 0}, {"dropout": 1.0}])
def test_arguments_out_of_range(args: dict) -> None:
    with pytest.raises(ZooError, match=next(iter(args))):
        ToCom(**args)


# ------------------------------------------------------------------ training


def test_the_loss_is_that_of_the_paper_and_trains_the_adapters_alone(monkeypatch) -> None:
    m, x = plugged(source=2, dropout=0.0), images(4)
    module = TokenCompensation(m).train()
    assert module.rates == [r for r in range(17) if r != 2]
    assert not m.backbone.training and not m.reducer.training and m.plugins[0].training
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(7))
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    loss = module.training_step((x, torch.zeros(4, dtype=torch.long)), 0)
    loss.backward()
    assert all(p.grad is None for p in m.backbone.parameters())
    assert all(p.grad is not None for p in m.plugins.parameters())
    assert m.schedule.r == 6
    with torch.no_grad():
        net, own = m.unwrap(), m.plugins[0]

        def at(r: int) -> torch.Tensor:
            schedule = {"name": "constant_r", "r": r, "strict": False}
            made = zoo.wrap(net, "tome", schedule, [own.config()]).eval()
            made.plugins[0].load_state_dict(own.state_dict())
            return F.softmax(made(x), dim=-1)

        student, teacher = at(module.rates[7]), at(2)
        expected = (teacher * (teacher.log() - student.log())).sum() / 40
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_training_needs_the_plugin_and_draws_the_rate_itself() -> None:
    with pytest.raises(ZooError, match="expected a merging reducer and plugin=tocom"):
        TokenCompensation(zoo.wrap(backbone("plain"), "tome", {"name": "constant_r", "r": 6}))
    with pytest.raises(ZooError, match="plugin.target=null"):
        TokenCompensation(plugged(target=5))


def test_a_short_run_leaves_a_model_with_trained_adapters(tmp_path) -> None:
    from zoo.run.train import train

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose(
            "train",
            [
                "experiment=tocom_digits",
                "trainer.max_epochs=1",
                "trainer.limit_train_batches=2",
                "trainer.limit_val_batches=1",
                "trainer.limit_test_batches=1",
                "trainer.enable_progress_bar=false",
                "trainer.accelerator=cpu",
                "test_start=false",
                "logger=none",
                f"output_dir={tmp_path}",
                f"results={tmp_path}/rows.jsonl",
            ],
        )
    GlobalHydra.instance().clear()
    row = train(cfg)
    assert row["status"] == "ok" and row["gmacs"]["total"] <= row["gmacs_dense"] / 2
    m = zoo.load(str(tmp_path / "model"))
    assert any(block.q.up.weight.any() for block in m.plugins[0].blocks)
    trained, given = m.unwrap().state_dict(), zoo.load("vit_digits").unwrap().state_dict()
    assert all(torch.equal(trained[k], given[k]) for k in given)

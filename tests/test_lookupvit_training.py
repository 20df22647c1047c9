"""LookupViT in the commands: many grids in one training, one row per grid, refusals in a line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import zoo
from zoo.errors import UnsupportedModel, ZooError
from zoo.lit.classifier import Classifier
from zoo.lit.multigrid import MultiGrid
from zoo.run import messages
from zoo.run.build import build_model
from zoo.run.evaluate import evaluate
from zoo.run.train import train

CONFIGS = str(Path(__file__).parents[1] / "configs")
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}
ARGS = [f"+backbone.args.{key}={value}" for key, value in TINY.items()]


def config(root: str, *overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose(root, list(overrides))


def ready(grids=None, seed: int = 0, **model) -> tuple[MultiGrid, SimpleNamespace]:
    """A callback as it is when training starts, and the module that it acts on."""
    module = SimpleNamespace(net=zoo.create_model("lookupvit_digits", **TINY, **model))
    callback = MultiGrid(grids, seed)
    callback.on_fit_start(SimpleNamespace(), module)
    return callback, module


def test_draws_depend_on_seed_and_step_alone() -> None:
    one, _ = ready([2, 3, [4, 5], 8], seed=7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    draws = [one.draw(step) for step in range(400)]
    assert torch.equal(torch.get_rng_state(), before)
    # Another process, or the same run resumed in the middle.
    two, module = ready([2, 3, [4, 5], 8], seed=7)
    for rank in (0, 1):
        for step in (399, 5, 200):
            trainer = SimpleNamespace(global_step=step, global_rank=rank)
            two.on_train_batch_start(trainer, module, None, 0)
            assert module.net.unwrap().compressed_grid == draws[step]
    assert set(draws) == {(2, 2), (3, 3), (4, 5), (8, 8)}
    assert all(70 <= draws.count(grid) <= 130 for grid in set(draws))
    other, _ = ready([2, 3, [4, 5], 8], seed=8)
    assert [other.draw(step) for step in range(20)] != draws[:20]


def test_default_grids_are_those_that_fit() -> None:
    callback, module = ready(compressed_grid=2)
    assert {callback.draw(step) for step in range(200)} == {(s, s) for s in range(3, 9)}
    assert module.net.unwrap().compressed_grid == (2, 2)


def test_refusals() -> None:
    with pytest.raises(ZooError, match="grids is empty"):
        MultiGrid([])
    with pytest.raises(ZooError, match="patch grid 8x8, got 9x9"):
        ready([3, 9])
    module = SimpleNamespace(net=zoo.create_model("vit_digits", embed_dim=32, depth=1))
    with pytest.raises(ZooError, match="no compressed grid to draw"):
        MultiGrid().on_fit_start(SimpleNamespace(), module)


def test_every_head_gets_the_loss() -> None:
    net = zoo.create_model("lookupvit_digits", **TINY)
    torch.nn.init.normal_(net.unwrap().head.weight)
    images, labels = torch.randn(6, 1, 16, 16), torch.arange(6)
    module = Classifier(net)
    compressed, lookup = net.training_logits(images)
    expected = (F.cross_entropy(compressed, labels) + F.cross_entropy(lookup, labels)) / 2
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    assert torch.allclose(module.training_step((images, labels), 0), expected)
    assert not torch.allclose(F.cross_entropy(net(images), labels), expected, rtol=1e-3)
    plain = zoo.create_model("vit_digits", embed_dim=32, depth=1)
    assert len(plain.training_logits(images)) == 1


class Watch(pl.Callback):
    """Notes the grid of every training and validation batch, after all callbacks had their say."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.seen["train"].append(pl_module.net.unwrap().compressed_grid)

    def on_validation_batch_end(self, trainer, pl_module, *args) -> None:
        self.seen["val"].append(pl_module.net.unwrap().compressed_grid)


def test_training_draws_and_evaluation_does_not(tmp_path, monkeypatch) -> None:
    watch = Watch()
    import zoo.run.train as run

    build = run.instantiate_trainer

    def watched(cfg):
        trainer = build(cfg)
        trainer.callbacks.append(watch)
        return trainer

    monkeypatch.setattr(run, "instantiate_trainer", watched)
    out = tmp_path / "run"
    row = train(
        config(
            "train",
            *("experiment=lookupvit_digits", *ARGS, "+backbone.args.mlp_ratio=2", "weights=null"),
            *("trainer.max_epochs=1", "trainer.accelerator=cpu"),
            *("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=12"),
            *("trainer.enable_progress_bar=false", "callbacks.grids.grids=[2,3,5,7,8]"),
            f"output_dir={out}",
        )
    )
    grids = watch.seen["train"]
    assert len(grids) == 12 and grids[::2] == grids[1::2]  # one draw per optimiser step
    assert len(set(grids)) > 1 and set(grids) <= {(s, s) for s in (2, 3, 5, 7, 8)}
    assert set(watch.seen["val"]) == {(4, 4)}
    assert row["method"] == "lookupvit" and row["schedule"] == {"name": "grid", "grid": "4x4"}
    stored = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    args = stored["hyper_parameters"]["recipe"]["backbone"]["args"]
    assert args["compressed_grid"] == [4, 4]

    # One row per grid from the one model.
    found = []
    for grid in ("3", "[2,6]"):
        grid = f"+backbone.args.compressed_grid={grid}"
        row = evaluate(config("eval", f"weights={out / 'model'}", grid, "limit=20"))
        assert row["trained"] and row["method"] == "lookupvit" and row["n_images"] == 20
        found.append((row["schedule"]["grid"], row["gmacs"]["total"]))
    assert [name for name, _ in found] == ["3x3", "2x6"] and found[0][1] < found[1][1]
    assert zoo.load(out / "model", compressed_grid=3).unwrap().compressed_grid == (3, 3)


def test_saved_weights_in_another_spelling_of_their_backbone() -> None:
    saved = build_model(config("eval", "weights=vit_digits", "+backbone.args.img_size=32"))
    assert saved.grid == (16, 16) and saved.recipe["backbone"]["args"]["img_size"] == 32
    with pytest.raises(ZooError, match="no model: type weights="):
        build_model(config("eval", "+backbone.args.img_size=32"))
    warm = build_model(config("eval", "weights=vit_digits", "backbone=lookupvit_digits"))
    assert warm.unwrap().blocks[0].gather.proj.weight.abs().max() == 0


def test_a_reducer_is_refused_with_the_reason() -> None:
    cfg = config("eval", "backbone=lookupvit_small", "reducer=tome", "task=flops")
    with pytest.raises(UnsupportedModel, match="takes no reducer; its budget is that grid"):
        build_model(cfg)
    with pytest.raises(Exception, match="reducer") as error:
        config("eval", "reducer=lookupvit")
    text = messages.explain(error.value)
    assert text is not None
    assert text.startswith("reducer=lookupvit: it is a backbone, so type backbone=lookupvit_base|")

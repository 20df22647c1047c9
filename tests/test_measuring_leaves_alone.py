"""Measuring, exporting and searching leave a model as it was, and ask the model that is meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests import cases
from tests.cases import backbone
from zoo.adapters.timm_vit import TimmViT
from zoo.budget.search import ScheduleSearch
from zoo.errors import ZooError
from zoo.export import export_model

R2 = {"name": "constant_r", "r": 2}


@pytest.fixture
def images() -> Tensor:
    return cases.images()


def flags(model: nn.Module) -> list[bool]:
    return [part.training for part in model.modules()]


@pytest.mark.parametrize("trains", [True, False])
def test_a_wrapper_is_in_the_mode_of_its_model(trains: bool, images: Tensor) -> None:
    model = zoo.wrap(backbone("plain").train(trains), "dynamicvit", plugins=["clca"])
    assert set(flags(model)) == {trains}
    if not trains:
        with torch.no_grad():
            assert torch.equal(model(images), model(images))


def test_the_flags_of_all_parts_outlast_a_measurement(images: Tensor, tmp_path: Path) -> None:
    model = zoo.wrap(backbone("plain", drop_rate=0.5), "ats").train()
    model.backbone.eval()  # frozen inside of what trains
    model.backbone.blocks[1].train()
    before = flags(model)
    assert len(set(before)) == 2
    zoo.profile(model, images=images)
    model.verify(images, 1e-6)
    export_model(model, tmp_path, format="torch")
    assert flags(model) == before
    merging = zoo.wrap(model.unwrap(), "tome", R2).train()
    merging.backbone.eval()
    before = flags(merging)
    ScheduleSearch(merging, [images], evaluations=3).run()
    zoo.calibrate(merging, [images])
    assert flags(merging) == before


def test_a_model_that_trains_with_an_attachment_goes_on_training(images: Tensor) -> None:
    model = backbone("plain").train()
    zoo.attach(model, "ats")
    before = flags(model)
    zoo.profile(model, images=images)
    assert flags(model) == before and model.training


def test_export_in_bfloat16_leaves_the_weights(images: Tensor, tmp_path: Path) -> None:
    model = zoo.wrap(backbone("plain").eval(), "tome", R2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(model, tmp_path, format="torch", precision="bfloat16")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("attached", [False, True])
def test_verify_runs_the_blocks(
    attached: bool, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbone("plain").eval()
    if attached:
        zoo.attach(model, "tome", R2)
    wrapper = zoo.attached(model) if attached else zoo.wrap(model, "tome", R2)
    assert wrapper.verify(images) == 0.0
    reduced = model(images)
    embed = TimmViT.embed
    monkeypatch.setattr(TimmViT, "embed", lambda self, m, i: embed(self, m, i * 0 + 1))
    with pytest.raises(ZooError, match="difference"):
        wrapper.verify(images)
    monkeypatch.undo()
    assert torch.equal(model(images), reduced)  # what is attached is there again


def test_the_search_compares_an_attached_model_with_the_dense_one(images: Tensor) -> None:
    model = backbone("plain").eval()
    zoo.attach(model, "tome", R2)
    found = ScheduleSearch(zoo.attached(model), [images], evaluations=3).run()
    wanted = ScheduleSearch(
        zoo.wrap(backbone("plain").eval(), "tome", R2), [images], evaluations=3
    ).run()
    assert found.start_score == wanted.start_score > 0


def test_the_search_by_features_takes_towers_of_all_libraries(images: Tensor) -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64
    )
    reduced = zoo.wrap(model.eval(), "tome", R2)
    found = ScheduleSearch(reduced, [images], objective="features", evaluations=3).run()
    assert found.start_score > 0


def test_models_of_hugging_face_are_searched_and_exported(images: Tensor, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = zoo.wrap(transformers.Dinov2ForImageClassification(config).eval(), "tome", R2)
    assert export_model(model, tmp_path, format="torch").max_error < 1e-4
    for objective in ("kl", "features"):
        search = ScheduleSearch(model, [images], objective=objective, evaluations=3)
        assert search.run().start_score > 0


def test_a_fraction_is_of_the_dense_model_as_it_runs() -> None:
    half = {"name": "target_gmacs", "fraction": 0.5}
    found = zoo.profile(zoo.wrap(backbone("plain").eval(), "tome", half, last_block="class_token"))
    assert found.gmacs <= 0.5 * found.dense
    assert found.gmacs > 0.4 * found.dense


def test_hooks_on_what_holds_the_blocks_are_told_of(images: Tensor) -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
    ).eval()
    model.encoder.register_forward_hook(lambda *given: None)
    with pytest.warns(UserWarning, match=r"hooks on backbone\.encoder are not called"):
        zoo.wrap(model, "tome", R2)(images)

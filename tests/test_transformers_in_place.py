"""Reduction in place: whatever worked with a model goes on working."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from tests.hf_cases import CASES, SIZES, inputs, model
from zoo.errors import UnsupportedModel, ZooError
from zoo.measure.accuracy import top_k

transformers = pytest.importorskip("transformers", minversion="5.0")
TWO = {"name": "constant_r", "r": 2}


def _first(m: Any, name: str = "vit-head") -> Tensor:
    with torch.no_grad():
        return m(**inputs(name)).to_tuple()[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_attached_answers_like_wrapped_and_detached_like_before(name: str) -> None:
    m = model(name)
    keys, config, parts = list(m.state_dict()), m.config.to_dict(), list(m._modules)
    before = None if name == "mae" else _first(m, name)
    wrapped = _first(zoo.wrap(copy.deepcopy(m), "tome", TWO).eval(), name)
    assert zoo.attach(m, "tome", TWO) is m
    assert torch.equal(_first(m, name), wrapped)
    assert list(m.state_dict()) == keys
    assert m.config.to_dict() == config
    assert zoo.profile(m).tokens == zoo.profile(zoo.wrap(model(name), "tome", TWO)).tokens
    assert zoo.detach(m) is m
    assert list(m._modules) == parts
    assert not [key for key in vars(m) if "zoo" in key or key == "forward"]
    if before is not None:
        assert torch.equal(_first(m, name), before)


def test_the_tower_of_a_classifier_is_reduced_for_itself_too() -> None:
    m = zoo.attach(model("dinov2-head"), "tome", TWO)
    x = inputs("dinov2-head")["pixel_values"]
    with torch.no_grad():
        assert m.dinov2(x).last_hidden_state.shape[1] == 9
        assert len(zoo.attention_maps(m, x)) == 4
    zoo.detach(m)
    assert m.dinov2(x).last_hidden_state.shape[1] == 17


def test_copies_and_files_are_models_of_their_own(tmp_path: Path) -> None:
    m = zoo.attach(model("vit-head"), "tome", TWO)
    was = _first(m)
    stream = io.BytesIO()
    torch.save(m, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(m),
        pickle.loads(pickle.dumps(m)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(_first(other), was)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not _first(other).any()
        assert torch.equal(_first(m), was)
    m.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(_first(again), _first(model("vit-head")))
    assert torch.equal(_first(zoo.attach(again, "tome", TWO)), was)
    assert _first(m.to(torch.bfloat16)).dtype is torch.bfloat16


def test_a_pipeline_takes_the_model() -> None:
    m = zoo.attach(model("vit-head"), "tome", TWO)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    pipe = transformers.pipeline("image-classification", model=m, image_processor=processor)
    image = Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3))
    found = pipe(image, top_k=7)
    pixels = processor(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = m(pixels).logits.softmax(-1)[0]
    assert len(found) == 7
    assert found[0]["score"] == pytest.approx(float(expected.max()), abs=1e-5)
    odd = transformers.ViTImageProcessor(size={"height": 40, "width": 40})
    with pytest.raises(ZooError, match="the image processor has another size"):
        m(**odd(images=image, return_tensors="pt"))


class _Pairs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        torch.manual_seed(i)
        return {"pixel_values": torch.randn(3, 32, 32), "labels": i % 7, "name": "not an argument"}


@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.parametrize("policy", ["merged", "nearest", "zero", "knn"])
def test_every_patch_gets_a_row_as_the_policy_says(policy: str, method: str) -> None:
    m, x = model("dinov2"), inputs("dinov2")["pixel_values"]
    wrapped = zoo.wrap(m, method, TWO).eval()
    with torch.no_grad():
        norm = {"norm": True, "intermediates_only": True, "output_fmt": "NLC", "restore": policy}
        last = wrapped.forward_intermediates(x, 1, **norm)[0]
        states = wrapped.forward_intermediates(x, None, **{**norm, "norm": False})
        zoo.attach(m, method, TWO, restore=policy)
        found = m(x, output_hidden_states=True)
    assert torch.allclose(found.last_hidden_state[:, 1:], last, atol=1e-6)
    assert len(found.hidden_states) == 5 and found.hidden_states[0].shape[1] == 17
    for ours, expected in zip(found.hidden_states[1:], states, strict=True):
        assert torch.allclose(ours[:, 1:], expected, atol=1e-6)


@pytest.mark.parametrize("method", ["tome", "dtem"])
def test_a_trainer_trains_it(method: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    m = zoo.attach(model("vit-head"), method, TWO)
    before = {key: value.clone() for key, value in m.state_dict().items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-2,
        gradient_checkpointing=True,
    )
    trainer = transformers.Trainer(m, arguments, train_dataset=_Pairs(), eval_dataset=_Pairs())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    changed = {key for key, value in m.state_dict().items() if not torch.equal(value, before[key])}
    assert "vit.layers.0.mlp.fc1.weight" in changed
    own = {key for key in m.state_dict() if key.startswith("zoo_reducer.")}
    assert bool(own) == (method == "dtem")
    # The merges of the last block reach no class token, so what it learns stays.
    assert {key for key in own if ".blocks.3." not in key} <= changed


def test_what_a_method_learns_is_a_part_of_the_model(tmp_path: Path) -> None:
    m = zoo.attach(model("vit-head"), "dtem", TWO)
    assert m.train().zoo_reducer.training
    assert not m.eval().zoo_reducer.training
    with torch.no_grad():
        for p in m.zoo_reducer.parameters():
            p.normal_()
    m.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert not any("zoo" in key for key in again.state_dict())
    zoo.attach(again, "dtem", TWO).load_state_dict(m.state_dict())
    assert torch.equal(_first(again), _first(m))
    zoo.detach(m)
    assert not any("zoo" in key for key in m.state_dict())


def _clip() -> Any:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 99,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=text)
    return transformers.CLIPModel(config).eval()


def test_a_tower_is_found_in_what_owns_it() -> None:
    m, ids = _clip(), torch.tensor([[1, 5, 2]])
    x = inputs("clip")["pixel_values"]
    with torch.no_grad():
        dense = m(input_ids=ids, pixel_values=x).logits_per_image
        zoo.attach(m, "tome", TWO)
        reduced = m(input_ids=ids, pixel_values=x)
    assert not torch.equal(reduced.logits_per_image, dense)
    assert reduced.vision_model_output.last_hidden_state.shape[1] == 9
    found = zoo.attached(m)
    assert found is not None and found.token_counts()[-1] == (11, 9)
    zoo.detach(m)
    with torch.no_grad():
        assert torch.equal(m(input_ids=ids, pixel_values=x).logits_per_image, dense)
    pair = nn.ModuleDict({"left": model("vit"), "right": model("clip")})
    with pytest.raises(ZooError, match="2 towers: 'left', 'right'; choose one"):
        zoo.attach(pair, "tome")
    zoo.attach(pair, "tome", TWO, tower="right")
    assert zoo.attached(pair["left"]) is None
    zoo.attach(pair, "topk", TWO, tower="left")
    assert zoo.attached(pair["left"]) is not None
    with pytest.raises(ZooError, match="attached already to 'left'"):
        zoo.attach(pair, "tome", tower="left")
    with pytest.raises(ZooError, match="no part 'middle'; its towers are left, right"):
        zoo.attach(zoo.detach(pair), "tome", tower="middle")


def test_a_model_that_counts_patches_gets_all_of_them_or_a_refusal() -> None:
    text = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=99,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES),
        text_config=text,
        image_token_id=7,
    )
    m = transformers.LlavaForConditionalGeneration(config).eval()
    x, ids = inputs("clip", 1)["pixel_values"], torch.tensor([[1, *[7] * 16, 5]])
    with pytest.raises(ZooError, match='LlavaForConditionalGeneration.*restore="merged"'):
        zoo.attach(m, "tome", TWO)
    with torch.no_grad():
        dense = m(input_ids=ids, pixel_values=x).logits
        zoo.attach(m, "tome", TWO, restore="merged")
        reduced = m(input_ids=ids, pixel_values=x).logits
        tower = m.model.vision_tower(x, output_hidden_states=True)
    assert reduced.shape == dense.shape and not torch.equal(reduced, dense)
    assert {h.shape[1] for h in tower.hidden_states} == {17}
    assert len(tower.last_hidden_state[0, 1:].unique(dim=0)) == 8
    zoo.detach(m)
    with torch.no_grad():
        assert torch.equal(m(input_ids=ids, pixel_values=x).logits, dense)
        zoo.attach(m, "tome", TWO, restore="none")
        with pytest.raises(ValueError, match="do not match"):
            m(input_ids=ids, pixel_values=x)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_model_of_timm_too(pool: str) -> None:
    m = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, global_pool=pool, num_classes=5
    ).eval()
    x, keys = torch.randn(2, 3, 64, 64), list(m.state_dict())
    with torch.no_grad():
        dense, wrapped = m(x), zoo.wrap(m, "tome", TWO).eval()(x)
        zoo.attach(m, "tome", TWO)
        assert torch.equal(m(x), wrapped)
        assert torch.equal(m.forward_head(m.forward_features(x)), wrapped)
        assert torch.equal(copy.deepcopy(m)(x), wrapped)
        assert [tuple(y.shape) for y in m.forward_intermediates(x)[1]] == [(2, 192, 4, 4)] * 3
        assert torch.equal(
            m.forward_head(torch.ones(2, 17, 192)), m.head(m.fc_norm(torch.ones(2, 192)))
        )
    assert list(m.state_dict()) == keys
    assert top_k(m, [(x, torch.tensor([0, 1]))], torch.device("cpu"))[2] == 2
    zoo.detach(m)
    assert torch.equal(m(x), dense)


def test_compiled_after_attaching() -> None:
    m = zoo.attach(model("vit-head"), "tome", TWO)
    compiled = torch.compile(m, backend="eager", fullgraph=True)
    assert torch.allclose(_first(compiled), _first(m), atol=1e-6)


def test_what_cannot_be_attached_or_detached_says_so() -> None:
    m = zoo.attach(model("vit-head"), "tome", TWO)
    for again in (m, m.vit):
        with pytest.raises(ZooError, match=r"attached already.*zoo\.detach\(model\)"):
            zoo.attach(again, "tome")
    with pytest.raises(ZooError, match="nothing is attached to this ViTModel"):
        zoo.detach(model("vit"))
    with pytest.raises(ZooError, match=r"model\.unwrap\(\)"):
        zoo.attach(zoo.wrap(model("vit"), "tome"), "tome")
    with pytest.raises(ZooError, match="needs a reducer"):
        zoo.attach(model("vit"), None)
    with pytest.raises(ZooError, match="restore must be one of"):
        zoo.attach(model("vit"), "tome", restore="all")
    with pytest.raises(ZooError, match="forward_intermediates"):
        zoo.attach(timm.create_model("test_vit"), "tome", restore="merged")
    replaced = model("vit")
    replaced.forward = lambda *_, **__: None
    with pytest.raises(UnsupportedModel, match="has been replaced already"):
        zoo.attach(replaced, "tome")
    with pytest.raises(UnsupportedModel, match="not supported"):
        zoo.attach(nn.Linear(2, 2), "tome")
    with pytest.raises(UnsupportedModel, match="expected a"):
        zoo.attach("google/vit-base-patch16-224", "tome")  # type: ignore[type-var]

"""Models of Hugging Face, wrapped: exact, and called as before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reduction
import zoo
from tests.hf_cases import CASES, SIZES, inputs, model, twin
from zoo.checkpoint import save_pretrained
from zoo.cost.counters import torch_gmacs
from zoo.data.checks import data_config
from zoo.data.module import ImageData
from zoo.errors import UnsupportedModel, ZooError
from zoo.measure.accuracy import top_k
from zoo.measure.fidelity import compare_answers
from zoo.measure.throughput import measure

transformers = pytest.importorskip("transformers", minversion="5.0")
TWO = {"name": "constant_r", "r": 2}


def _tensors(answer: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in answer.items():
        if isinstance(value, tuple):
            found |= {f"{name}.{i}": x for i, x in enumerate(value)}
        else:
            found[name] = value
    return found


def _call(m: Any, name: str, **options: Any) -> Any:
    own = inputs(name)
    if name == "mae" and not isinstance(m, zoo.ReducedViT):
        options["noise"] = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        return m(**own, **options)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_with_nothing_reduced_every_output_is_the_originals(name: str, kernel: str) -> None:
    m = model(name, kernel)
    theirs = _call(m, name, output_hidden_states=True)
    wrapped = zoo.wrap(m, None).eval()
    ours = _call(wrapped, name, output_hidden_states=True)
    assert type(ours) is type(theirs)
    assert list(ours) == list(theirs)
    for key, value in _tensors(theirs).items():
        assert torch.equal(_tensors(ours)[key], value), key
    assert wrapped.verify(torch.randn(2, 3, 32, 32)) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_attention_in_pieces_is_the_originals(name: str) -> None:
    m = model(name, "eager")
    theirs = _call(m, name, output_attentions=True).attentions
    if name.startswith("siglip2"):
        x = torch.randn(2, 3, 32, 32)
        patches, shapes = zoo.wrap(m, None).tower._cut(m, x)
        with torch.no_grad():
            theirs = m(patches, torch.ones(2, 16), shapes, output_attentions=True).attentions
    else:
        x = inputs(name)["pixel_values"]
    with torch.no_grad():
        ours = zoo.attention_maps(m, x)
    for expected, found in zip(theirs, ours, strict=True):
        assert torch.allclose(found.weights, expected, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_tokens_that_are_left_are_what_is_handed_out(name: str) -> None:
    wrapped = zoo.wrap(model(name), "tome", TWO).eval()
    answer, info = _call(wrapped, name, output_hidden_states=True, return_info=True)
    lengths = [x.shape[1] for x in answer.hidden_states]
    assert lengths == [info.tokens[0][0], *(after for _, after in info.tokens)]
    assert all(before - after == 2 for before, after in info.tokens)
    if "last_hidden_state" in answer:
        assert answer.last_hidden_state.shape[1] == lengths[-1]
    short = _call(wrapped, name, output_hidden_states=-1).hidden_states
    assert short[0] is None and torch.equal(short[-1], answer.hidden_states[-1])
    one = _call(wrapped, name, return_dict=False)
    assert isinstance(one, tuple) and torch.equal(one[0], answer.to_tuple()[0])


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("siglip2")])
def test_the_cost_is_what_torch_counts(name: str) -> None:
    # The tower of a SigLIP with a classifier pools by attention, and nobody reads that.
    dense = () if name == "siglip-head" else (model(name),)
    for wrapped in (*dense, zoo.wrap(model(name), "tome", TWO)):
        counted = torch_gmacs(wrapped, torch.randn(1, 3, 32, 32))
        assert zoo.profile(wrapped).gmacs == pytest.approx(counted, rel=1e-3)


def test_siglip2_costs_what_siglip_does_and_the_positions_that_it_resizes() -> None:
    # It looks at its shapes, so the counter, which has no data, cannot run it.
    first, second = (zoo.profile(zoo.wrap(model(n), "tome", TWO)) for n in ("siglip", "siglip2"))
    assert second.macs - first.macs == 16 * 16 * 32


@pytest.mark.parametrize("method", sorted(reduction.list_methods()))
@pytest.mark.parametrize("name", ["dinov2-head", "siglip-head"])
def test_every_method_runs_and_trains(name: str, method: str) -> None:
    try:
        wrapped = zoo.wrap(model(name), method)
    except ZooError as error:
        assert "class token" in str(error) or "heuristic" in method, error
        return
    x, labels = inputs(name)["pixel_values"], torch.tensor([0, 1])
    assert wrapped.eval()(x).logits.isfinite().all()
    loss = wrapped.train()(pixel_values=x, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in wrapped.parameters())


@pytest.mark.parametrize("method", ["tome", "topk", "evit", "tofu", "pitome"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip"])
def test_equal_weights_keep_equal_tokens_as_a_model_of_timm(name: str, method: str) -> None:
    if name == "siglip" and method in ("topk", "evit"):
        method = "ltmp" if method == "evit" else "pitome"
    hf = model(name, **({"mlp_ratio": 4} if name == "dinov2" else {}))
    x = torch.randn(4, 3, 32, 32)
    schedule = {"name": "keep_rate", "rate": 0.6, "blocks": [1, 2]}
    ours, theirs = (zoo.wrap(m, method, schedule).eval() for m in (hf, twin(name, hf)))
    with torch.no_grad():
        (_, mine), (_, timms) = ours(x, return_info=True), theirs(x, return_info=True)
    assert torch.equal(mine.source, timms.source)
    assert torch.allclose(mine.size, timms.size)
    assert torch.allclose(mine.final.x, timms.final.x, atol=2e-5)


def test_images_of_another_size_go_through_where_the_model_takes_them() -> None:
    x = torch.randn(2, 3, 40, 48)
    for name, options in (
        ("vit-head", {"interpolate_pos_encoding": True}),
        ("dinov2", {}),
        ("dinov3", {}),
        ("clip", {"interpolate_pos_encoding": True}),
        ("beit", {"interpolate_pos_encoding": True}),
    ):
        m = model(name)
        with torch.no_grad():
            theirs, ours = m(x, **options), zoo.wrap(m, None).eval()(x, **options)
            assert torch.equal(ours.to_tuple()[0], theirs.to_tuple()[0]), name
            left = zoo.wrap(m, "tome", TWO).eval()(x, return_info=True, **options)[1]
        assert left.grid == (5, 6)
        assert left.tokens[0][0] - left.tokens[0][1] == 2
    with pytest.raises(ZooError, match="processor has another size.*interpolate_pos_encoding=True"):
        zoo.wrap(model("vit"), "tome")(x)


def test_masked_patches_and_labels_are_what_they_are_in_the_original() -> None:
    m = model("dinov2", use_mask_token=True)
    masked = torch.rand(2, 16) > 0.5
    x = inputs("dinov2")["pixel_values"]
    with torch.no_grad():
        theirs, ours = (w(x, bool_masked_pos=masked) for w in (m, zoo.wrap(m, None).eval()))
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    labels = torch.tensor([3, 1])
    for name in ("vit-head", "clip-head", "beit-head"):
        m = model(name, num_labels=5)
        theirs = m(pixel_values=x, labels=labels)
        ours = zoo.wrap(m, None).eval()(x, labels)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.logits, theirs.logits)


def test_an_average_counts_a_merged_token_for_every_patch_in_it() -> None:
    x = torch.randn(1, 3, 8, 8).repeat(1, 1, 4, 4)  # equal patches, but for their positions
    for name in ("dinov2-head", "siglip-head", "siglip", "clip-head", "ijepa-head", "beit-head"):
        m = model(name)
        with torch.no_grad():
            for key, p in m.named_parameters():
                if "position" in key:
                    p.zero_()
            dense = next(iter(m(x).to_tuple()))
            pooled = "pooler_output" if name == "siglip" else "logits"
            dense = m(x)[pooled]
            reduced = zoo.wrap(m, "tome", TWO).eval()(x)[pooled]
        assert torch.allclose(reduced, dense, atol=1e-5), name


def test_what_is_not_possible_says_so() -> None:
    x = inputs("vit")["pixel_values"]
    wrapped = zoo.wrap(model("vit"), "tome", TWO).eval()
    for options, words in (
        ({"output_attentions": True}, "zoo.attention_maps"),
        ({"head_mask": torch.zeros(4, 4)}, "head_mask is not possible"),
        ({"attention_mask": torch.zeros(2, 17)}, "attention_mask is not possible"),
    ):
        with pytest.raises(ZooError, match=words):
            wrapped(x, **options)
    with pytest.raises(ZooError, match="image processor"):
        wrapped()
    with pytest.raises(ZooError, match="image processor"):
        wrapped([[1.0]])
    with pytest.raises(ZooError, match=r"\(B, 3, H, W\)"):
        wrapped(torch.randn(2, 1, 32, 32))
    with pytest.raises(UnsupportedModel, match="mask_ratio = 0"):
        zoo.wrap(model("mae", mask_ratio=0.75), "tome")
    with pytest.raises(ZooError, match="noise shuffles"):
        zoo.wrap(model("mae"), "tome")(x, noise=torch.rand(2, 16))
    with pytest.raises(UnsupportedModel, match="plugin 'cla'"):
        zoo.wrap(model("vit-head"), None, plugins=["cla"])
    flash = model("vit")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match='attn_implementation="sdpa"'):
        zoo.wrap(flash, "tome")


def test_models_of_another_kind_are_refused_in_one_line() -> None:
    class Own(transformers.ViTModel):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    others = (
        transformers.SwinModel(
            transformers.SwinConfig(
                image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4
            )
        ),
        transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
        ),
        transformers.BertModel(transformers.BertConfig(**small, intermediate_size=16)),
        Own(transformers.ViTConfig(**SIZES)),
        torch.compile(model("vit")),
    )
    for m in others:
        for door in (zoo.wrap, zoo.attach):
            with pytest.raises(UnsupportedModel) as caught:
                door(m, "tome")  # type: ignore[operator]
            assert "\n" not in str(caught.value)


def test_measurements_take_a_wrapped_model_as_it_is() -> None:
    m = model("vit-head")
    wrapped = zoo.wrap(m, "tome", TWO)
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    assert top_k(wrapped, [(x, labels)], torch.device("cpu"))[2] == 6
    found = compare_answers(wrapped, m, [(x, x)])
    assert found["n_images"] == 6 and 0.9 < float(found["cosine"] or 0) <= 1
    assert compare_answers(m, m, [(x, x)])["agreement"] == 100
    speed = measure(wrapped, m, input_size=(3, 32, 32), batch=2, rounds=2, min_time=0.001)
    assert speed.imgs_per_s > 0 and speed.imgs_per_s_dense


def test_training_checkpointing_and_precision() -> None:
    x, labels = inputs("dinov2-head")["pixel_values"], torch.tensor([0, 1])
    m = model("dinov2-head", drop_path_rate=0.2, attention_probs_dropout_prob=0.1)
    wrapped = zoo.wrap(m, "tome", TWO).train()
    grads = []
    for again in (False, True):
        (m.gradient_checkpointing_enable if again else m.gradient_checkpointing_disable)()
        wrapped.zero_grad()
        torch.manual_seed(3)
        wrapped(pixel_values=x, labels=labels).loss.backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    assert grads[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    wrapped.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert wrapped(x).logits.isfinite().all()
    half = copy.deepcopy(wrapped).to(torch.bfloat16)
    assert half(x).logits.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "mean", "crop"),
    [("clip", 0.481, 1.0), ("siglip", 0.5, 1.0), ("beit-head", 0.5, 1.0), ("dinov2", 0.485, 0.875)],
)
def test_images_are_prepared_as_before_it_was_saved(
    name: str, mean: float, crop: float, tmp_path: Path
) -> None:
    wrapped = zoo.wrap(model(name), "tome", TWO)
    config = data_config(wrapped)
    assert config["mean"][0] == pytest.approx(mean, abs=1e-3) and config["crop_pct"] == crop
    assert ImageData("digits").attach(wrapped, check=False).config == config
    save_pretrained(wrapped, tmp_path / "m")
    assert data_config(zoo.load(tmp_path / "m")) == config
    # Folders that earlier versions wrote say nothing but the size.
    path = tmp_path / "m" / "config.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "data": {"input_size": [3, 32, 32]}}))
    assert data_config(zoo.load(tmp_path / "m")) == config


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    wrapped = zoo.wrap(model(name), "tome", TWO).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    save_pretrained(wrapped, tmp_path / "m")
    again = zoo.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(x), wrapped.tensors()(x))
    assert again.recipe == wrapped.recipe and data_config(again) == data_config(wrapped)


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("clip-head", {"img_size": 48}),
        ("siglip-head", {"img_size": 48}),
        ("siglip2-head", {"num_patches": 36}),
    ],
)
def test_a_classifier_of_two_towers_is_built_from_its_folder(
    name: str, larger: dict[str, int], tmp_path: Path
) -> None:
    original = model(name)
    original.save_pretrained(tmp_path / "own")
    own, x = f"hf:{tmp_path / 'own'}", torch.randn(2, 3, 32, 32)
    made, wrapped = zoo.create_model(own, pretrained=True), zoo.wrap(original, tensors=True)
    with torch.no_grad():
        assert torch.equal(made(x), wrapped(x))
    assert data_config(made) == data_config(wrapped)
    # Of the two towers' arguments those of the image tower are meant.
    other = zoo.create_model(own, "tome", TWO, num_hidden_layers=2, num_classes=3, **larger).eval()
    assert other.depth == 2 and other.grid == (6, 6)
    assert other(torch.randn(2, 3, 48, 48)).shape == (2, 3)
    with pytest.raises(ZooError, match=r"has no argument 'depth'; .* hidden_act, hidden_size"):
        zoo.create_model(own, depth=2)
    same = zoo.create_model(own, pretrained=True, img_size=32)
    assert same.grid == (4, 4)


def test_no_images_get_an_answer_without_any() -> None:
    wrapped = zoo.wrap(model("vit-head"), "tome", TWO).eval()
    answer = wrapped(torch.zeros(0, 3, 32, 32), output_hidden_states=True)
    assert type(answer).__name__ == "ImageClassifierOutput"
    assert answer.logits.shape == (0, 7) and answer.hidden_states[-1].shape == (0, 9, 32)


def test_features_and_tensors_are_there_too() -> None:
    wrapped = zoo.wrap(model("dinov2"), "tome", TWO).eval()
    x = inputs("dinov2")["pixel_values"]
    plain = zoo.wrap(model("dinov2"), "tome", TWO, tensors=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(x), wrapped(x).pooler_output)
        assert torch.equal(wrapped.tensors()(x), plain(x))
        assert torch.equal(wrapped.forward_head(wrapped.forward_features(x)), plain(x))
        final, maps = wrapped.forward_intermediates(x, indices=[1, 3])
    assert final.shape == (2, 9, 32) and [tuple(y.shape) for y in maps] == [(2, 32, 4, 4)] * 2

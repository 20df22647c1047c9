"""Features as timm's users take them: embeddings, feature maps, and batches without images."""

from __future__ import annotations

import io
from inspect import signature
from itertools import cycle
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models._features import FeatureGetterNet
from torch import Tensor

import zoo
from reduction import unmerge
from tests.cases import ALL, METHODS, Row, backbone, images, model, refused
from tests.families import FAMILIES, family, pictures
from zoo.errors import ZooError

R8 = {"name": "constant_r", "r": 8}


def same(a: Any, b: Any) -> bool:
    """Whether two answers are equal, whatever they are made of."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


# ---------------------------------------------------------------------------------- embeddings


EVERYWHERE = [r for r in METHODS if r.id in ("tome", "evit", "ats", "avit", "token_pooling")]
PAIRS = [(row, "gap") for row in METHODS] + [
    (row, name) for row in EVERYWHERE for name in ("plain", "distilled", "jumbo", "mae", "map")
]


@pytest.mark.parametrize(
    ("row", "name"),
    [pytest.param(r, n, id=f"{r.id}-{n}") for r, n in PAIRS if not refused(r, n)],
)
def test_the_head_on_features_is_the_model(row: Row, name: str) -> None:
    m = model(row, name)
    with torch.no_grad():
        expected, features = m(images()), m.forward_features(images())
        assert torch.allclose(m.forward_head(features), expected, atol=1e-5)
        if row.name == "avit" and name not in ("plain", "distilled"):
            with pytest.raises(ZooError, match=r"'avit' answers in place of.* model\(images\)"):
                m.forward_head(features, pre_logits=True)
        elif name != "distilled":
            embedding = m.forward_head(features, pre_logits=True)
            assert torch.allclose(m.get_classifier()(embedding), expected, atol=1e-5)


@pytest.mark.parametrize("plugin", ["cla", "clc", "clca"])
def test_plugins_have_their_say(plugin: str) -> None:
    m = zoo.wrap(backbone("plain"), "evit", R8, [plugin]).eval()
    with torch.no_grad():
        expected, features = m(images()), m.forward_features(images())
        assert torch.equal(m.forward_head(features), expected)
        if plugin == "clc":
            return
        for wrong in ({"x": features.clone()}, {"x": features, "pre_logits": True}):
            with pytest.raises(ZooError, match=f"plugin '{plugin}' answers in place of"):
                m.forward_head(**wrong)


def test_features_that_lost_their_sizes_are_refused() -> None:
    m = model(METHODS[0], "gap")
    with torch.no_grad():
        features = m.forward_features(images())
        expected, info = m(images(), return_info=True)
        with pytest.raises(ZooError, match=r"each token stands for.*sizes=info\.size"):
            m.forward_head(features.clone())
        told = m.forward_head(features.clone(), sizes=info.size)
        assert torch.allclose(told, expected, atol=1e-5)
        even = m.forward_head(features.clone(), sizes=torch.ones(features.shape[:2]))
        assert torch.equal(even, m.backbone.forward_head(features))
        # Where tokens are read one by one, nothing has to be known of them.
        plain = model(METHODS[0])
        found = plain.forward_features(images())
        assert torch.equal(plain.forward_head(found.clone()), plain(images()))


def test_features_can_be_saved_and_compiled() -> None:
    m = model(METHODS[0], "gap")
    with torch.no_grad():
        file = io.BytesIO()
        torch.save(m.forward_features(images()), file)
        file.seek(0)
        assert torch.equal(m.forward_head(torch.load(file)), m(images()))
        both = torch.compile(lambda x: m.forward_head(m.forward_features(x)), backend="eager")
        assert torch.allclose(both(images()), m(images()), atol=1e-5)


# -------------------------------------------------------------------------------- intermediates

OPTIONS: list[dict[str, Any]] = [
    {},
    {"indices": 2},
    {"indices": [3, 1], "intermediates_only": True},
    {"indices": [-1, 0], "return_prefix_tokens": True},
    {"indices": 2, "output_fmt": "NLC", "norm": True},
    {"indices": [0, 2], "stop_early": True},
    {"indices": [1], "stop_early": True, "return_prefix_tokens": True, "intermediates_only": True},
]


FLAGS = "return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict", "nlc"
# Every pair of values of every two flags.
PAIRWISE = [
    (False, False, False, False, False, False),
    (True, True, True, True, False, True),
    (True, True, False, False, True, False),
    (False, False, True, True, True, True),
    (True, False, True, False, False, False),
    (False, True, False, True, False, True),
    (True, False, False, True, True, False),
    (False, True, True, False, True, True),
    (True, False, False, False, True, True),
    (False, True, True, True, False, False),
]


@pytest.mark.parametrize("name", ["plain", "registers", "gap", "dinov3", "rope_mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_intermediates_are_those_of_timm(name: str, options: dict[str, Any]) -> None:
    m = backbone(name)
    with torch.no_grad():
        ours = zoo.wrap(m, None).eval().forward_intermediates(images(), **options)
        assert same(ours, m.forward_intermediates(images(), **options))


@pytest.mark.parametrize("name", [*ALL, *FAMILIES])
def test_any_choice_of_arguments_is_answered_as_timm_answers_it(name: str) -> None:
    m = backbone(name) if name in ALL else family(name)
    x, wrapped = pictures(m, 1), zoo.wrap(m, None).eval()
    takes_dict = "output_dict" in signature(type(m).forward_intermediates).parameters
    for indices, flags in zip(cycle([None, 1, [0, -1], (2, 0)]), PAIRWISE, strict=False):
        options = dict(zip(FLAGS, flags, strict=True))
        options["output_fmt"] = "NLC" if options.pop("nlc") else "NCHW"
        if not takes_dict:
            del options["output_dict"]
            # Such a class of timm's fails where it has no prefix tokens to give.
            options["return_prefix_tokens"] &= bool(wrapped.prefix)
        with torch.no_grad():
            ours = wrapped.forward_intermediates(x=x, indices=indices, **options)
            assert same(ours, m.forward_intermediates(x=x, indices=indices, **options))


def test_intermediates_as_a_mapping() -> None:
    m = backbone("registers")
    wrapped = zoo.wrap(m, None).eval()
    for options in ({}, {"return_prefix_tokens": True}, {"intermediates_only": True}):
        with torch.no_grad():
            ours = wrapped.forward_intermediates(images(), 2, output_dict=True, **options)
            theirs = m.forward_intermediates(images(), 2, output_dict=True, **options)
        assert same(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "gap", "dinov3"])
def test_intermediates_of_reduced_tokens(name: str) -> None:
    m = model(METHODS[0], name)
    with torch.no_grad():
        final, found = m.forward_intermediates(images(), [1, -1], return_prefix_tokens=True)
        trace = m(images(), return_info="trace")[1].trace
        assert torch.equal(final, m.forward_features(images()))
        assert torch.equal(m.forward_head(final), m(images()))
        for block, one in zip((1, 3), found, strict=True):
            full, prefix = one if m.prefix else (one, None)
            assert torch.equal(full.flatten(2).transpose(1, 2), unmerge(trace[block]))
            assert prefix is None or torch.equal(prefix, trace[block].x[:, : m.prefix])
        early, [only] = m.forward_intermediates(images(), [1], output_fmt="NLC", stop_early=True)
        assert torch.equal(only, unmerge(trace[1]))
        assert torch.equal(early, m.tower.norm(m.backbone, trace[1].x))


def test_stop_early_runs_no_further_block() -> None:
    m = model(METHODS[0])
    ran = []
    for i, block in enumerate(m.backbone.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        m.forward_intermediates(images(), [0, 1], stop_early=True)
    assert ran == [0, 1]


@pytest.mark.parametrize(
    "wrong", [{"indices": 5}, {"indices": 0}, {"indices": [4]}, {"indices": []}]
)
def test_blocks_that_are_not_there(wrong: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match="number of last blocks, 1 to 4, or a list of blocks"):
        model(METHODS[0]).forward_intermediates(images(), **wrong)


def test_an_unknown_format() -> None:
    with pytest.raises(ZooError, match="output_fmt must be one of NCHW, NLC, got 'NHWC'"):
        model(METHODS[0]).forward_intermediates(images(), output_fmt="NHWC")


def test_images_are_given_by_the_name_that_timm_has_for_them() -> None:
    m = model(METHODS[0])
    with torch.no_grad():
        assert same(m.forward_features(x=images()), m.forward_features(images()))
        assert same(
            m.get_intermediate_layers(x=images(), n=2), m.get_intermediate_layers(images(), 2)
        )
    with pytest.raises(TypeError, match="'x'"):
        m.forward_features()


def test_the_feature_wrapper_of_timm_takes_a_reduced_model() -> None:
    m = model(METHODS[0])
    with torch.no_grad():
        expected = m.forward_intermediates(images(), [0, 2], intermediates_only=True)
        got = FeatureGetterNet(m, out_indices=[0, 2])
        assert same(got(images()), expected)
    assert got.feature_info.channels() == [48, 48] and got.feature_info.reduction() == [4, 4]
    assert m.depth == 4 and m.num_classes == 0


def test_what_a_refusal_of_features_only_advises_works() -> None:
    with pytest.raises(ZooError, match="features_only=True; .*FeatureGetterNet"):
        zoo.create_model("test_vit", "tome", R8, features_only=True)
    getter = FeatureGetterNet(zoo.create_model("test_vit", "tome", R8), out_indices=[1, 3])
    theirs = timm.create_model("test_vit", features_only=True, out_indices=[1, 3])
    x = torch.randn(1, 3, 160, 160)
    assert [f.shape for f in getter.eval()(x)] == [f.shape for f in theirs.eval()(x)]
    assert getter.feature_info.get_dicts() == theirs.feature_info.get_dicts()


def test_the_feature_wrapper_takes_towers_of_other_libraries() -> None:
    sizes = dict(num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64)
    tower = torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes)
    getter = FeatureGetterNet(zoo.wrap(tower, "tome", {"name": "constant_r", "r": 2}).eval(), 2)
    assert [f.shape for f in getter(torch.randn(1, 3, 32, 32))] == [(1, 32, 4, 4)] * 2
    assert getter.feature_info.channels() == [32, 32] and getter.feature_info.reduction() == [8, 8]


def test_dino_asks_for_intermediate_layers() -> None:
    m = backbone("plain")
    wrapped = zoo.wrap(m, None).eval()
    for options in ({}, {"n": [0, 2], "reshape": True, "norm": True, "return_prefix_tokens": True}):
        with torch.no_grad():
            ours = wrapped.get_intermediate_layers(images(), **options)
            assert same(ours, m.get_intermediate_layers(images(), **options))


# ------------------------------------------------------------------------------- empty batches


@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.id)
def test_a_batch_without_images_has_an_empty_answer(row: Row) -> None:
    m, none = model(row), images()[:0]
    with torch.no_grad():
        assert m(none).shape == (0, 10)
        logits, info = m(none, return_info="trace")
        assert logits.shape == (0, 10) and info.grid == (8, 8)
        _, full = m(images(), return_info="trace")
        assert info.source.shape == (0, 64) and info.size.shape[0] == 0
        assert len(info.trace) == 4 and all(t.x.shape[0] == 0 for t in info.trace)
        assert info.final.x.shape[0] == 0 and info.final.prefix == full.final.prefix
        assert m.forward_features(none).shape[::2] == (0, 48)
        final, maps = m.forward_intermediates(none, 2)
        assert final.shape[0] == 0 and [x.shape for x in maps] == [(0, 48, 8, 8)] * 2
    m.train()(none).sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in m.parameters())


@pytest.mark.parametrize("name", ["gap", "map", "distilled", "eva02", "dinov3", "jumbo"])
@pytest.mark.parametrize("reducer", [None, "tome", "avit"])
def test_a_batch_without_images_on_every_family(name: str, reducer: str | None) -> None:
    m = zoo.wrap(backbone(name), reducer, R8 if reducer else None).eval()
    with torch.no_grad():
        features = m.forward_features(images()[:0])
        assert m(images()[:0]).shape == m.forward_head(features).shape == (0, 10)


def test_a_batch_without_images_must_fit_nevertheless() -> None:
    with pytest.raises(ZooError, match="expected images of 32x32, got 30x30"):
        model(METHODS[0])(torch.zeros(0, 3, 30, 30))
    with pytest.raises(ZooError, match=r"expected images of shape \(B, 3, H, W\)"):
        model(METHODS[0])(torch.zeros(0, 1, 32, 32))
    assert zoo.create_model("lookupvit_tiny_patch16_224")(torch.zeros(0, 3, 224, 224)).shape[0] == 0

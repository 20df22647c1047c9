"""Three independent counts must agree, and published numbers must come out."""

from __future__ import annotations

import pytest
import timm
import torch

import zoo
from reduction.tokens import Tokens
from tests.cases import ALL, METHODS, OLD, Row, backbone, images, model
from tests.covering import crossed, parts
from zoo.adapters.heads import head
from zoo.adapters.hollow import hollow
from zoo.cost.counters import fvcore_gmacs, torch_gmacs
from zoo.errors import ZooError


def deit(**kwargs):
    with hollow():
        return timm.create_model("deit_small_patch16_224", **kwargs)


def test_published_numbers_of_deit_small() -> None:
    assert round(zoo.profile(deit()).gmacs, 4) == 4.5989
    tome = zoo.profile(zoo.wrap(deit(), "tome", {"name": "constant_r", "r": 13}))
    assert round(tome.gmacs, 3) == 2.706
    assert tome.tokens[0] == (197, 184) and tome.tokens[-1] == (54, 41)
    assert tome.gmacs == pytest.approx(tome.linear + tome.attention + tome.reducer)
    assert round(tome.reducer, 4) == 0.0034
    assert tome.params == 22050664
    for r, expected in ((8, 3.4210), (16, 2.2937)):
        count = zoo.profile(zoo.wrap(deit(), "tome", {"name": "constant_r", "r": r}))
        assert round(count.gmacs, 4) == pytest.approx(expected, abs=1.01e-4)


def test_published_number_of_evit() -> None:
    schedule = {"name": "keep_rate", "rate": 0.7, "rounding": "ceil", "of": "current"}
    assert round(zoo.profile(zoo.wrap(deit(), "evit", schedule)).gmacs, 2) == 3.03


@pytest.mark.parametrize("row", parts(METHODS, 1, of=2))
def test_three_counts_agree_for_every_method(row: Row) -> None:
    check(model(row))


@pytest.mark.parametrize("name", ALL)
def test_three_counts_agree_for_every_family(name: str) -> None:
    # timm 1.0.20 multiplies positions by frequencies as matrices, which both counters see.
    rel = 2e-3 if OLD and name == "rope_mixed" else 1e-5
    check(zoo.wrap(backbone(name), "tome", {"name": "constant_r", "r": 8}), rel)


def check(m: torch.nn.Module, rel: float = 1e-5) -> None:
    ours = zoo.profile(m).gmacs
    assert fvcore_gmacs(m, images(2)) == pytest.approx(ours, rel=rel)
    assert torch_gmacs(m, images(2)) == pytest.approx(ours, rel=rel)


def test_a_tracer_counts_tokens_as_we_do():
    # 0.7 * 0.7 of 100 tokens is 48.99...; as float32, in which a tracer computes, it is 49.
    m = zoo.create_model("test_vit", "topk", {"name": "keep_rate", "rate": 0.7}).eval()
    assert m.token_counts()[3] == (71, 49)
    assert fvcore_gmacs(m, torch.randn(1, 3, 160, 160)) == pytest.approx(zoo.profile(m).gmacs)


def test_dense_models_need_no_wrapper() -> None:
    m = backbone("plain")
    assert zoo.profile(m).gmacs == zoo.profile(zoo.wrap(m, None)).gmacs


def test_other_image_sizes() -> None:
    m = zoo.wrap(backbone("plain"), "topk", {"name": "keep_rate", "rate": 0.5})
    assert zoo.profile(m, img_size=64).tokens[0][0] == 257
    assert zoo.profile(m, img_size=(24, 40)).tokens[0][0] == 61
    with pytest.raises(ZooError, match="30x30 is not divisible by the patch size 4x4"):
        zoo.profile(m, img_size=30)


def test_diffrate_convention_is_named_and_not_the_default() -> None:
    m = zoo.wrap(deit(), "tome", {"name": "constant_r", "r": 13})
    ours, theirs = zoo.profile(m), zoo.profile(m, convention="diffrate")
    assert ours.convention == "zoo"
    assert theirs.reducer == 0.0
    assert theirs.dense * 1e9 == pytest.approx(4599177216)
    with pytest.raises(ZooError, match="convention must be one of"):
        zoo.profile(m, convention="paper")


def test_the_printed_profile_names_its_parts() -> None:
    text = str(zoo.profile(zoo.wrap(deit(), "tome", {"name": "constant_r", "r": 13})))
    assert "2.7061 GMACs (-41.2% of 4.5989 dense)" in text and "reducer 0.0034" in text
    assert len(text.splitlines()) == 3 + 12


POOLED = [
    ("test_vit", {"global_pool": kind, **more})
    for kind in ("", "avg", "avgmax", "max", "map", *(() if OLD else ("prr",)))
    for more in ({}, {"reg_tokens": 3}, {"class_token": False}, {"pool_include_prefix": True})
] + [
    ("eva02_tiny_patch14_224", {"global_pool": kind, "depth": 2, "img_size": 56, **more})
    for kind in ("", "avg", "avgmax", "max", "map")
    for more in ({}, {"num_reg_tokens": 2}, {"attn_pool_mlp_ratio": 2.0})
]


@pytest.mark.parametrize(("case", "classes"), crossed(POOLED, [10, 0], lambda _: "head"))
def test_every_kind_of_pooling_costs_what_torch_counts(case, classes) -> None:
    name, options = case
    with hollow():
        m = timm.create_model(name, num_classes=classes, **options)
    x = torch.empty(1, 3, *m.patch_embed.img_size, device="meta")
    assert round(zoo.profile(m).gmacs * 1e9) == round(torch_gmacs(m, x) * 1e9)
    if options["global_pool"] != "prr":
        merged = zoo.wrap(m, {"name": "tome"}, {"name": "constant_r", "r": 3})
        assert zoo.profile(merged).gmacs == pytest.approx(torch_gmacs(merged, x), rel=1e-6)


@pytest.mark.parametrize(("name", "options"), POOLED, ids=str)
def test_pooling_with_sizes_reads_the_tokens_that_pooling_without_them_reads(name, options) -> None:
    if options["global_pool"] == "prr":
        pytest.skip("attends among all tokens and takes no sizes")
    m = timm.create_model(name, num_classes=10, **options).eval()
    t = Tokens.start(torch.randn(2, 9 + m.num_prefix_tokens, m.embed_dim), m.num_prefix_tokens)
    with torch.no_grad():
        assert torch.allclose(head(m, t._replace(unit=False)), m.forward_head(t.x), atol=1e-5)

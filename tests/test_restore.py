"""Dense outputs: timm's own with nothing reduced, and what removed patches get otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from reduction import Tokens, unmerge
from reduction.functional.restoring import POLICIES, knn_weights, restored
from tests.cases import METHODS, Row, backbone, images
from tests.families import FAMILIES, family, pictures
from zoo.errors import ZooError

R8 = {"name": "constant_r", "r": 8}
NOTHING = {"name": "constant_r", "r": 0}
DENSE = ["plain", "registers", "gap", "eva02", "dinov3", "beit", "relpos", "naflex", "things"]


def model_of(name: str) -> Any:
    return family(name) if name in FAMILIES else backbone(name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DENSE)
def test_with_nothing_reduced_every_policy_is_timm(name: str, policy: str) -> None:
    own = model_of(name)
    x = pictures(own)
    reduced = zoo.wrap(own, "tome", NOTHING).eval()
    with torch.no_grad():
        for options in (
            {},
            {"indices": [0, -1], "norm": True, "output_fmt": "NLC"},
            {"indices": 2, "return_prefix_tokens": True, "intermediates_only": True},
            {"indices": [1], "stop_early": True, "intermediates_only": True},
        ):
            if options.get("return_prefix_tokens") and not own.num_prefix_tokens:
                continue
            wanted = own.forward_intermediates(x, **options)
            assert same(reduced.forward_intermediates(x, restore=policy, **options), wanted)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b))


def tokens(kept: list[int], source: list[int], n: int = 6) -> Tokens:
    """Tokens that sit at some patches of one image, and hold those that `source` says."""
    x = torch.arange(10.0, 10.0 + len(kept)).view(1, -1, 1)
    t = Tokens.start(x, 0, track=True)
    return t._replace(origin=torch.tensor([kept]), source=torch.tensor([source]))


def test_merged_copies_the_token_that_stands_for_a_patch() -> None:
    t = tokens([0, 4], [0, 0, -1, 1, 1, -1])
    assert restored(t, (2, 3), "merged").flatten().tolist() == [10, 10, 0, 11, 11, 0]


def test_zero_leaves_what_sits_somewhere() -> None:
    t = tokens([0, 4], [0, 0, -1, 1, 1, -1])
    assert restored(t, (2, 3), "zero").flatten().tolist() == [10, 0, 0, 0, 11, 0]
    hidden = t._replace(mask=torch.tensor([[True, False]]))
    assert restored(hidden, (2, 3), "zero").flatten().tolist() == [10, 0, 0, 0, 0, 0]
    nowhere = t._replace(origin=torch.tensor([[0, -1]]))
    assert restored(nowhere, (2, 3), "zero").flatten().tolist() == [10, 0, 0, 0, 0, 0]


def test_nearest_takes_the_first_of_equally_near_tokens() -> None:
    # Patches 0 1 2 / 3 4 5; tokens sit at 5 and at 0: 2, and the first row's middle, are nearer to
    # one of them, 3 to the other; 1 and 4 are told apart by distance alone.
    t = tokens([5, 0], [1, -1, -1, -1, -1, 0])
    found = restored(t, (2, 3), "nearest").flatten().tolist()
    assert found == [11, 11, 10, 11, 10, 10]
    # Both corners of one row are as near to its middle: the first patch of them counts.
    tie = tokens([2, 0], [1, -1, 0, -1, -1, -1])
    assert restored(tie, (2, 3), "nearest").flatten().tolist() == [11, 11, 10, 11, 11, 10]


def test_nearest_is_the_smallest_distance_on_any_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = 5, 7
    kept = torch.randperm(rows * columns, generator=generator)[:6]
    t = Tokens.start(torch.randn(1, 6, 3, generator=generator), 0, track=True)
    t = t._replace(origin=kept.unsqueeze(0))
    found = restored(t, (rows, columns), "nearest")[0]
    for patch in range(rows * columns):
        spots = [
            ((patch // columns - k // columns) ** 2 + (patch % columns - k % columns) ** 2, k, i)
            for i, k in enumerate(kept.tolist())
        ]
        assert torch.equal(found[patch], t.x[0, min(spots)[2]])


def test_knn_weights_are_expedits() -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.randn(2, n, 4, generator=generator) * 3 for n in (9, 5))
    found = knn_weights(before, after, neighbours=3, temperature=0.5)
    for b in range(2):
        for p in range(9):
            d = (before[b, p] - after[b]).square().sum(-1)
            w = (-0.5 * d).exp() * (d <= d.sort().values[2] + 1e-6)
            assert torch.allclose(found[b, p], w / w.sum(), atol=1e-4)
    assert torch.allclose(found.sum(2), torch.ones(2, 9))
    # Ties stay, features far from all others have weights, padding has none.
    twice = knn_weights(before, torch.cat([after, after], 1), neighbours=1, temperature=0.5)
    assert ((twice > 0).sum(2) == 2).all()
    far = knn_weights(before + 1e4, after, 3, 0.5)
    assert far.isfinite().all() and torch.allclose(far.sum(2), torch.ones(2, 9))
    live = torch.tensor([[True, False, True, True, True]] * 2)
    assert not knn_weights(before, after, 5, 0.5, live)[:, :, 1].any()


FIRST = [r for r in METHODS if r.id in ("tome", "topk", "evit", "ats", "cropr", "sinkhorn", "tca")]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("row", FIRST, ids=lambda row: row.id)
def test_every_policy_gives_every_patch_a_row(row: Row, policy: str) -> None:
    model = zoo.wrap(backbone("plain"), row.reducer(), dict(row.schedule)).eval()
    x = images(2)
    with torch.no_grad():
        _, info = model(x, return_info="trace")
        maps = model.forward_intermediates(
            x, output_fmt="NLC", intermediates_only=True, restore=policy
        )
        alone = model.forward_intermediates(
            x[1:], output_fmt="NLC", intermediates_only=True, restore=policy
        )
    for found, own, t in zip(maps, alone, info.trace, strict=True):
        assert found.shape == (2, 64, 48) and found.isfinite().all()
        assert torch.allclose(found[1], own[0], atol=1e-4)
        if policy == "merged":
            assert torch.equal(found, unmerge(t))
        elif policy == "zero":
            sits = torch.zeros(2, 64, dtype=torch.bool)
            for b in range(2):
                real = t.origin[b] >= 0
                real &= True if t.mask is None else t.mask[b, t.prefix :]
                sits[b, t.origin[b][real]] = True
            assert torch.equal(found.ne(0).any(-1), sits)
        elif policy == "knn" and t.n < 64:
            # Means of tokens that are left, to rounding.
            assert found.max() <= t.patches.max() + 1e-3
            assert found.min() >= t.patches.min() - 1e-3


def test_knn_goes_back_reduction_by_reduction() -> None:
    schedule = {"name": "keep_rate", "rate": 0.5, "blocks": [1, 2]}
    model = zoo.wrap(backbone("plain"), "topk", schedule).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(
            images(1), output_fmt="NLC", intermediates_only=True, restore="knn"
        )
        dense = model.backbone.forward_intermediates(
            images(1), output_fmt="NLC", intermediates_only=True
        )
        nothing = model.forward_intermediates(
            images(1), output_fmt="NLC", intermediates_only=True, restore="zero"
        )
    assert torch.equal(maps[0], dense[0])
    near, blank = ((m[1] - dense[1]).square().mean() for m in (maps, nothing))
    assert near < blank


def test_the_model_may_say_what_it_gives() -> None:
    from timm.models._features import FeatureGetterNet

    model = zoo.wrap(backbone("plain"), "topk", {"name": "keep_rate"}).eval()
    model.restoring = "nearest"
    net = FeatureGetterNet(model, out_indices=(1, 3), prune=False)
    with torch.no_grad():
        expected = model.forward_intermediates(
            images(), [1, 3], intermediates_only=True, restore="nearest"
        )
        assert same(net(images()), expected)
        layers = model.get_intermediate_layers(images(), 2, reshape=True, restore="zero")
        wanted = model.forward_intermediates(images(), 2, intermediates_only=True, restore="zero")
        assert same(layers, wanted)


def test_wrong_arguments() -> None:
    model = zoo.wrap(backbone("plain"), "topk", {"name": "keep_rate"}).eval()
    for bad, message in (
        ({"restore": "linear"}, "restore must be one of merged, nearest, zero, knn, got 'linear'"),
        ({"attn_mask": torch.ones(1, 1, 65, 65)}, "attn_mask and is_causal are not possible"),
        ({"is_causal": True}, "attn_mask and is_causal are not possible"),
    ):
        with pytest.raises(ZooError, match=message):
            model.forward_intermediates(images(), **bad)

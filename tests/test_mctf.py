"""MCTF: matching in both directions, fused maps, and where they are used."""

from __future__ import annotations

import pytest
import timm
import torch

import zoo
from reduction.assignment import apply
from reduction.counts import Budget, Step
from reduction.functional.fusion import fuse_map, two_way_matching
from reduction.methods.mctf import MCTF
from reduction.mixins.consistency import class_gap, confident
from reduction.mixins.training import Outcome
from reduction.schedules.constant_r import ConstantR
from reduction.schedules.keep_rate import KeepRate
from reduction.schedules.part import Part
from reduction.tokens import Signals, Tokens
from tests.cases import backbone, images
from zoo.adapters.hollow import hollow
from zoo.errors import ZooError

R8 = {"name": "constant_r", "r": 8}


def build(schedule=R8, name="plain", **args):
    return zoo.wrap(backbone(name), {"name": "mctf", **args}, schedule).eval()


def test_a_chain_lands_in_one_group() -> None:
    """With A = 1, 3, 5 and B = 0, 2, 4: A's 3 joins B's 2, and 2 then joins A's 1."""
    weight = torch.tensor([[[0.1, 0.7, 0.2], [0.0, 0.9, 0.0], [0.3, 0.1, 0.2]]])
    slot, leader = two_way_matching(weight, 2, first=1)
    assert leader.tolist() == [[1, 5, 0, 4]]
    assert slot.tolist() == [[2, 0, 0, 0, 3, 1]]


def test_the_second_direction_leaves_receivers_in_descending_order() -> None:
    weight = torch.tensor([[[0.2, 0.9, 0.3], [0.1, 0.0, 0.4]]])
    slot, leader = two_way_matching(weight, 1, first=1)
    # One token leaves, and it leaves B: 2 joins 1. What stays of B: 4 with 0.4, 0 with 0.2.
    assert leader.tolist() == [[1, 3, 4, 0]]
    assert slot.tolist() == [[3, 0, 0, 1, 2]]
    one_way = two_way_matching(weight, 1, first=1, both=False)
    assert one_way.leader.tolist() == [[3, 0, 2, 4]]
    assert one_way.slot.tolist() == [[1, 2, 2, 0, 3]]


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("n", [2, 3, 7, 12])
@pytest.mark.parametrize("first", [0, 1])
def test_groups_are_a_partition(n: int, first: int, both: bool) -> None:
    a = len(range(first, n, 2))
    for r in range(1, n // 2 + 1):
        slot, leader = two_way_matching(torch.rand(3, a, n - a), r, first, both)
        assert torch.equal(slot.gather(1, leader), torch.arange(n - r).expand(3, -1))
        assert slot.min() >= 0 and slot.max() == n - r - 1


def test_rows_of_a_fused_map_add_up_to_one() -> None:
    map_ = torch.randn(2, 3, 6, 6).softmax(-1)
    slot = torch.tensor([[0, 1, 1, 2, 3, 1], [0, 3, 2, 1, 0, 0]])
    share = torch.rand(2, 6)
    share = share / torch.zeros(2, 4).scatter_add(1, slot, share).gather(1, slot)
    out = fuse_map(map_, slot, share, 4)
    assert torch.allclose(out.sum(-1), torch.ones(2, 3, 4), atol=1e-6)
    group = torch.nn.functional.one_hot(slot, 4).float()
    expected = (group * share.unsqueeze(2)).transpose(1, 2).unsqueeze(1) @ map_ @ group.unsqueeze(1)
    assert torch.allclose(out, expected, atol=1e-6)
    largest = fuse_map(map_, slot, None, 4)
    keys = map_ @ group.unsqueeze(1)
    assert torch.allclose(largest[0, :, 1], keys[0][:, [1, 2, 5]].amax(1))


def test_groups_of_one_permute_the_map() -> None:
    map_, order = torch.rand(1, 2, 5, 5), torch.tensor([[0, 3, 1, 4, 2]])
    out = fuse_map(map_, order, torch.ones(1, 5), 5)
    back = order[0].argsort()
    assert torch.equal(out, map_[:, :, back][..., back])


@pytest.mark.parametrize("osa", [1, 2])
@pytest.mark.parametrize(
    "name", ["plain", "qk_norm", "eva02", "eva02_fused", "dinov3", "post_norm"]
)
def test_parts_of_the_attention_are_the_attention(osa: int, name: str, monkeypatch) -> None:
    """With groups of one in the old order, everything read again is what it was."""
    model = build(osa=osa, name=name)

    def alone(self, t, column, step):
        stay = torch.arange(t.n).expand(t.x.shape[0], -1)
        from reduction.assignment import Merge

        return Merge(stay, stay, coef=torch.ones(t.x.shape[0], t.n))

    monkeypatch.setattr(MCTF, "_grouped", alone)
    monkeypatch.setattr(MCTF, "_fused_map", lambda self, t, map_, merge, keep: map_)
    with torch.no_grad():
        dense = model.backbone(images())
        assert torch.allclose(model(images()), dense, atol=2e-5)


def test_variants_differ_and_criteria_can_be_switched_off() -> None:
    outs = {}
    variants = [{}, {"osa": 0}, {"osa": 2}, {"both": False}, {"pooling": "size"}]
    variants += [{"pooling": "max"}, {"pooling": "mean"}, {"tau_sim": 0.0}, {"tau_info": 0.0}]
    variants += [{"tau_size": 0.2, "tau_info": 1.0}, {"tau_info": 1.0}]
    with torch.no_grad():
        for args in variants:
            outs[str(args)] = build(**args)(images())
    names = list(outs)
    for i, a in enumerate(names):
        assert outs[a].isfinite().all()
        for b in names[i + 1 :]:
            assert not torch.allclose(outs[a], outs[b], atol=1e-5), (a, b)


def test_attraction_is_the_product_of_the_criteria() -> None:
    x = torch.randn(1, 5, 4)
    t = Tokens.start(x, 1)._replace(size=torch.tensor([[1.0, 2, 1, 4, 1]]), unit=False)
    column = torch.tensor([[0.1, 0.2, 0.4, 0.1, 0.2]])
    reducer = MCTF(tau_sim=1, tau_info=2, tau_size=4)
    p = x[:, 1:]
    for i, a in enumerate((1, 3)):
        for j, b in enumerate((0, 2)):
            cosine = torch.cosine_similarity(p[0, a], p[0, b], dim=0)
            c = (0.1 / column[0, 1 + a]) * (0.1 / column[0, 1 + b])
            e = 1 / (t.size[0, 1 + a] * t.size[0, 1 + b])
            expected = (cosine + 1) / 2 * c**0.5 * e**0.25
            assert torch.isclose(reducer.attraction(t, column)[0, i, j], expected, atol=1e-6)


def test_the_floor_is_kept_and_unattended_tokens_are_no_trouble() -> None:
    model = build({"name": "constant_r", "r": 40, "strict": False}, floor=9)
    assert [n for _, n in model.token_counts()] == [33, 17, 10, 10]
    t = Tokens.start(torch.randn(2, 9, 4), 1, track=True)
    reducer = MCTF(osa=0)
    step = Step(0, 4, Budget(5), (2, 4))
    out = reducer.reduce(t, Signals(column=torch.zeros(2, 9)), step)
    assert out.n == 5 and out.x.isfinite().all()
    same = apply(t, reducer._grouped(t, torch.ones(2, 9), step))
    assert torch.allclose(out.x, same.x, atol=1e-5)


def test_published_cost_without_the_matching() -> None:
    with hollow():
        deit = timm.create_model("deit_small_patch16_224")
    cost = zoo.profile(zoo.wrap(deit, "mctf", {"name": "constant_r", "r": [0] + [16] * 11}))
    assert round(cost.linear + cost.attention, 2) == 2.58
    assert cost.tokens[-1][1] == 21 and cost.reducer > 0


def test_the_gradient_passes_through_the_fused_map() -> None:
    """Queries and keys of a reducing block learn; the matching itself has no gradient."""
    model = build({"name": "constant_r", "r": [0, 0, 20, 0]}).train()
    model(images()).square().mean().backward()
    grad = model.backbone.blocks[2].attn.qkv.weight.grad
    assert all(part.abs().max() > 0 for part in grad.chunk(3))


def test_the_second_pass_removes_a_share() -> None:
    half = Part(ConstantR(8), 0.5)
    assert half.budget(0, 4, 64, 64) == Budget(60)
    assert Part(ConstantR(8), 0.0).budget(0, 4, 64, 64) is None
    assert Part(KeepRate(0.5, [1]), 0.5).budget(1, 4, 64, 64) == Budget(48)
    model = build(teacher_share=0.0).train()
    labels = torch.tensor([1, 2])
    teacher = model.peer(images(), labels)
    assert torch.allclose(teacher.logits, model.backbone(images()), atol=1e-5)
    assert build(teacher_share=None).peer(images(), labels) is None
    assert zoo.wrap(backbone("plain"), "tome", R8).peer(images(), labels) is None


def test_losses_of_training() -> None:
    model = build(confidence=0.0, consistency=2.0, teacher_share=0.0).train()
    labels = torch.tensor([1, 2])
    logits, info = model(images(), return_info="trace")
    teacher = model.peer(images(), labels)
    outcome = model.outcome(info, logits, labels, teacher)
    losses = model.reducer.auxiliary_losses(outcome)
    gap = (teacher.final.x[:, 0] - outcome.final.x[:, 0]).square().mean(1)
    assert torch.allclose(class_gap(outcome), gap)
    assert torch.allclose(losses["consistency"], 2 * gap.mean())
    expected = torch.nn.functional.cross_entropy(teacher.logits, labels)
    assert torch.allclose(losses["teacher"], expected)
    grad = torch.autograd.grad(losses["consistency"], teacher.final.x, allow_unused=True)
    assert grad[0] is None
    assert model.reducer.auxiliary_losses(Outcome((), outcome.final, logits, labels)) == {}


def test_confidence_counts_mixed_labels_together() -> None:
    logits = torch.tensor([[0.3, 0.3, 0.4], [0.3, 0.3, 0.4]]).log()
    assert confident(logits, torch.tensor([2, 0]), 0.35).tolist() == [1, 0]
    soft = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.8, 0.1]])
    assert confident(logits, soft, 0.5).tolist() == [1, 0]


def test_lightning_runs_both_passes() -> None:
    from zoo.lit.classifier import Classifier

    module = Classifier(build(confidence=0.0)).train()
    logged = {}
    module.log = lambda name, value, **kwargs: logged.setdefault(name, value)
    module.training_step((images(), torch.tensor([1, 2])), 0).backward()
    assert {"train/loss_teacher", "train/loss_consistency"} <= set(logged)
    assert logged["train/loss_consistency"] > 0


@pytest.mark.parametrize(
    "args",
    [{"osa": 3}, {"tau_sim": -1}, {"pooling": "sum"}, {"floor": 0}, {"teacher_share": 2}],
)
def test_arguments_out_of_range_are_refused(args) -> None:
    with pytest.raises(ZooError, match=next(iter(args))):
        MCTF(**args)

"""Learned thresholds: removal against a slow reference, and training against removal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reduction
import zoo
from reduction.assignment import Merge, apply
from reduction.functional import thresholds
from reduction.functional.received import column_mean
from reduction.tokens import Tokens
from tests.cases import backbone, images
from zoo.errors import ZooError
from zoo.lit.classifier import Classifier
from zoo.lit.optim import create_optimizer
from zoo.model.reduced import ReducedViT

NAMES = ("ltmp", "ltm", "ltp")
R8 = {"name": "constant_r", "r": 8}


def model(name: str, kind: str = "plain", merge: float = 0.6, prune: float = 0.012, **args):
    """A model whose thresholds remove something, and different numbers per image."""
    m = zoo.wrap(backbone(kind), {"name": name, "limit": False, **args}, R8).eval()
    with torch.no_grad():
        if m.reducer.merge_threshold is not None:
            m.reducer.merge_threshold.fill_(merge)
        if m.reducer.prune_threshold is not None:
            m.reducer.prune_threshold.fill_(prune)
    return m


def slow(m: ReducedViT, image: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """One image by the description, row by row; the prefix is one class token."""
    net, reducer = m.backbone, m.reducer
    x = net.norm_pre(net.pos_drop(net._pos_embed(net.patch_embed(image))))
    size, counts = torch.ones(x.shape[1]), list[int]()
    for i, block in enumerate(net.blocks):
        n, attn = x.shape[1], block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) * attn.scale
        map_ = (logits + size.log() if reducer.merges else logits).softmax(-1)
        x = x + attn.proj((map_ @ v).transpose(0, 1).reshape(1, n, -1))
        score = map_.mean((0, 1))
        rows, gone = list(range(n)), set()
        if reducer.merges:
            unit = nn.functional.normalize(k.mean(0), dim=-1)
            groups = {j: [j] for j in range(n)}
            for a in range(2, n, 2):
                b = max(range(1, n, 2), key=lambda j: float(unit[a] @ unit[j]))
                if unit[a] @ unit[b] > reducer.merge_threshold[i]:
                    groups[b].append(a)
                    gone.add(a)
            rows = [*range(0, n, 2), *range(1, n, 2)]
            total = torch.stack([size[groups[j]].sum() for j in range(n)])
            mean = [(x[0, groups[j]] * size[groups[j], None]).sum(0) for j in range(n)]
            x = torch.stack(mean)[None] / total[None, :, None]
            size = total
            score = torch.stack([score[groups[j]].max() for j in range(n)])
        if reducer.prunes:
            gone |= {j for j in range(1, n) if score[j] <= reducer.prune_threshold[i]}
        rows = [j for j in rows if j not in gone]
        x, size = x[:, rows], size[rows]
        x = x + block.mlp(block.norm2(x))
        counts.append(len(rows))
    return net.head(net.norm(x)[:, 0]), tuple(counts)


@pytest.mark.parametrize("name", NAMES)
def test_removal_is_the_description(name: str) -> None:
    m, x = model(name), images(4)
    with torch.no_grad():
        logits, info = m(x, return_info="trace")
        expected, counts = zip(*(slow(m, x[b : b + 1]) for b in range(4)), strict=True)
    assert torch.allclose(logits, torch.cat(expected), atol=2e-5)
    assert len(set(counts)) > 1, "the images must differ, or padding is not tested"
    for i, t in enumerate(info.trace):
        alive = torch.full((4,), t.x.shape[1]) if t.mask is None else t.mask.sum(1)
        assert alive.tolist() == [c[i] for c in counts]
        # What was merged is counted, what was pruned is not, and padding holds nothing.
        held = (t.source >= 0).sum(1)
        real = torch.ones_like(t.size) if t.mask is None else t.mask
        assert torch.equal((t.size * real).sum(1) - 1, held.float())


@pytest.mark.parametrize("kind", ["registers", "gap", "eva02"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_invisible(name: str, kind: str) -> None:
    m, x = model(name, kind), images(4)
    with torch.no_grad():
        together, info = m(x, return_info=True)
        single = [m(x[b : b + 1], return_info=True) for b in range(4)]
    assert torch.allclose(together, torch.cat([logits for logits, _ in single]), atol=2e-5)
    for b, (_, alone) in enumerate(single):
        assert alone.final.mask is None
        assert torch.equal(alone.source[0], info.source[b])
    assert info.final.mask is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_training_form_agrees_with_removal(name: str, monkeypatch) -> None:
    monkeypatch.setattr(thresholds, "EPSILON", 0.0)
    m, x = model(name), images(3)
    with torch.no_grad():
        expected, info = m(x, return_info="trace")
        logits, masked = m.train()(x, return_info="trace")
    assert torch.allclose(logits, expected, atol=2e-5)
    for removed, kept in zip(info.trace, masked.trace, strict=True):
        alive = removed.mask if removed.mask is not None else torch.ones_like(removed.size)
        assert torch.equal(alive.sum(1).long(), (kept.policy > 0.5).sum(1))


def test_the_release_lets_masked_tokens_vote() -> None:
    x = images(2)
    with torch.no_grad():
        ours, theirs = (model("ltmp", variant=v).train()(x) for v in ("live", "release"))
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_at_their_ends_change_nothing(name: str) -> None:
    m, x = model(name, merge=1.0, prune=0.0), images()
    with torch.no_grad():
        logits, info = m(x, return_info=True)
        assert torch.allclose(logits, m.backbone(x), atol=2e-5)
    assert (info.size == 1).all() and info.tokens[-1][1] == 65


@pytest.mark.parametrize("name", NAMES)
def test_more_is_removed_by_lower_merging_and_higher_pruning_thresholds(name: str) -> None:
    counts = []
    for merge, prune in ((0.5, 0.005), (0.2, 0.012), (-1.0, 0.02), (-1.0, 1.0)):
        m = model(name, merge=merge, prune=prune)
        with torch.no_grad():
            t = m(images(3), return_info="trace")[1].trace[0]
        alive = torch.full((3,), t.x.shape[1]) if t.mask is None else t.mask.sum(1)
        counts.append(alive)
    assert all((a >= b).all() for a, b in zip(counts, counts[1:], strict=False))
    assert (counts[0] > counts[-1]).all()
    # One patch is left even where every one falls short.
    assert (counts[-1] >= 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_image_exceeds_the_limit(name: str) -> None:
    m = model(name, limit=True, merge=1.0, prune=0.0)
    with torch.no_grad():
        _, info = m(images(3), return_info=True)
    assert list(info.tokens) == m.token_counts() and info.final.mask is None


def test_without_a_limit_a_graph_keeps_all_rows() -> None:
    m, x = model("ltmp"), images(2)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(m, fullgraph=True, backend="eager")(x)
        assert torch.allclose(got, m(x), atol=1e-5)


def test_the_budget_loss_by_hand() -> None:
    assert thresholds.cost_ratio([1.0] * 4, 65, 48) == pytest.approx(1.0)
    n, c = 10.0, 4.0
    dense = 6 * n * c * c + n * n * c
    first = 2 * n * c * c + n * n * c + 4 * 0.5 * n * c * c
    second = 2 * 5 * c * c + 5 * 5 * c + 4 * 0.5 * n * c * c
    expected = (first + second) / (2 * dense)
    assert thresholds.cost_ratio([0.5, 0.5], 10, 4) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_loss_pulls_to_the_cost_of_the_schedule(name: str) -> None:
    m = model(name, prune=0.002, merge=0.6).train()
    shares = [(n + m.prefix - 1) / 65 for _, n in m.token_counts()]
    assert m.reducer._goal == pytest.approx(thresholds.cost_ratio(shares, 65, 48))
    logits, info = m(images(4), return_info="trace")
    labels = torch.zeros(4, dtype=torch.int64)
    loss = m.auxiliary_losses(info, logits, labels)["budget"]
    ratio = thresholds.cost_ratio([t.policy.mean() for t in info.trace], 65, 48)
    expected = 10 * (ratio.item() - m.reducer._goal) ** 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    # More pruning and more merging cost less.
    ratio.backward()
    if m.reducer.prunes:
        assert (m.reducer.prune_threshold.grad < 0).all()
    if name == "ltm":
        assert (m.reducer.merge_threshold.grad > 0).all()


def test_thresholds_stay_between_zero_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.lit.classifier.check_step", lambda *given: None)  # asks the trainer
    m = model("ltmp", merge=1.4, prune=-0.2)
    Classifier(m, train_only=["reducer.*"]).on_train_batch_end(None, None, 0)
    assert (m.reducer.merge_threshold == 1).all() and (m.reducer.prune_threshold == 0).all()


def test_the_thresholds_take_different_learning_rates() -> None:
    m = model("ltmp")
    made = create_optimizer(m.reducer, lr=0.1, lr_factors={"prune_*": 0.02}, fused=False)
    rates = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
    assert rates[id(m.reducer.prune_threshold)] == pytest.approx(0.002)
    assert rates[id(m.reducer.merge_threshold)] == pytest.approx(0.1)
    with pytest.raises(ZooError, match="fits none of the trained parameters"):
        create_optimizer(m.reducer, lr_factors={"head.*": 0.1})


def test_bad_arguments_are_named() -> None:
    for wrong, words in (
        ({"tau": 0}, "tau must be positive"),
        ({"target": 1.5}, "target must be in"),
        ({"limit": 1}, "limit must be true or false"),
        ({"variant": "paper"}, "variant must be one of"),
    ):
        with pytest.raises(ZooError, match=words):
            reduction.create("ltmp", **wrong)


def ragged() -> Tokens:
    t = Tokens.start(torch.arange(10.0).view(1, 5, 2).repeat(2, 1, 1), 1, track=True)
    return t._replace(mask=torch.tensor([[True] * 5, [True, True, True, False, False]]))


def test_groups_leave_padding_out() -> None:
    slot = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    leader = torch.tensor([[0, 2], [0, 1]])
    out = apply(ragged(), Merge(slot, leader))
    assert torch.equal(out.size, torch.tensor([[1.0, 2, 2], [1, 1, 1]]))
    assert torch.equal(out.patches[1], ragged().patches[1, :2])
    assert out.mask.all() and out.source.tolist() == [[0, 0, 1, 1], [0, 1, -1, -1]]


def test_padding_groups_are_masked_and_finite() -> None:
    slot = torch.tensor([[0, 0, 1, 1], [0, 0, -1, -1]])
    leader, valid = torch.tensor([[0, 2], [0, 0]]), torch.tensor([[True, True], [True, False]])
    start = ragged()._replace(mask=None)
    out = apply(start, Merge(slot, leader, valid=valid))
    assert out.mask.tolist() == [[True, True, True], [True, True, False]]
    assert out.x.isfinite().all() and out.size[1].tolist() == [1, 2, 0]
    # Without `valid`, groups that only padding would have joined are padding.
    assert torch.equal(apply(ragged(), Merge(slot, leader)).mask, out.mask)
    with pytest.raises(ValueError, match="got both"):
        pairs = (slot[:, :1], slot[:, :1])
        apply(start, Merge(None, leader, pairs=pairs, valid=valid))


def test_attention_received_is_counted_over_real_queries() -> None:
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    live = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    map_ = (q @ k.transpose(2, 3)).softmax(-1)
    expected = torch.stack([map_[0].mean((0, 1)), map_[1, :, :5].mean((0, 1))])
    assert torch.allclose(column_mean(q, k, 1.0, live=live), expected, atol=1e-6)
    recorded = column_mean(q.requires_grad_(), k, 1.0, live=live)
    assert torch.allclose(recorded, expected, atol=1e-6)

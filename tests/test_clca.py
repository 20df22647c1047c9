"""CLCA, its two halves, and the older head: against a slow reference, and with every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reduction
import zoo
from reduction.tokens import Tokens
from tests.cases import METHODS, Row, backbone, images
from tests.covering import crossed
from zoo.errors import ZooError
from zoo.model.reduced import ReducedViT
from zoo.plugins.base import create_plugins

STAGES = {"name": "keep_rate", "rate": 0.6, "blocks": [1, 3]}


def plugged(
    plugins: Any = "clca",
    reducer: Any = None,
    schedule: Any = STAGES,
    name: str = "plain",
    **args: Any,
) -> ReducedViT:
    """A tiny model of depth 6 with plugins whose weights are not at their initial values."""
    m = backbone(name, **{"depth": 6, **args})
    torch.manual_seed(1)
    made = zoo.wrap(m, reducer, None if reducer is None else schedule, plugins)
    with torch.no_grad():
        for plugin in made.plugins:
            for value in [*plugin.parameters(), *plugin.buffers()]:
                if value.is_floating_point():
                    value.add_(torch.rand_like(value) * 0.1)
    return made.eval()


# ------------------------------------------------------------------ the method


def reference(m: ReducedViT, x: Tensor, args: dict[str, Any], blocks: list[int]) -> Tensor:
    """The pseudo-code of the specification around the model's own blocks, with plain loops."""
    net, [plugin] = m.backbone, m.plugins
    clc, head = plugin.clc, plugin.cla.net
    depth, n = len(net.blocks), args["num_clr"]
    seq = net._pos_embed(net.patch_embed(x))
    length = seq.shape[1]
    if n:
        clr = clc.clr_token + (0 if clc.clr_pos_embed is None else clc.clr_pos_embed)
        seq = torch.cat([seq, clr.expand(len(x), -1, -1)], 1)
    seq = net.norm_pre(seq)
    recovery = {*blocks, depth - 2} if args["recover_at_last"] else {*blocks}
    end = length + (n if args["pool_clr"] else 0)
    cache: list[Tensor] = []
    classes = []
    for i, block in enumerate(net.blocks):
        seq = block(seq)
        if i in recovery:
            end = seq.shape[1]
            seq = torch.cat([seq, *cache], 1)
            cache = []
        if i < max(recovery):
            if args["gap"]:
                rows = [seq[:, j] for j in range(0 if args["pool_cls"] else 1, end)]
                cache.append((sum(rows) / len(rows))[:, None])
            if n:
                cache.append(seq[:, seq.shape[1] - n :])
        if i in blocks or i == depth - 1:
            classes.append(seq[:, 0])
    y = torch.stack(classes, -1)
    y = _batch_norm(y, head.norm1)
    conv = head.dwconv
    wide = conv.out_channels // conv.in_channels
    y = torch.stack(
        [
            (y[:, c // wide] * conv.weight[c, 0]).sum(-1) + conv.bias[c]
            for c in range(conv.out_channels)
        ],
        1,
    )
    y = _batch_norm(y[..., None], head.norm2)[..., 0]
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    return y @ head.pwconv.weight[..., 0].T + head.pwconv.bias


def _batch_norm(y: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    shape = (1, -1, 1)
    y = (y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return y * norm.weight.view(shape) + norm.bias.view(shape)


PAPER = {"gap": True, "num_clr": 1, "recover_at_last": True, "pool_cls": False, "pool_clr": False}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_clr": 0},
    {"num_clr": 2, "pool_clr": True},
    {"gap": False, "recover_at_last": False},
    {"pool_cls": True, "num_clr": 3},
]


@pytest.mark.parametrize("name", ["plain", "registers", "clip"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_option_is_the_pseudo_code(variant: dict[str, Any], name: str) -> None:
    args = {**PAPER, **variant}
    m = plugged({"name": "clca", **args, "multiplier": 3, "blocks": [1, 3]}, name=name)
    x = images(2)
    with torch.no_grad():
        assert torch.allclose(m(x), reference(m, x, args, [1, 3]), atol=1e-5)


def test_defaults_are_the_papers() -> None:
    [plugin] = create_plugins("clca")
    config = plugin.config()
    assert {k: config[k] for k in PAPER} == PAPER
    assert config["multiplier"] == 2 and config["protected"] is False and config["blocks"] is None


def test_the_halves_together_are_clca() -> None:
    whole = plugged("clca", "evit")
    halves = plugged([{"name": "cla"}, {"name": "clc"}], "evit")
    for ours, theirs in (("cla", 0), ("clc", 1)):
        part = getattr(whole.plugins[0], ours)
        halves.plugins[theirs].load_state_dict(part.state_dict())
    with torch.no_grad():
        assert torch.equal(whole(images()), halves(images()))


def test_ifa_is_multiplier_zero_and_the_formula() -> None:
    ifa = plugged("ifa", "topk")
    cla = plugged({"name": "cla", "multiplier": 0}, "topk")
    cla.plugins[0].load_state_dict(ifa.plugins[0].state_dict())
    x = images()
    with torch.no_grad():
        logits, info = ifa(x, return_info="trace")
        assert torch.equal(cla(x), logits)
        y = torch.stack([info.trace[i].x[:, 0] for i in (1, 3, 5)], -1)
        net = ifa.plugins[0].net
        y = torch.relu(y @ net.mix.weight[0] + net.mix.bias)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        y = (y * net.norm.weight + net.norm.bias) @ net.fc.weight.T + net.fc.bias
    assert torch.allclose(logits, y, atol=1e-5)


def test_clc_alone_keeps_the_models_own_head() -> None:
    m = plugged("clc")
    x = images()
    with torch.no_grad():
        logits, info = m(x, return_info=True)
        assert torch.allclose(logits, m.backbone.head(m.backbone.norm(info.final.x[:, 0])))
    assert info.final.x.shape[1] == 65 + 1 + 2 + 4 + 2


def test_registers_without_a_cache() -> None:
    m = plugged({"name": "clc", "cache": False, "num_clr": 2})
    assert m.token_counts() == [(67, 67)] * 6


@pytest.mark.parametrize("layers", [[1, 3], [2]])
def test_parameter_formula_of_the_head(layers: list[int]) -> None:
    m = plugged({"name": "cla", "blocks": layers})
    d, g, k = 48, len(layers) + 1, 10
    count = sum(p.numel() for p in m.plugins.parameters())
    assert count == d * (2 * g + 8) + k * (2 * d + 1)


def test_the_clr_starts_as_the_class_token() -> None:
    m = zoo.wrap(backbone("plain", depth=6), None, None, [{"name": "clc", "num_clr": 2}])
    clc = m.plugins[0]
    assert torch.equal(clc.clr_token[:, 1], m.backbone.cls_token[:, 0])
    assert 0 < clc.clr_pos_embed.std() < 0.05
    no_rows = zoo.wrap(backbone("registers", depth=6), None, None, ["clc"])
    assert no_rows.plugins[0].clr_pos_embed is None


def test_the_clr_copies_weights_that_are_loaded_later() -> None:
    m = zoo.load("vit_digits", plugins=["clca"])
    token = m.plugins[0].clc.clr_token
    assert torch.equal(token, m.backbone.cls_token) and token.abs().max() > 0


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    ("schedule", "depth", "expected"),
    [
        ({"name": "keep_rate", "rate": 0.5, "blocks": [1, 3]}, 6, [1, 3]),
        ({"name": "keep_rate", "rate": 0.5}, 12, [3, 6, 9]),
        ({"name": "keep_rate", "rate": 0.5}, 4, [1, 2]),
        ({"name": "constant_r", "r": 4}, 12, [3, 6, 9]),
        ({"name": "per_block", "keep": [None, 40, None, None, 20, None]}, 6, [1, 4]),
        ({"name": "target_gmacs", "fraction": 0.8}, 12, [3, 6, 9]),
        ({"name": "target_gmacs", "fraction": 0.9, "blocks": [2, 4]}, 6, [2, 4]),
    ],
    ids=str,
)
def test_blocks_come_from_the_schedule(
    schedule: dict[str, Any], depth: int, expected: list[int]
) -> None:
    m = plugged("clca", "topk", schedule, depth=depth)
    assert m.plugins[0].config()["blocks"] == expected


@pytest.mark.parametrize("blocks", [[0, 3], [3, 1], [1, 1], [1, 5], [7], []], ids=str)
@pytest.mark.parametrize("plugin", ["clca", "cla", "clc", "ifa"])
def test_impossible_blocks_are_refused(plugin: str, blocks: list[int]) -> None:
    with pytest.raises(ZooError, match=rf"plugin '{plugin}': reduction blocks must increase"):
        plugged({"name": plugin, "blocks": blocks})


def test_a_schedule_with_impossible_blocks_is_refused() -> None:
    for blocks in ([0, 2], [1, 5]):
        schedule = {"name": "keep_rate", "rate": 0.5, "blocks": blocks}
        with pytest.raises(ZooError, match="choose other schedule.blocks"):
            plugged("clca", "evit", schedule)
        kept = plugged({"name": "clca", "blocks": [2, 3]}, "evit", schedule)
        assert kept.plugins[0].config()["blocks"] == [2, 3]


def test_mistakes_are_one_sentence() -> None:
    def refused(match: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(ZooError, match=match):
            plugged(*args, **kwargs)

    refused("nothing to cache", {"name": "clc", "gap": False, "num_clr": 0})
    refused("num_clr must be a whole number", {"name": "clc", "num_clr": -1})
    refused("multiplier must be a whole number", {"name": "cla", "multiplier": 1.5})
    refused("'clca' classifies by class tokens", "clca", name="gap")
    refused("needs at least 3 blocks", "clca", depth=2)
    refused("all bring a classifier", ["cla", "clca"])
    refused("use protected=false", {"name": "clca", "protected": True}, "ats")
    refused("no classes", "cla", num_classes=0)
    refused("keeps its own account", "clca", {"name": "sit", "distill": True})
    with pytest.raises(ZooError, match="two images or more"):
        plugged("cla").train()(images(1))


def test_a_model_without_class_token_takes_the_cache() -> None:
    m = plugged("clc", {"name": "topk", "score_from": "column_mean"}, name="gap")
    with torch.no_grad():
        assert m(images()).isfinite().all()


# ------------------------------------------------------------------ with reducers


def test_what_is_recovered_waits_for_the_next_stage() -> None:
    """Between recoveries a reduction leaves what was appended last alone; the next may take it."""
    schedule = {"name": "constant_r", "r": 3}
    m = plugged({"name": "clca", "blocks": [1, 3]}, "random", schedule)
    added, lost = {1: 2, 3: 4, 4: 2}, 0
    with torch.no_grad():
        _, info = m(images(), return_info="trace")
    tail = 1
    for i, t in enumerate(info.trace):
        if i in added:
            tail = added[i]
        assert (t.origin[:, t.n - tail :] == -1).all() or i > 4
        lost += 3
    assert info.tokens[-1][1] == 1 + 64 + 1 + 8 - lost


def test_protected_tokens_are_never_reduced() -> None:
    m = plugged({"name": "clca", "protected": True}, "topk")
    with torch.no_grad():
        _, info = m(images(), return_info="trace")
    assert [(t.origin == -1).sum(1).tolist() for t in info.trace] == [
        [n, n] for n in (1, 3, 3, 7, 9, 9)
    ]
    kept = [t.n - int((t.origin[0] == -1).sum()) for t in info.trace]
    assert kept == [64, 38, 38, 23, 23, 23]


def test_dpc_knn_spares_them_by_itself() -> None:
    m = plugged("clca", "dpcknn")
    assert [p.spared for p in m.plan()] == [1, 1, 3, 3, 7, 9]


@pytest.mark.parametrize("name", ["topk", "evit", "patchmerger", "sit", "dynamicvit", "tome"])
def test_counts_stay_above_zero(name: str) -> None:
    """Where the official code asks for no token at all, and averages nothing."""
    schedule = {"name": "keep_rate", "rate": 0.01, "blocks": [1, 3], "strict": False}
    m = plugged("clca", name, schedule)
    with torch.no_grad():
        logits, info = m(images(), return_info=True)
    assert logits.isfinite().all()
    assert min(after for _, after in info.tokens) >= 2


def test_padding_is_not_averaged() -> None:
    clc = plugged("clc").plugins[0]
    t = Tokens.start(torch.randn(2, 10, 48), 1)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:8] = False
    found = clc._carriers(0, t._replace(mask=mask))[:, 0]
    assert torch.allclose(found[0], t.x[0, 1:9].mean(0), atol=1e-6)
    assert torch.allclose(found[1], t.x[1, [1, 2, 3, 8]].mean(0), atol=1e-6)


rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.id)


def with_plugin(row: Row, plugin: Any = "clca", name: str = "plain", **args: Any) -> ReducedViT:
    reducer = row.reducer(name not in ("gap", "map"))
    return plugged(plugin, reducer, dict(row.schedule), name, **args)


def said_no(row: Row, plugin: Any) -> bool:
    """Whether the method takes no tokens of a plugin; then it must say so."""
    made = zoo.wrap(backbone("plain"), row.reducer(), dict(row.schedule))
    if made.reducer.added_tokens != "refuse":
        return False
    if plugin != "cla":
        with pytest.raises(ZooError, match="takes none that a plugin adds"):
            with_plugin(row, plugin)
    return plugin != "cla"


@rows
def test_every_method_takes_it(row: Row) -> None:
    """Counts as planned, an image alone as in a batch, and a gradient for every weight."""
    if said_no(row, "clca"):
        return
    m, x = with_plugin(row), images(3)
    with torch.no_grad():
        logits, info = m(x, return_info=True)
        alone = torch.cat([m(x[i : i + 1]) for i in range(3)])
    assert logits.isfinite().all() and torch.allclose(logits, alone, atol=3e-5)
    if not isinstance(m.reducer, reduction.Adaptive):
        assert list(info.tokens) == m.token_counts()
    logits, info = m.train()(x, return_info="trace")
    targets = torch.tensor([1, 2, 3])
    teacher = None
    if getattr(m.reducer, "needs_teacher", False):
        dense = zoo.wrap(m.unwrap(), None)
        taught, seen = dense(x, return_info="trace")
        teacher = dense.outcome(seen, taught, targets)
    losses = m.auxiliary_losses(info, logits, targets, teacher)
    loss = nn.functional.cross_entropy(logits, targets) + sum(losses.values())
    loss.backward()
    for name, parameter in m.plugins.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    unused = m.unused_parameters()
    for name, parameter in m.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert (parameter.grad is None) <= (name in unused or not parameter.requires_grad), name


@pytest.mark.parametrize(("row", "plugin"), crossed(METHODS, ["clc", "cla"], lambda _: "half"))
def test_every_method_takes_the_halves(row: Row, plugin: str) -> None:
    if said_no(row, plugin):
        return
    m = with_plugin(row, plugin)
    with torch.no_grad():
        logits, info = m(images(), return_info=True)
    assert logits.isfinite().all()
    if not isinstance(m.reducer, reduction.Adaptive):
        assert list(info.tokens) == m.token_counts()

"""Methods that compute attention themselves, where something is added to its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reduction
import zoo
from reduction.counts import Spec, Step
from reduction.mixins.attention import AttentionInput
from reduction.tokens import Tokens
from tests.families import FAMILIES, family, pictures

B, H, N, D = 2, 2, 9, 4
#: Of families whose attention has a bias for positions.
BIASED = [n for n in FAMILIES if n.startswith(("beit", "relpos")) and n != "relpos_shared"]


def given(bias: Tensor | None, need: frozenset[str] = frozenset()) -> AttentionInput:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=g) for _ in range(3))
    x = torch.randn(B, N, H * D, generator=g)
    return AttentionInput(q, k, v, D**-0.5, bias, 0.0, False, need, x=x)


def biases() -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    shapes = {"keys": (B, 1, 1, N), "positions": (1, H, N, N), "both": (B, H, N, N)}
    found: dict[str, Tensor | None] = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    return found | {"none": None}


def tokens(size: Tensor | None = None) -> Tokens:
    t = Tokens.start(torch.randn(B, N, H * D), 1)
    return t if size is None else t._replace(size=size, unit=False)


@pytest.mark.parametrize("kind", biases())
def test_attention_among_some_tokens_is_that_with_the_others_hidden(kind: str) -> None:
    a = given(biases()[kind])
    rows = torch.tensor([[0, 2, 3, 8], [0, 1, 5, 4]])
    hidden = torch.full((B, 1, 1, N), -torch.inf).scatter(3, rows[:, None, None], 0.0)
    whole, _ = a.plus(hidden).usual()
    few, _ = a.among(rows).usual()
    for b in range(B):
        assert torch.allclose(few[b], whole[b][:, rows[b]], atol=1e-6)


@pytest.mark.parametrize("kind", biases())
def test_adavit_leaves_tokens_out_as_its_training_hides_them(kind: str) -> None:
    method: Any = reduction.create("adavit", token_threshold=0.5)
    method.setup(Spec(H * D, H, D, 2, 1, (2, 4), 5, (None, None), "class"))
    method.eval()
    with torch.no_grad():
        gate = method.blocks[1].attn["token_select"].mlp_head
        gate.weight.normal_()
        gate.bias.zero_()
    a, t = given(biases()[kind]), tokens()
    assert a.x is not None
    with torch.no_grad():
        chosen = method.decide(t, a.x, 1)
        few, left = method._selected(a, t, chosen)
        whole = method._masked(a, t, chosen)
    taken = chosen.tokens > 0.5
    assert 0 < taken.sum() < taken.numel() and left.n < t.n
    for b in range(B):
        count = int(taken[b].sum())
        here = torch.cat([torch.zeros(1, dtype=torch.int64), taken[b].nonzero()[:, 0] + 1])
        assert torch.allclose(few[b, :, : count + 1], whole[b][:, here], atol=1e-6)


def test_g2tm_adds_to_what_is_there() -> None:
    method: Any = reduction.create("g2tm", attention="iprop")
    size = torch.rand(B, N) * 3 + 0.5
    for bias in biases().values():
        out = method.attend(given(bias), tokens(size), None).out
        own = given(bias)
        wanted = (own.logits() - size.log()[:, None, None]).softmax(-1) @ own.v
        assert torch.allclose(out, wanted, atol=1e-6)


def test_vidtldr_ranks_by_a_map_without_sizes_but_with_positions() -> None:
    method: Any = reduction.create("vidtldr")
    size = torch.rand(B, N) * 3 + 0.5
    step = Step(6, 0, (2, 4), 2, 8)
    for place in biases().values():
        a = given(place).plus(size.log()[:, None, None])
        seen = method.attend(a, tokens(size), step).signals.attn
        assert torch.allclose(seen, given(place).logits().softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", BIASED)
def test_taking_all_tokens_is_the_backbone_itself(name: str) -> None:
    backbone = family(name)
    x = pictures(backbone)
    open_gates = {"name": "adavit", "token_threshold": 0.0, "keep_layers": 9}
    rate = {"name": "keep_rate", "rate": 1.0, "blocks": [0, 2]}
    with torch.no_grad():
        expected = backbone(x)
        for reducer in (open_gates, {"name": "idlevit"}):
            if not zoo.wrap(backbone, None).tower.class_tokens(backbone):
                pytest.skip("needs a class token")
            model = zoo.wrap(backbone, reducer, rate).eval()
            assert torch.allclose(model(x), expected, atol=1e-5), reducer

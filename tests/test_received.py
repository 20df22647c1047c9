"""Attention received: one map serves output and signal, whatever parts it is computed in."""

from __future__ import annotations

import pytest
import torch

import zoo
from reduction.functional import kernels, received
from reduction.functional.attention import attention
from reduction.functional.received import attention_and_column, column_mean
from tests.cases import backbone, images

B, H, N, D = 5, 3, 9, 4


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, N, D).to(dtype) for _ in range(3))


def by_hand(q, k, v, bias, live):
    map_ = (q @ k.transpose(-2, -1) * 0.5 + (0 if bias is None else bias)).softmax(-1)
    weight = torch.ones(B, N).to(q) if live is None else live.to(q)
    column = (map_.mean(1) * weight.unsqueeze(2)).sum(1) / weight.sum(1, keepdim=True)
    return map_ @ v, column


@pytest.mark.parametrize("block", [1, 8 * H * N, 40 * H * N, 2 * 8 * H * N * N, 2**20])
@pytest.mark.parametrize("shape", [None, (B, 1, 1, N), (1, H, N, N), (B, H, N, N)])
def test_parts_of_any_size_give_the_same(
    block: int, shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received, "_BLOCK", block)
    q, k, v = tensors()
    bias = None if shape is None else torch.randn(shape, dtype=torch.float64)
    some = torch.rand(B, N) > 0.3
    some[:, 0] = True
    for live in (None, some):
        expected, column = by_hand(q, k, v, bias, live)
        out, got = attention_and_column(q, k, v, 0.5, bias, live)
        assert torch.allclose(out, expected) and torch.allclose(got, column)
        with torch.no_grad():
            assert torch.allclose(column_mean(q, k, 0.5, bias, live), column)


def test_attention_goes_through_one_map_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(torch.float32)
    need, called = frozenset({"column"}), []
    whole = kernels.dot_product_attention

    def watched(*arguments, **named):
        called.append(1)
        return whole(*arguments, **named)

    monkeypatch.setattr("reduction.functional.attention.dot_product_attention", watched)
    expected, column = by_hand(q, k, v, None, None)

    def fused(**more) -> bool:
        called.clear()
        more = {"need": need, "free": True} | more
        out, s = attention(q, k, v, scale=0.5, **more)
        if not more.get("dropout"):
            assert torch.allclose(out, expected, atol=1e-5)
        assert s.column is None or torch.allclose(s.column, column, atol=1e-6)
        return bool(called)

    assert not fused() and fused(need=frozenset()) and fused(dropout=0.5)
    assert fused(free=False)  # where no token has changed, outputs are the tower's to the last bit
    with kernels.forced("sdpa"):
        assert fused()
    q.requires_grad_()
    assert fused()  # whoever learns records it


def test_half_precision_comes_nearer_to_the_truth() -> None:
    q, k, v = tensors(torch.bfloat16)
    bias = torch.rand(B, 1, 1, N)  # sizes stay in float32
    out, column = attention_and_column(q, k, v, 0.5, bias)
    expected, exact = by_hand(q.double(), k.double(), v.double(), bias.double(), None)
    assert out.dtype == column.dtype == torch.bfloat16
    assert torch.allclose(out.double(), expected, atol=3e-2)
    assert torch.allclose(column.double(), exact, atol=2e-3)


@pytest.mark.parametrize("name", ["ltmp", "ltp", "token_pooling", "mctf"])
def test_methods_answer_as_with_the_fused_kernel(name: str) -> None:
    torch.manual_seed(0)
    model, x = zoo.wrap(backbone("plain"), name).eval(), images(3)
    with torch.no_grad():
        got = model(x)
        with kernels.forced("sdpa"):
            expected = model(x)
    assert torch.allclose(got, expected, atol=1e-5)

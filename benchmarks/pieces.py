"""What each optimisation is worth: every piece against its plain form, in turns.

    python -m benchmarks.pieces [--batch 16] [--threads 2] [--rounds 9]

Pieces are timed alone, on tensors of DeiT-S (384 features, 6 heads) with 197 tokens unless said.
The share is what a model would take longer without the piece: the difference times the calls in one
forward pass, over the time of the whole model measured in the same run. The calls have fewer tokens
in later blocks, so for those the difference is scaled by the mean share of tokens left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from benchmarks import reference, tasks
from benchmarks.models import backbone_name, plain_backbone, reduced, schedule_of
from benchmarks.timing import Step, in_turns, keep_pages
from reduction.assignment import Fuse, Merge, apply
from reduction.functional import clustering, density, kernels
from reduction.functional.attention import class_row
from reduction.functional.masking import policy_softmax
from reduction.functional.matching import bipartite_matching, head_sum
from reduction.tokens import Tokens, take_rows
from zoo.adapters import fast_linear
from zoo.model.straight import straight_blocks

WIDTH, HEADS, N = 384, 6, 197
CPU = torch.device("cpu")


class Piece(NamedTuple):
    """One optimisation.

    Attributes:
        name: What it is.
        plain: The plain form.
        fast: What the package does.
        model: Method whose time it is a share of; None gives no share.
        calls: Calls in one forward pass, each weighed by the share of tokens that are left.
    """

    name: str
    plain: Step
    fast: Step
    model: str | None = None
    calls: float = 0.0


def pieces(batch: int) -> list[Piece]:
    """All pieces, on tensors of one batch size."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, N, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    x, scale = torch.randn(batch, N, WIDTH), (WIDTH // HEADS) ** -0.5
    t = Tokens.start(x, 1)._replace(size=torch.ones(batch, N), unit=False)
    score = torch.rand(batch, N - 1)
    kept = score.topk(137, dim=1).indices
    leader = score.topk(138, dim=1).indices
    match = bipartite_matching(head_sum(k[:, :, 1:]), 13, 1)
    weights = score.scatter(1, leader[:, :-1], 0.0)
    weight = score + 0.1
    distance = clustering.squared_distances(x[:, 1:])
    first = clustering.heaviest(weight, 137)
    layer = torch.nn.Linear(WIDTH, 4 * WIDTH)
    blocks = [Block(WIDTH, HEADS).eval() for _ in range(12)]
    block, parts = blocks[0], straight_blocks(blocks[:1], x)[0]
    assert parts is not None
    few = 120
    bias = torch.rand(batch, 1, 1, few)

    def full_row() -> Tensor:
        return ((q * scale) @ k.transpose(-2, -1)).softmax(-1)[:, :, 0]

    def scatter_merge() -> Tensor:
        step: Any = type("Step", (), {"keep": N - 1 - 13})
        state = reference.State(x, t.size.unsqueeze(-1), None, k)
        stay, source, target = matched
        r = source.shape[1]

        def merged(y: Tensor) -> Tensor:
            senders, receivers = y[:, ::2], y[:, 1::2]
            receivers = reference._scatter(
                receivers, target, reference.gather(senders, source), "sum"
            )
            return torch.cat([reference.gather(senders, stay), receivers], 1)

        assert r == N - 1 - step.keep
        new = merged(state.size)
        return merged(state.x * state.size) / new

    matched = reference._bipartite(reference.State(x, t.size.unsqueeze(-1), None, k), 13)
    rest = score.argsort(dim=1)[:, :59]

    def gathered_rest() -> Tensor:
        extra = reference.gather(x[:, 1:], rest) * score.gather(1, rest).unsqueeze(-1)
        rows = reference.gather(x[:, 1:], kept)
        return torch.cat([x[:, :1], rows, extra.sum(1, keepdim=True)], 1)

    def modules() -> Tensor:
        y = x[:1]
        for one in blocks:
            y = one(y)
        return y

    def straight() -> Tensor:
        y = x[:1]
        for one in straight_blocks(blocks, y):
            assert one is not None
            y = one.mlp(one.attention(y, None, frozenset(), 1, False)[0])
        return y

    def masked(own: bool) -> Step:
        logits = torch.randn(batch // 2 or 1, HEADS, N, N)
        policy = torch.ones(batch // 2 or 1, N)

        def step() -> None:
            with torch.inference_mode(False), torch.enable_grad():
                z = logits.detach().clone().requires_grad_()
                p = policy.detach().clone().requires_grad_()
                out = policy_softmax(z, p) if own else _plain_policy(z, p)
                torch.autograd.grad(out, (z, p), logits)

        return step

    def linear(mode: fast_linear.Mode, rows: int) -> Step:
        y = torch.randn(batch, rows, WIDTH)

        def step() -> None:
            with fast_linear.using(mode):
                fast_linear.linear(y, layer.weight, layer.bias)

        return step

    short = (q[:, :, :few], k[:, :, :few], v[:, :, :few], scale, bias)
    fresh = torch.randn_like(x)
    return [
        Piece(
            "class row: product along memory / whole map",
            full_row,
            lambda: class_row(q, k, scale),
            "topk",
            0.83 + 0.58 + 0.4,
        ),
        Piece(
            "rows by flat index_select / expanded gather",
            lambda: reference.gather(x, kept),
            lambda: take_rows(x, kept),
            "topk",
            2.2,
        ),
        Piece(
            "merge: index_add of differences / split, scatter_reduce, cat",
            scatter_merge,
            lambda: apply(t, Merge(None, match.leader, pairs=(match.source, match.target))),
            "tome",
            12 * 0.64,
        ),
        Piece(
            "matching metric: sum of head slices / mean over heads",
            lambda: k[:, :, 1:].mean(1),
            lambda: head_sum(k[:, :, 1:]),
            "tome",
            12 * 0.64,
        ),
        Piece(
            "EViT: product with zeroed weights / gather of the complement",
            gathered_rest,
            lambda: apply(t, Fuse(leader, weights)),
            "evit",
            2.2,
        ),
        Piece(
            "attention, 120 tokens with sizes: chosen kernel / fused",
            lambda: kernels.fused(*short).transpose(1, 2).flatten(2),
            lambda: kernels.dot_product_attention(*short).transpose(1, 2).flatten(2),
            "tome",
            10,
        ),
        Piece(
            "residual: in place / new tensor",
            lambda: x + fresh,
            lambda: fresh.add_(x),
            "tome",
            24 * 0.62,
        ),
        Piece(
            "MLP: temporaries written over / in new tensors",
            lambda: x + block.mlp(block.norm2(x)),
            lambda: parts.mlp(x),
            "tome",
            12 * 0.62,
        ),
        Piece("twelve blocks, one image: in a straight line / their modules", modules, straight),
        Piece(
            "K-Medoids 196 -> 137: rows at once / loop over clusters",
            lambda: reference.kmedoids(distance, first, weight, 5),
            lambda: clustering.kmedoids(distance, first, weight, 5),
            "token_pooling",
            2,
        ),
        Piece(
            "distances: one product, in place / cdist, squared",
            lambda: torch.cdist(x[:, 1:], x[:, 1:]).square(),
            lambda: clustering.squared_distances(x[:, 1:]),
            "token_pooling",
            2,
        ),
        Piece(
            "DPC-KNN density: five minima / topk",
            lambda: distance.topk(5, dim=-1, largest=False, sorted=False).values.mean(-1),
            lambda: density._mean_of_nearest(distance, 5),
            "dpcknn",
            2,
        ),
        Piece(
            "masked softmax and its gradient: own function / recorded", masked(False), masked(True)
        ),
        *(
            Piece(f"linear: 384 -> 1536, {n} tokens, onednn / plain", *map(linear, names, (n, n)))
            for names in [("plain", "onednn")]
            for n in (N, 80)
        ),
    ]


def _plain_policy(z: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    n = z.shape[-1]
    seen = policy[:, None, None, :]
    seen = seen + (1.0 - seen) * torch.eye(n)
    weight = (z - z.amax(-1, keepdim=True)).exp() * seen
    return (weight + eps / n) / (weight.sum(-1, keepdim=True) + eps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=__doc__)
    usage.add_argument("--batch", type=int, default=16)
    usage.add_argument("--threads", type=int, default=2)
    usage.add_argument("--rounds", type=int, default=9)
    options = usage.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_pages()
    plain = plain_backbone("deit_small")
    images = torch.randn(options.batch, 3, 224, 224)
    models: dict[str, Step] = {}
    for name in ("tome", "topk", "evit", "token_pooling", "dpcknn"):
        schedule = schedule_of(name, backbone_name("deit_small"))
        models[name] = tasks.inference(reduced(plain, name, schedule), images)
    whole = in_turns(models, CPU, options.rounds, warmup=1)
    print("| piece | plain ms | here ms | share of the model |\n|---|---|---|---|")
    with torch.inference_mode():
        for piece in pieces(options.batch):
            found = in_turns({"plain": piece.plain, "fast": piece.fast}, CPU, options.rounds)
            a, b = (found[n].median for n in ("plain", "fast"))
            share = ""
            if piece.model is not None:
                share = f"{100 * (a - b) * piece.calls / whole[piece.model].median:.1f} %"
            label = f"{piece.name} ({piece.model})" if piece.model else piece.name
            print(f"| {label} | {1e3 * a:.3f} | {1e3 * b:.3f} | {share} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

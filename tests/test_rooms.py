"""What methods to come may rely on: the site before block 0, the grid, and signals of the MLP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reduction
import zoo
from reduction import Budget, Card, Keep, PerBlock, Signals, Step, Tokens
from tests.cases import backbone, images
from zoo.cost.counters import torch_gmacs
from zoo.errors import UnsupportedModel, ZooError

CARD = Card("toy", "nobody", "ours", 2026, None, None, None, "prune", "none")
EVERYWHERE = ["plain", "distilled", "gap", "registers", "eva02", "dinov3"]


class Busy(reduction.AtInput, reduction.Reducer):
    """Keep the patches whose pixels vary most."""

    card = CARD
    site = "input"

    def look(self, images: Tensor, grid: tuple[int, int], step: Step) -> Keep:
        rows, columns = grid
        patches = images.unfold(2, images.shape[2] // rows, images.shape[2] // rows)
        patches = patches.unfold(3, images.shape[3] // columns, images.shape[3] // columns)
        variance = patches.float().var(dim=(1, 4, 5)).flatten(1)
        return Keep(variance.topk(step.keep, dim=1).indices.sort(1).values)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_patches_leave_before_the_first_block_with_their_positions(name: str) -> None:
    m, x = backbone(name), images(2)
    model = zoo.wrap(m, Busy(), PerBlock([20] * len(m.blocks))).eval()
    kept = 20 + model.prefix
    with torch.no_grad():
        logits, info = model(x, return_info=True)
    assert info.tokens == ((kept, kept),) * model.depth
    assert model.token_counts() == list(info.tokens)
    assert ((info.source >= 0).sum(1) == 20).all()
    # By hand: embed everything, take rows, run the blocks.
    chosen = model.reducer.look(x, model.grid, Step(0, model.depth, Budget(20), model.grid)).index
    assert torch.equal((info.source >= 0).nonzero()[:, 1].view(2, -1), chosen)
    if name in ("plain", "gap", "registers"):
        with torch.no_grad():
            tokens = model.tower.embed(m, x).x
            patches = torch.stack(
                [t[model.prefix :][i] for t, i in zip(tokens, chosen, strict=True)]
            )
            tokens = m.blocks(m.norm_pre(torch.cat([tokens[:, : model.prefix], patches], 1)))
            assert torch.allclose(m.forward_head(m.norm(tokens)), logits, atol=1e-5)


def test_what_leaves_before_the_first_block_is_not_paid_for() -> None:
    m = backbone("plain")
    model = zoo.wrap(m, Busy(), PerBlock([20] * len(m.blocks))).eval()
    assert zoo.profile(model).gmacs == pytest.approx(torch_gmacs(model, images(1)), rel=1e-6)
    assert zoo.profile(model).gmacs < 0.5 * zoo.profile(m).gmacs


def test_a_look_at_images_needs_all_patches() -> None:
    m = zoo.create_model("test_vit", None, patch_drop_rate=0.5).unwrap()
    model = zoo.wrap(m, Busy(), PerBlock([20] * len(m.blocks))).train()
    with pytest.raises(ZooError, match="patch dropout"):
        model(torch.randn(1, 3, 160, 160))


class Seen(reduction.Reducer):
    """Keep the first tokens, and note what was seen."""

    card = CARD
    site = "post"
    needs = frozenset({"x_in", "x_mid", "mlp", "out"})

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["seen"] = []

    def assign(self, t: Tokens, s: Signals, step: Step) -> Keep:
        self.__dict__["seen"].append((t, s))
        return Keep(torch.arange(step.keep))


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("train", [False, True])
def test_signals_of_the_mlp_are_what_the_modules_computed(name: str, train: bool) -> None:
    m, x = backbone(name), images(2)
    depth = len(m.blocks)
    reducer = Seen()
    model = zoo.wrap(m, reducer, PerBlock([64] * (depth - 1) + [30])).train(train)
    found: dict[str, Tensor] = {}
    last = m.blocks[-1]
    watched = last.attn.proj.register_forward_pre_hook(
        lambda module, args: found.__setitem__("out", args[0])
    )
    with torch.set_grad_enabled(train):
        model(x)
        ((t, s),) = reducer.seen
        watched.remove()
        model(x)
        ((_, _), (again, plain)) = reducer.seen
    # Hooked or not, with parameters alone or through modules: the same.
    for one, other in zip(s, plain, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(s.x_mid + s.mlp, t.x, atol=1e-6)
    assert s.x_mid.shape == s.mlp.shape == t.x.shape
    assert torch.allclose(s.out.transpose(1, 2).flatten(2), found["out"], atol=1e-6)
    assert again.n == 64


def test_a_block_without_one_mlp_says_so() -> None:
    m: Any = backbone("jumbo")
    schedule = PerBlock([m.patch_embed.num_patches] * (len(m.blocks) - 1) + [5])
    with pytest.raises(UnsupportedModel, match="no one MLP"):
        zoo.wrap(m, Seen(), schedule)


class Halving(reduction.Reducer):
    """Average neighbouring columns: the raster stays one, half as wide."""

    card = CARD
    site = "mid"

    def reduce(self, t: Tokens, s: Signals, step: Step) -> Tokens:
        assert t.grid is not None
        rows, columns = t.grid
        index = torch.arange(t.n).view(rows, columns // 2, 2)
        slot = torch.arange(rows * columns // 2).repeat_interleave(2)
        merged = reduction.apply(
            t,
            reduction.Merge(
                slot.expand(t.x.shape[0], -1),
                index[..., 0].reshape(-1).expand(t.x.shape[0], -1),
            ),
        )
        return merged._replace(grid=(rows, columns // 2))

    def count(self, n: int, step: Step) -> int:
        return n // 2

    def max_drop(self, n: int) -> int:
        return n // 2


def test_the_grid_is_known_until_it_is_broken() -> None:
    m, x = backbone("plain"), images(2)
    depth = len(m.blocks)
    halving = zoo.wrap(m, Halving(), PerBlock([32, 16] + [None] * (depth - 2))).eval()
    with torch.no_grad():
        _, info = halving(x, return_info="trace")
        rows, columns = halving.grid
        assert [t.grid for t in info.trace[:2]] == [(rows, columns // 2), (rows, columns // 4)]
        assert info.trace[-1].grid == (rows, columns // 4)
        _, info = zoo.wrap(m, "tome", {"name": "constant_r", "r": [0, 4]}).eval()(
            x, return_info="trace"
        )
    assert [t.grid for t in info.trace] == [(rows, columns)] + [None] * (depth - 1)

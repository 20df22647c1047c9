"""Linear layers by the fastest matrix product of this CPU, as a run-time option.

torch sends `F.linear` in float32 to its default library. On some CPUs (AMD, as far as was measured)
oneDNN computes the same product in up to half the time. Two spellings reach it:

* without gradients, the operator `mkldnn._linear_pointwise` on the weights as they are, "onednn",
  or on a copy in the order that oneDNN computes in, "packed";
* with gradients, a 1x1 convolution, which is differentiable and public.

In bfloat16 the default is oneDNN already, and packs the weights anew in every call, which counts
where there are few rows. "auto" measures which is faster, except where kernels are chosen without
a clock (`reduction.functional.kernels.set_deterministic`): it is then torch's default.

Packed copies double the memory of the linear layers. They belong to nothing but their weights, by
which they are found and with which they go: no checkpoint, copy or pickle holds one. A weight that
was written to, or put elsewhere, is packed again; one that is trained is not packed at all. No new
parameters, the same `state_dict`. The layers of a backbone become `FastLinear`, which does exactly
what `nn.Linear` does unless a `ReducedViT` with the option is running in this thread; and even then
wherever a compiler, exporter, tracer, autocast, another device or type, or a transform is at work.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from reduction.eager import autocasting, recording, traced, undisturbed
from reduction.functional.kernels import deterministic, note_used

Mode = Literal["plain", "auto", "packed", "onednn"]
MODES = ("plain", "auto", "packed", "onednn")
#: What the option was called by before.
FORMER: dict[object, Mode] = {"off": "plain", False: "plain", "on": "onednn", True: "onednn"}

#: "auto" takes another product than torch's default only if it is so many times as fast.
MARGIN = 1.15
#: In bfloat16 packing changes no bit of the answer, so less of a gain is enough.
PACKED_MARGIN = 1.03
#: And only if it agrees so closely on numbers of size one.
TOLERANCE = 1e-4

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_here = threading.local()


@contextlib.contextmanager
def using(mode: Mode) -> Iterator[None]:
    """Let `FastLinear` layers that run in this thread meanwhile choose their product."""
    before = getattr(_here, "mode", "plain")
    _here.mode = mode
    try:
        yield
    finally:
        _here.mode = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by the product that the surrounding `using` asks for.

    Args:
        x: `(..., C)`.
        weight: `(D, C)`.
        bias: `(D,)` or None.
    """
    if traced():
        return F.linear(x, weight, bias)
    mode = getattr(_here, "mode", "plain")
    if mode == "plain" or not _applies(x, weight):
        return F.linear(x, weight, bias)
    train = recording(x, weight, bias)
    if train and weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    product: Product = _by_convolution if train else _by_operator
    if mode == "packed" and not train:
        product = _by_packed
    if mode == "auto":
        threads, trained = torch.get_num_threads(), weight.requires_grad
        outputs, inputs = weight.shape
        product = (
            _plain
            if deterministic()
            else _chosen(outputs, inputs, bias is not None, train, trained, threads, weight.dtype)
        )
        name = _layer(outputs, inputs, train, trained, threads, weight.dtype)
        note_used("linear " + name, _NAMES[product])
    return product(x, weight, bias)


class FastLinear(nn.Linear):
    """`nn.Linear` that minds `using`."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return linear(x, self.weight, self.bias)


def install(model: nn.Module) -> None:
    """Make every plain `nn.Linear` of a model a `FastLinear`. Weights and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if type(module) is FastLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # the other way round is fine


def available() -> bool:
    """Whether this build of torch has another product to offer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _applies(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() >= 2
        and x.numel() > 0
        and undisturbed(x)
        and undisturbed(weight)
        and not autocasting(x)
        and bool(torch.backends.mkldnn.enabled)
        and available()
    )


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _by_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed(weight), bias, "none", [], "")


# Weights are compared by identity, and their copies go with them.
_PACKED: Any = WeakIdKeyDictionary()


def packed(weight: Tensor) -> Tensor:
    """The copy of a weight in the order that oneDNN computes in, made once.

    Args:
        weight: `(D, C)` of a layer; itself where it can be written to without a trace, as tensors
            made in inference mode can.
    """
    if weight.is_inference():
        return weight
    stamp = (weight.data_ptr(), weight._version, weight.dtype, weight.shape)
    found: tuple[Any, Tensor] | None = _PACKED.get(weight)
    if found is None or found[0] != stamp:
        with torch.no_grad():
            found = stamp, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        _PACKED[weight] = found
    return found[1]


def forget_packed(model: nn.Module) -> None:
    """Drop the packed copies of a model's weights; also right after writing into `weight.data`."""
    for weight in model.parameters():
        _PACKED.pop(weight, None)


def packed_bytes() -> int:
    """Memory of all packed copies."""
    return sum(weight.numel() * weight.element_size() for weight in _PACKED)


def _by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(1, 1, -1, x.shape[-1])
    # Rows seen as pixels in channels-last order: no copy on either side.
    out = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


_FOUND: dict[str, Product] = {}


@functools.lru_cache(maxsize=256)
def _chosen(
    outputs: int,
    inputs: int,
    biased: bool,
    train: bool,
    trains_weight: bool,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> Product:
    """The product for a layer, measured on random numbers the first time it is asked for."""
    half = dtype != torch.float32
    products: list[Product] = [_plain] if half else [_plain, _by_convolution]
    if not train:
        products += [_by_packed] if half else [_by_operator, _by_packed]
    generator = torch.Generator().manual_seed(0)
    # Not an inference tensor, and recorded exactly as asked, whatever surrounds the call.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.set_grad_enabled(train), hooks:
        x = torch.randn(256, inputs, generator=generator).to(dtype).requires_grad_(train)
        weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
        weight.requires_grad_(train and trains_weight)
        bias = torch.randn(outputs, generator=generator).to(dtype) if biased else None
        expected = _plain(x, weight, bias).detach()
        # bfloat16 has eight bits: numbers of size one to four round by that much.
        tolerance = 0.04 if half else TOLERANCE
        best = dict.fromkeys(products, float("inf"))
        for _ in range(5):
            for product in products:
                start = time.perf_counter()
                out = product(x, weight, bias)
                if train:
                    wanted = (x, weight) if trains_weight else (x,)
                    torch.autograd.grad(out, wanted, torch.ones_like(out))
                best[product] = min(best[product], time.perf_counter() - start)
                if not (out.detach() - expected).abs().max() <= tolerance:  # NaN is no agreement
                    best[product] = float("inf")
    winner = min(products, key=best.__getitem__)
    margin = PACKED_MARGIN if winner is _by_packed and half else MARGIN
    winner = winner if best[winner] * margin <= best[_plain] else _plain
    _FOUND[_layer(outputs, inputs, train, trains_weight, threads, dtype)] = winner
    return winner


@functools.lru_cache(maxsize=256)
def _layer(
    outputs: int,
    inputs: int,
    train: bool,
    trains_weight: bool,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> str:
    use = ("training" if trains_weight else "frozen") if train else "inference"
    kind = "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')},"
    return f"{inputs}->{outputs}{kind} {use}, {threads} threads"


_NAMES: dict[Product, str] = {
    _plain: "default",
    _by_convolution: "convolution",
    _by_operator: "oneDNN",
    _by_packed: "packed",
}


def chosen() -> dict[str, str]:
    """What "auto" found in this process: shape of the layer and use to name of the product."""
    return {key: _NAMES[product] for key, product in _FOUND.items()}


def forget() -> None:
    """Forget all measurements."""
    _chosen.cache_clear()
    _FOUND.clear()
    _PACKED.clear()

"""Attention kernels for CPUs, and the choice between them by measuring once.

On a CPU the fused kernel of torch is not always the fastest one: with few tokens, in float32, the
two products and a softmax in a small reused buffer take up to a fifth less time. Which wins
depends on the machine, so it is measured: once per process, kind of call and number of tokens
(in steps of 32). All kernels agree to rounding. Runs that must repeat bit by bit call
`set_deterministic(True)`, or torch's own `use_deterministic_algorithms`: no clock is asked then.
The environment is read once: `ZOO_ATTN=sdpa` switches the choice off; `ZOO_ATTN=explicit` never
asks the fused one; `ZOO_ATTN=fold` gives the fused one the bias as one more feature instead of a
mask, which on some GPUs admits a faster kernel.

Shapes: B batch, H heads, N queries, M keys, d head width.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reduction.eager import autocasting, recording, undisturbed
from reduction.errors import ZooError

Kernel = Callable[..., Tensor]  # (q, k, v, scale, bias)

MODES = ("auto", "sdpa", "explicit", "fold")
#: Products in the two halves of an attention below which no choice is worth its bookkeeping.
SMALL = 1 << 21
#: A kernel must be so much faster than the fused one to be taken instead.
MARGIN = 1.03
#: Images that a measurement looks at, at most.
SAMPLE = 16

_CHOSEN: dict[tuple[object, ...], Kernel] = {}
#: What ran since `forget_used`, by the same keys; layers of other kinds add themselves by name.
_USED: dict[tuple[object, ...], Kernel | str] = {}
_switch = [False]
_forced: list[str] = []
_wished: list[str] = []


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """`softmax(scale * q k^T + bias) v`, `(B, H, N, d)`, by the kernel that is fastest here.

    Args:
        q: `(B, H, N, d)`.
        k: `(B, H, M, d)`.
        v: `(B, H, M, d)`.
        scale: Factor on the logits.
        bias: `(B, 1, 1, M)` or whatever the fused kernel takes, or None.
        dropout: Dropout rate of the weights.
    """
    asked = mode()
    if bias is not None and asked == "fold" and bias.shape[1:3] == (1, 1):
        return folded(q, k, v, scale, bias, dropout)
    if not dropout and q.dtype == torch.float32 and undisturbed(q) and not autocasting(q):
        return choose(q, k, v, scale, bias)(q, k, v, scale, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def mode() -> str:
    """What `ZOO_ATTN` says; "auto" where it says nothing.

    Raises:
        ZooError: If it is none of `MODES`.
    """
    if _forced:
        return _forced[-1]
    if not _wished:
        value = os.environ.get("ZOO_ATTN") or "auto"
        if value not in MODES:
            raise ZooError(f"ZOO_ATTN must be one of {', '.join(MODES)}, got {value!r}")
        _wished.append(value)
    return _wished[0]


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Within, the mode is this one, whatever the environment says; None changes nothing."""
    if name is None:
        yield
        return
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def set_deterministic(on: bool) -> None:
    """From now on choose kernels without a clock, or by measuring again.

    The choice then depends on the tensors alone, so that the same command gives the same bits on
    the same machine with the same number of threads. torch's `use_deterministic_algorithms` has
    this effect too, without this switch.
    """
    _switch[0] = bool(on)


def deterministic() -> bool:
    """Whether kernels are chosen without a clock."""
    return _switch[0] or torch.are_deterministic_algorithms_enabled()


def note_used(layer: str, kernel: str) -> None:
    """Have another layer whose product is chosen listed by `chosen_kernels`."""
    _USED[(layer,)] = kernel


def forget_used() -> None:
    """Start the list of `chosen_kernels` anew; what was measured stays known."""
    _USED.clear()


def chosen_kernels() -> dict[str, str]:
    """The kernels that ran since `forget_used`, where there was a choice: kind of call to name.

    Such as `{"attention 3x64, up to 224 tokens, batch, 2 threads": "by_image"}`: three heads of
    width 64. Calls that have one kernel only are not listed.
    """
    return {
        _words(key): kernel if isinstance(kernel, str) else _name(kernel)
        for key, kernel in sorted(_USED.items(), key=lambda item: str(item[0]))
    }


def _words(key: tuple[object, ...]) -> str:
    if len(key) == 1:
        return str(key[0])
    train, batch, heads, width, steps, threads, bias = key
    parts = [
        f"attention {heads}x{width}",
        f"up to {32 * int(str(steps))} tokens",
        "batch" if batch else "one image",
        *(["training"] if train else []),
        *(["bias"] if bias else []),
        f"{threads} thread" + ("s" if threads != 1 else ""),
    ]
    return ", ".join(parts)


def _name(kernel: Kernel) -> str:
    return kernel.__name__.strip("_")


def forget() -> None:
    """Forget all choices, so that they are measured again, and what `ZOO_ATTN` said."""
    _CHOSEN.clear()
    _USED.clear()
    _wished.clear()


def choices() -> dict[tuple[object, ...], str]:
    """What was chosen so far: `(training, many images, H, d, N / 32, threads, bias)` to a name."""
    return {key: _name(kernel) for key, kernel in _CHOSEN.items()}


def choose(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Kernel:
    """The fastest kernel for these tensors in plain eager code on a CPU, measured if need be.

    Under `deterministic` it is the first candidate, which is torch's own by default. The caller
    knows that the code is that plain, see `undisturbed`, and autocast off.
    """
    batch, heads, n, width = q.shape
    asked, small = mode(), batch * heads * n**2 * width < SMALL
    if bias is not None and bias.shape[1:3] != (1, 1):
        return fused
    if asked == "fold" and bias is not None:
        return folded
    if small or q.dtype != torch.float32 or asked not in ("auto", "explicit"):
        return fused
    train = recording(q, k, v, bias)
    if torch.is_grad_enabled() and (not train or _saved_tensors_hooks()):
        # Gradient checkpointing counts what is saved, so nothing may be measured under it.
        return fused
    threads = torch.get_num_threads()
    key = (train, batch > 1, heads, width, -(-n // 32), threads, bias is not None)
    kernel = None if deterministic() else _CHOSEN.get(key)
    if kernel is None:
        rivals: tuple[Kernel, ...] = (plain,) if train else (by_image, at_once)
        if not train and (batch == 1 or n > 64):
            rivals = (at_once,) if batch == 1 else (by_image,)
        if asked == "auto":
            rivals = (fused, *rivals)
        if len(rivals) == 1 or deterministic():
            kernel = rivals[0]
        else:
            kernel = _CHOSEN[key] = _fastest(rivals, q, k, v, scale, bias)
    _USED[key] = kernel
    return kernel


def _saved_tensors_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """torch's own."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def folded(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, dropout: float = 0.0
) -> Tensor:
    """torch's own, with the bias on the keys as one more feature; exact.

    The width grows by eight, because fused kernels want multiples of it.
    """
    batch, heads, m, _ = k.shape
    extra = bias.transpose(-1, -2).expand(batch, heads, m, 1).to(k.dtype) / scale
    k = torch.cat([k, F.pad(extra, (0, 7))], -1)
    q = F.pad(torch.cat([q, torch.ones_like(q[..., :1])], -1), (0, 7))
    out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), dropout_p=dropout, scale=scale)
    return out[..., : v.shape[-1]]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Two products and a softmax, all recorded: its backward pass is often the faster one."""
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ v


def by_image(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Image after image in one buffer `(H, N, M)` that stays in the cache. Records nothing."""
    batch, heads, n, width = q.shape
    # The layout that the next layer reads without a copy.
    out = q.new_empty(batch, n, heads, width).transpose(1, 2)
    map_, rows = q.new_empty(heads, n, k.shape[2]), q.new_empty(heads, n, width)
    factor = 0 if bias is None else 1
    start = (None,) * batch if bias is None else bias.expand(batch, -1, -1, -1).unbind(0)
    for own, query, key, value, place in zip(
        start, q.unbind(0), k.transpose(2, 3).unbind(0), v.unbind(0), out.unbind(0), strict=True
    ):
        if own is not None:
            map_.copy_(own)
        map_.baddbmm_(query, key, beta=factor, alpha=scale)
        torch.softmax(map_, -1, out=map_)
        # The product cannot be written in this layout; the copy is cheaper than a new tensor.
        place.copy_(torch.bmm(map_, value, out=rows))
    return out


def at_once(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """All images in one product of `(B * H, N, d)`. Records nothing."""
    batch, heads, n, width = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    if bias is None:
        map_ = q.new_empty(batch * heads, n, k.shape[2]).baddbmm_(q, k, beta=0, alpha=scale)
    else:
        bias = bias.expand(batch, heads, 1, -1).reshape(batch * heads, 1, -1)
        map_ = torch.baddbmm(bias, q, k, alpha=scale)
    torch.softmax(map_, -1, out=map_)
    return torch.bmm(map_, v).view(batch, heads, n, width)


def _fastest(
    kernels: tuple[Kernel, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    rounds: int = 4,
) -> Kernel:
    """The first of the kernels, unless another one is clearly faster on these tensors."""
    train = recording(q, k, v, bias)
    some = slice(0, SAMPLE)
    q, k, v = (x[some].detach().requires_grad_(train) for x in (q, k, v))
    bias = None if bias is None else bias[some].detach()
    best = dict.fromkeys(kernels, float("inf"))
    for _ in range(rounds):
        for kernel in kernels:
            start = time.perf_counter()
            out = kernel(q, k, v, scale, bias).transpose(1, 2).flatten(2)
            if train:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            best[kernel] = min(best[kernel], time.perf_counter() - start)
    winner = min(kernels, key=best.__getitem__)
    return winner if best[winner] * MARGIN < best[kernels[0]] else kernels[0]

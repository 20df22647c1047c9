"""What only plain eager code may do: write into buffers, choose kernels.

A tracer, an exporter, a compiler, a counter of operations or a function transform must see the same
plain operations every time, so all of this asks here first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def traced() -> bool:
    """Whether somebody compiles, exports or traces this."""
    return bool(
        torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    )


def exporting() -> bool:
    """Whether `torch.export` records this, for itself or for ONNX."""
    return torch.compiler.is_exporting()


def eager_on_cpu(x: Tensor) -> bool:
    """Whether this runs op by op on a CPU, not compiled, exported or traced."""
    return x.is_cpu and not traced()


def undisturbed(x: Tensor) -> bool:
    """Whether `x` is an ordinary CPU tensor and nobody watches or transforms the operations.

    Stricter than `eager_on_cpu`: also false under a dispatch mode (fake tensors, counters of
    operations), a transform of `torch.func`, and forward-mode differentiation.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()  # `traced`, spared a call: this runs several times a block
        and x.is_cpu
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    # The meta device, on which costs are counted, knows no autocast and says so by raising.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def recording(*tensors: Tensor | None) -> bool:
    """Whether an operation on these would be recorded for a backward pass."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

"""Hooks of modules whose work is done in pieces: they fire as if the module had been called.

Feature extractors, pruning, sharding and whatever else watches a model does so by hooks on its
blocks and attentions. The wrapper takes those apart, so it calls their hooks itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

_MODULE: Any = nn.modules.module
_BEFORE = _MODULE._global_forward_pre_hooks
_BEHIND = _MODULE._global_forward_hooks
_BACKWARD = _MODULE._global_backward_hooks
_BACKWARD_BEFORE = _MODULE._global_backward_pre_hooks


def everywhere() -> bool:
    """Whether somebody waits for every module there is."""
    return bool(_BEHIND or _BEFORE or _BACKWARD or _BACKWARD_BEFORE)


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody waits for one of these modules to be called."""
    return awaited(*modules) or everywhere()


def awaited(*modules: nn.Module) -> bool:
    """Whether somebody waits for one of these modules in particular."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
    return False


def called(module: nn.Module, work: Callable[..., Any], *args: Any) -> Any:
    """What `module(*args)` returns where `work` stands for its `forward`.

    Args:
        module: Whose hooks fire, in torch's order; they may change what goes in and what comes out.
        work: What the module does.
        *args: Arguments of the module.
    """
    kwargs: dict[str, Any] = {}
    for key, hook in (
        *_MODULE._global_forward_pre_hooks.items(),
        *module._forward_pre_hooks.items(),
    ):
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    full, partial = module._get_backward_hooks()
    before = module._get_backward_pre_hooks()
    backward = BackwardHook(module, full, before) if full or before else None
    if backward is not None:
        args = backward.setup_input_hook(args)
    result = work(*args, **kwargs)
    with_kwargs = {
        **module._forward_hooks_with_kwargs,
        **_MODULE._global_forward_hooks_with_kwargs,
    }
    for key, hook in (*_BEHIND.items(), *module._forward_hooks.items()):
        extra = (kwargs,) if key in with_kwargs else ()
        changed = hook(module, args, *extra, result)
        result = result if changed is None else changed
    if backward is not None:
        result = backward.setup_output_hook(result)
    if partial and isinstance(result, Tensor) and result.grad_fn is not None:
        for hook in partial:
            result.grad_fn.register_hook(_MODULE._WrappedHook(hook, module))
    return result

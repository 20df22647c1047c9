"""Why something cannot be wrapped: what it is, and what to pass instead."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping

from torch import nn

from zoo.adapters.reasons import why_not

_SUPPORTED = (
    "timm's VisionTransformer (DeiT, DINOv2, CLIP, SigLIP, MAE, registers, distilled), Eva "
    "(EVA-02, DINOv3), Beit, VisionTransformerRelPos and NaFlexVit, torchvision's "
    "VisionTransformer, the image towers of open_clip, and "
    "subclasses that keep their forward"
)
# Of libraries whose models are run: which ones, and what people have instead.
_CLASSES = {
    "transformers": (
        "ViT, DeiT, DINOv2 with and without registers, DINOv3-ViT, the vision towers of CLIP, "
        "SigLIP and SigLIP 2, ViT-MAE, I-JEPA and BEiT"
    ),
    "open_clip": "the image towers VisionTransformer and TimmModel, which stand in .visual",
    "torchvision": "VisionTransformer: vit_b_16, vit_b_32, vit_l_16, vit_l_32 and vit_h_14",
}
# Shells around a model, by a part of the class's name: what they are for, and what holds the model.
_SHELLS = {
    "OptimizedModule": ("compiled", "torch.compile(model)", "_orig_mod"),
    "DataParallel": ("spread over devices", "torch.nn.DataParallel(model)", "module"),
    "DistributedDataParallel": ("distributed", "DistributedDataParallel(model)", "module"),
    "FullyShardedDataParallel": ("sharded", "FullyShardedDataParallel(model)", "module"),
    "AveragedModel": ("an average of weights", "AveragedModel(model)", "module"),
    "ModelEma": ("an average of weights", "ModelEma(model)", "module"),
}
_LIBRARIES = {
    "clip": "OpenAI CLIP",
    "peft": "peft",
    "diffusers": "diffusers",
    "mmpretrain": "MMPretrain",
    "mmcls": "MMClassification",
    "vit_pytorch": "vit-pytorch",
    "torch": "torch itself",
}


def why_no_model(given: object) -> str:
    """Why something is no model at all; empty for a module."""
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        return (
            f"expected a model, got the text {name!r}; zoo.create_model({name!r}, ...) builds "
            "a backbone by its name, zoo.load(...) loads a saved model"
        )
    if inspect.isclass(given):
        return f"expected a model, got the class {given.__name__}; pass an instance of it"
    if isinstance(given, Mapping):
        return (
            "expected a model, got a mapping; if it holds weights, build the model with "
            "zoo.create_model(NAME) and fill it with zoo.checkpoint.load_weights(model, FILE)"
        )
    if not isinstance(given, nn.Module):
        return f"expected a model, got {type(given).__name__}"
    return ""


def why_shell(m: nn.Module, in_place: bool = True) -> str:
    """Which shell is around a model, or around a part of it; empty if there is none.

    Args:
        m: The model.
        in_place: Whether `model.compile()` counts; who wraps first may do that later.
    """
    for name, module in m.named_modules():
        of = f"its {name} is" if name else "the model is"
        for cls in (c.__name__ for c in type(module).__mro__):
            key = next((k for k in _SHELLS if cls == k or (k == "ModelEma" and k in cls)), None)
            if key is None:
                continue
            what, made, inside = _SHELLS[key]
            made = made.replace("(model)", "(zoo.wrap(model, ...))")
            return f"{of} {what} already ({cls}): wrap first, then {made}; .{inside} is the model"
        if in_place and getattr(module, "_compiled_call_impl", None) is not None:
            return (
                f"{of} compiled already (by .compile()), and wrapped it would run as if it were "
                "not: wrap first, then torch.compile(zoo.wrap(model, ...))"
            )
    return ""


def why_unsupported(m: nn.Module, inner: str | None = None) -> str:
    """Why a class of models has no adapter, in one line.

    Args:
        m: The model.
        inner: Name of a part of it that could be wrapped.
    """
    cls = type(m)
    shown = f"{cls.__module__}.{cls.__qualname__}".replace(".__new__.<locals>", "")
    names = [c.__name__ for c in cls.__mro__]
    if shell := why_shell(m):
        return shell
    if {"ScriptModule", "GraphModule", "RecursiveScriptModule"} & set(names):
        return (
            f"{shown} is a recorded graph, whose blocks cannot be run one by one: wrap the timm "
            "model first, then trace, script or export it"
        )
    if "LightningModule" in names:
        held = [name for name, child in m.named_children() if hasattr(child, "blocks")]
        return f"{shown} is a training module; pass the model in it, .{held[0] if held else 'net'}"
    if cls.__module__ == "timm.models._features":
        return (
            "the model was built with features_only=True; build it without, and pass what "
            "zoo.wrap gives to timm.models._features.FeatureGetterNet(model, out_indices=[...])"
        )
    library = cls.__module__.split(".")[0]
    if inner is not None:
        return (
            f"{shown} is not supported, but its part {inner!r} is: wrap that, in its place: "
            f"model.{inner} = zoo.wrap(model.{inner}, ...), or zoo.attach(model, ...)"
        )
    if "ReducedViT" in {c.__name__ for child in m.children() for c in type(child).__mro__}:
        return f"{shown} holds a tower that is wrapped already; call it as it is"
    if library in _CLASSES:
        return (
            f"{shown} is not supported: it is none of the models of {library} that can be run "
            f"block by block, which are {_CLASSES[library]}"
        )
    if library in _LIBRARIES:
        return (
            f"{shown}: models of {_LIBRARIES[library]} are not supported yet; supported are "
            f"{_SUPPORTED}. timm has most of the same weights: zoo.create_model(NAME, "
            "pretrained=True); zoo.list_models() names the architectures"
        )
    if library == "timm":
        hint = f": {why_not(cls.__module__)}"
    else:
        hint = " (it is no model of a library that is known here)"
    return f"backbone class {shown} is not supported{hint}; supported are {_SUPPORTED}"

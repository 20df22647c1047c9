"""`zoo doctor`: does this installation compute what it should?

Answers in half a minute what a bug report would have to ask: the versions, the attention kernels
that torch may use, whether the wrapped models still equal timm's, and whether the three ways of
counting agree.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo import flops
from zoo.run.evaluate import input_size

_PACKAGES = ("torch", "torchvision", "timm", "lightning", "hydra-core", "fvcore", "scikit-learn")
_OPTIONAL = {"report": ("plotly", "matplotlib"), "export": ("onnx", "onnxscript", "onnxruntime")}

# Small models that between them go through every backbone adapter and pooling.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "VisionTransformer, class token": ("test_vit", {}),
    "VisionTransformer, average pooling, LayerScale": ("test_vit2", {}),
    "VisionTransformer, attention pooling": ("test_vit3", {}),
    "VisionTransformer, distilled": (
        "deit_tiny_distilled_patch16_224",
        {"depth": 2, "embed_dim": 48, "img_size": 64},
    ),
    "Eva, rotary positions (EVA-02)": (
        "eva02_tiny_patch14_224",
        {"depth": 2, "embed_dim": 48, "img_size": 56},
    ),
    "Eva, registers (DINOv3)": (
        "vit_small_patch16_dinov3",
        {"depth": 2, "embed_dim": 96, "img_size": 64},
    ),
}

Check = tuple[bool, str, str]


def examine() -> int:
    """Prints what was found, one line per check; returns 1 if any failed."""
    print("versions")
    for line in versions():
        print(f"  {line}")
    print("attention kernels that torch may choose from")
    for line in attention_kernels():
        print(f"  {line}")
    failed = 0
    for title, checks in (
        ("wrapped models against timm's (largest difference of the logits)", parity),
        ("multiply-accumulates of test_vit + tome, counted in three ways", counters),
        ("shipped model", shipped),
    ):
        print(title)
        for good, name, found in _safely(checks):
            print(f"  {'ok  ' if good else 'FAIL'} {name}: {found}")
            failed += not good
    print("all is well" if not failed else f"{failed} checks failed")
    return 1 if failed else 0


def versions() -> Iterator[str]:
    """One line per package: its version, or that it is missing."""
    yield f"tokenzoo {zoo.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    for extra, packages in _OPTIONAL.items():
        missing = [name for name in packages if _version(name) == "missing"]
        state = (
            f"missing {', '.join(missing)}: pip install 'tokenzoo[{extra}]'" if missing else "ok"
        )
        yield f"extra {extra}: {state}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield f"accelerator: {gpu}; CPU threads: {torch.get_num_threads()}"


def attention_kernels() -> Iterator[str]:
    """One line: the backends of scaled dot-product attention that are switched on."""
    backends = torch.backends.cuda
    found = {
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "cuDNN": backends.cudnn_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    yield ", ".join(f"{name} {'on' if on else 'off'}" for name, on in found.items())


def parity() -> Iterator[Check]:
    """With nothing reduced a wrapped model computes exactly what timm's does."""
    for name, (model_name, args) in _MODELS.items():
        torch.manual_seed(0)
        model = zoo.create_model(model_name, num_classes=7, **args).eval()
        gap = _gap(model, model.unwrap(), _images(model))
        yield gap == 0, name, f"{gap:.1e}"


def counters() -> Iterator[Check]:
    """The closed formula, fvcore and torch's counter agree to five digits."""
    model = zoo.create_model("test_vit", "tome", {"name": "constant_r", "r": 8}).eval()
    expected = flops.profile(model).gmacs
    yield True, "closed formula", f"{expected:.6f} GMACs"
    for name, count in (("fvcore", flops.fvcore_gmacs), ("torch", flops.torch_gmacs)):
        found = count(model, _images(model)[:1])
        yield abs(found / expected - 1) < 5e-6, name, f"{found:.6f} GMACs"


def shipped() -> Iterator[Check]:
    """The shipped weights load and give what timm gives with them."""
    model = zoo.load("vit_digits", reducer=None)
    gap = _gap(model, model.unwrap(), _images(model))
    yield gap == 0, "vit_digits", f"loaded, difference {gap:.1e}"


def _safely(checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that raises is a check that failed; the others still run."""
    try:
        yield from checks()
    except Exception as error:
        yield False, checks.__name__, f"{type(error).__name__}: {error}"


@torch.inference_mode()
def _gap(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    return float((one(images) - other(images)).abs().max())


def _images(model: zoo.ReducedViT) -> Tensor:
    return torch.randn(2, *input_size(model))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"

"""`zoo doctor`: does this installation compute what it should?

Answers in half a minute what a bug report would have to ask: the versions, the attention kernels
that torch may use, whether the wrapped models still equal timm's, and whether the three ways of
counting agree.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import zoo
from zoo.adapters.blocks import supported_forwards
from zoo.adapters.tower import tower_of
from zoo.cost.counters import fvcore_gmacs, torch_gmacs
from zoo.libraries.names import LIBRARIES, installed

_PACKAGES = ("torch", "torchvision", "timm", "lightning", "hydra-core", "fvcore", "scikit-learn")
_OPTIONAL = {
    "report": ("plotly", "matplotlib"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "transformers": ("transformers",),
    "open-clip": ("open_clip_torch",),
}

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
    "VisionTransformer, norms after the layers": (
        "vit_base_patch16_rpn_224",
        {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64},
    ),
    "Eva, norms after the layers": (
        "eva02_tiny_patch14_224",
        {"depth": 2, "embed_dim": 48, "img_size": 56, "use_post_norm": True},
    ),
    "Eva, a rotary table per block": (
        "vit_base_patch16_rope_mixed_224",
        {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 64},
    ),
    "Jumbo": ("jumbo_digits", {}),
    "LookupViT (runs itself)": ("lookupvit_digits", {}),
}

Check = tuple[bool, str, str]


def examine() -> int:
    """Prints what was found, one line per check; returns 1 if any failed."""
    # Said by a library to its own authors, in the middle of the screen.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    print("versions")
    for line in versions():
        print(f"  {line}")
    print("attention kernels, one block of DeiT-S for two images (with: proportional attention)")
    for line in attention_kernels():
        print(f"  {line}")
    failed = 0
    for title, checks in (
        ("wrapped models against the originals (largest difference of the logits)", parity),
        ("multiply-accumulates, counted in three ways", counters),
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
    """One line per backend of scaled dot-product attention: its time here, or that it cannot."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    queries = torch.randn(2, 6, 197, 64, device=device)
    bias = torch.zeros(2, 1, 1, 197, device=device)
    on = torch.backends.cuda
    backends = {
        "flash": (SDPBackend.FLASH_ATTENTION, on.flash_sdp_enabled()),
        "memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, on.mem_efficient_sdp_enabled()),
        "cuDNN": (SDPBackend.CUDNN_ATTENTION, on.cudnn_sdp_enabled()),
        "math": (SDPBackend.MATH, on.math_sdp_enabled()),
    }
    for name, (backend, enabled) in backends.items():
        found = [_kernel_ms(backend, queries, mask) for mask in (None, bias)]
        times = ["cannot" if ms is None else f"{ms:.2f} ms" for ms in found]
        state = f"{times[0]} without, {times[1]} with a size bias"
        if found == [None, None]:
            state = f"not for float32 on {device.type}"
        yield f"{name}: {state}{'' if enabled else ' (switched off)'}"


def _kernel_ms(backend: SDPBackend, queries: Tensor, bias: Tensor | None) -> float | None:
    """Milliseconds of one call, the best of five; None where the backend refuses."""
    times = []
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend), torch.inference_mode():
            warnings.simplefilter("ignore")  # each refusal is explained in a warning
            for _ in range(5):
                start = time.perf_counter()
                scaled_dot_product_attention(queries, queries, queries, attn_mask=bias)
                if queries.is_cuda:
                    torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
    except RuntimeError:
        return None
    return min(times)


def parity() -> Iterator[Check]:
    """With nothing reduced a wrapped model computes exactly what timm's does; every adapter."""
    missing = {
        forward: name
        for forward, name in supported_forwards().items()
        if str(getattr(forward, "__module__", "")).partition(".")[0] in ("timm", "zoo")
    }
    for name, (model_name, args) in _MODELS.items():
        torch.manual_seed(0)
        model = zoo.create_model(model_name, num_classes=7, **args).eval()
        for block in getattr(model.backbone, "blocks", ()):
            missing.pop(type(block).forward, None)
        gap = _gap(model, model.unwrap(), _images(model))
        yield gap == 0, name, f"{gap:.1e}"
    for name, build in _others().items():
        torch.manual_seed(0)
        wrapped = zoo.wrap(build(), None).eval()
        gap = _gap(wrapped, wrapped.unwrap(), _images(wrapped))
        yield gap == 0, name, f"{gap:.1e}"
    if missing:
        # Which families are registered depends on what was used before: this is no fault.
        yield True, "not tried, for want of a model", ", ".join(sorted(missing.values()))


def _others() -> dict[str, Callable[[], nn.Module]]:
    """Small models of the other libraries that are here, by what they stand for."""
    from torchvision.models import VisionTransformer

    size: dict[str, int] = {"image_size": 32, "patch_size": 8}
    found: dict[str, Callable[[], nn.Module]] = {
        "torchvision VisionTransformer": lambda: VisionTransformer(
            **size, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
        )
    }
    if installed(LIBRARIES["open_clip"]):
        from open_clip.transformer import VisionTransformer as ClipTower

        shape = {**size, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
        found["open_clip VisionTransformer"] = lambda: ClipTower(**shape)
        found["open_clip, its own attention"] = lambda: ClipTower(**shape, qk_norm=True)
    return found


def counters() -> Iterator[Check]:
    """The closed formula, fvcore and torch's counter agree to five digits."""
    for reducer, schedule in (("tome", {"name": "constant_r", "r": 8}), ("evit", None)):
        model = zoo.create_model("test_vit", reducer, schedule).eval()
        expected = zoo.profile(model).gmacs
        counts = (fvcore_gmacs, torch_gmacs)
        others = [count(model, _images(model)[:1]) for count in counts]
        good = all(abs(found / expected - 1) < 5e-6 for found in others)
        text = "formula {:.6f}, fvcore {:.6f}, torch {:.6f} GMACs".format(expected, *others)
        yield good, f"test_vit + {reducer}", text


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
    return torch.randn(2, *tower_of(model.backbone).input_size(model.backbone))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"

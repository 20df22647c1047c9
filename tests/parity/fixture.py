"""Reading a fixture and collecting what differs from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm.models.deit
import timm.models.vision_transformer
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Unsupported(Exception):
    """A case that the library does not cover, with the reason."""


@dataclass
class Fixture:
    """One JSON file and the tensors beside it."""

    path: Path
    info: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.info = json.loads(self.path.read_text())

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def method(self) -> str:
        return self.info.get("method", "")

    @property
    def config(self) -> dict[str, Any]:
        return self.info.get("config", {})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it."""
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def backbone(self, **extra: Any) -> nn.Module:
        """The fixture's timm model with its weights, in evaluation mode."""
        spec = self.info["timm"]
        kwargs = {**spec["kwargs"], **extra}
        if isinstance(kwargs.get("img_size"), list):
            kwargs["img_size"] = tuple(kwargs["img_size"])
        module, _, cls = spec["class"].rpartition(".")
        model = getattr(
            {"timm.models.deit": timm.models.deit}.get(module) or timm.models.vision_transformer,
            cls,
        )(**kwargs)
        model.load_state_dict({k: v.float() for k, v in self.group("weights.").items()})
        return model.eval()

    @cached_property
    def images(self) -> Tensor:
        return self.tensors["input"].float()

    def tolerance(self, kind: str) -> tuple[float, float]:
        """`(atol, rtol)` of a kind of tensor."""
        entry = self.info.get("tolerances", {}).get(kind, {})
        if not isinstance(entry, dict):
            return 1e-4, 1e-4
        return float(entry.get("atol", 1e-4)), float(entry.get("rtol", 0.0))


@dataclass
class Case:
    """Result of one case: the worst logit difference and everything that does not match."""

    fixture: str
    name: str
    tolerance: float = 0.0
    gap: float = 0.0
    failures: list[str] = field(default_factory=list)
    checked: int = 0
    unsupported: str = ""

    def close(self, what: str, ours: Tensor, theirs: Tensor, tol: tuple[float, float]) -> float:
        """Compare floating-point tensors; returns the largest difference."""
        self.checked += 1
        if ours.shape != theirs.shape:
            self.failures.append(f"{what}: shape {tuple(ours.shape)} != {tuple(theirs.shape)}")
            return float("inf")
        if ours.numel() == 0:
            return 0.0
        ours, theirs = ours.detach().double(), theirs.double()
        gap = (ours - theirs).abs()
        worst = gap.max().item()
        if not bool((gap <= tol[0] + tol[1] * theirs.abs()).all()):
            self.failures.append(f"{what}: differs by {worst:.3g}")
        return worst

    def logits(self, what: str, ours: Tensor, theirs: Tensor, tol: tuple[float, float]) -> None:
        """Compare logits and keep the worst difference for the printed line."""
        self.tolerance = max(self.tolerance, tol[0])
        self.gap = max(self.gap, self.close(what, ours, theirs, tol))

    def equal(self, what: str, ours: Any, theirs: Any) -> None:
        """Compare exactly."""
        self.checked += 1
        if isinstance(ours, Tensor):
            same = ours.shape == theirs.shape and bool((ours == theirs).all())
        else:
            same = ours == theirs
        if not same:
            self.failures.append(f"{what}: not equal")

    @property
    def status(self) -> str:
        if self.unsupported:
            return "UNSUPPORTED"
        # A case that compared nothing has shown nothing.
        return "FAIL" if self.failures or not self.checked else "PASS"

    def line(self) -> str:
        text = f"{self.fixture} {self.name} {self.gap:.2e} {self.tolerance:.0e} {self.status}"
        detail = self.unsupported or "; ".join(self.failures[:3])
        return f"{text}  {detail}" if detail else text


def labels(source: Tensor) -> Tensor:
    """Partition of patches as labels: the smallest patch of each group, -1 where dropped."""
    batch, n = source.shape
    out = torch.full_like(source, -1)
    for b in range(batch):
        first: dict[int, int] = {}
        for patch in range(n):
            slot = int(source[b, patch])
            if slot >= 0:
                out[b, patch] = first.setdefault(slot, patch)
    return out


def gradient_check(
    case: Case, fx: Fixture, logits: Tensor, parameters: Iterable[tuple[str, nn.Parameter]]
) -> None:
    """Compare the stored loss, gradients and gradient norms with a backward pass of ours."""
    tol = fx.tolerance("grad")
    loss = torch.nn.functional.cross_entropy(logits, fx.tensors["labels"])
    loss.backward()
    stored = fx.group("grad.")
    if "ce_loss" in stored:
        case.close("ce_loss", loss.reshape(1), stored.pop("ce_loss"), tol)
    named = dict(parameters)
    for name, value in stored.items():
        grad = named[name].grad
        if grad is None:
            case.failures.append(f"grad {name}: none")
        else:
            case.close(f"grad {name}", grad, value, tol)
    for name, norm in fx.info.get("gradients", {}).get("param_grad_norms", {}).items():
        grad = named[name].grad if name in named else None
        if norm is None:
            case.equal(f"grad norm {name}", grad is None or float(grad.norm()) == 0.0, True)
        elif grad is None:
            case.failures.append(f"grad norm {name}: none")
        else:
            case.close(f"grad norm {name}", grad.norm(), torch.tensor(norm), tol)

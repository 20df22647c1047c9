"""The jobs of the suite `modes`: what is measured, in which order, and what is aimed at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zoo.measure.engines import EXPORTED

METHODS = ("tome", "topk", "evit", "pitome", "diffrate", "token_pooling")
CONTROLS = "controls"  # in place of a method: smaller images and models, with nothing reduced
FRACTION, ALIGNED = 0.6, 32
#: Name on the command line: timm's name, its arguments, and what the table calls it.
MODELS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "deit_small": ("deit_small_patch16_224", {}, "DeiT-S"),
    "deit_base": ("deit_base_patch16_224", {}, "DeiT-B"),
    "vit_large": ("vit_large_patch16_224", {}, "ViT-L/16"),
    "dinov2_small": ("vit_small_patch14_dinov2", {"img_size": 224}, "DINOv2-S/14, 224 px"),
    "dinov2_small_518": ("vit_small_patch14_dinov2", {}, "DINOv2-S/14, 518 px"),
    "dinov2_base": ("vit_base_patch14_dinov2", {"img_size": 224}, "DINOv2-B/14, 224 px"),
    "dinov2_base_518": ("vit_base_patch14_dinov2", {}, "DINOv2-B/14, 518 px"),
    "vit_fashion": ("vit_fashion", {}, "vit_fashion, 28 px"),
    "siglip_base": ("vit_base_patch16_siglip_224", {}, "SigLIP-B/16"),
}
PRECISIONS = ("float32", "bfloat16", "int8")
#: Mode: the engine, and where it can be measured.
MODES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "eager": ("torch", ("cpu", "cuda")),
    "aligned": ("torch", ("cpu", "cuda")),  # lengths in multiples of 32, weights packed in bfloat16
    "compile": ("compile", ("cpu", "cuda")),
    "graphs": ("torch", ("cuda",)),  # recorded and replayed
    "onnxruntime": ("onnxruntime", ("cpu",)),
    "openvino": ("openvino", ("cpu",)),
}


class Job(NamedTuple):
    """One comparison.

    Attributes:
        model: A key of `MODELS`.
        precision: "float32", "bfloat16" (weights and images cast once) or "int8" (OpenVINO).
        mode: A key of `MODES`.
        align: What lengths behind a reduction are multiples of.
        threads: CPU threads.
        batch: Images per batch.
        device: "cpu" or "cuda".
        fraction: Of the dense GMACs, that of the methods.
    """

    model: str
    precision: str
    mode: str
    align: int
    threads: int
    batch: int
    device: str = "cpu"
    fraction: float = FRACTION

    def __str__(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        where = where.replace("1 threads", "1 thread")
        align = f"align {self.align}, " if self.align > 1 else ""
        text = f"{self.model} {self.precision} {self.mode}, {align}batch {self.batch}, {where}"
        return text if self.fraction == FRACTION else f"{text}, {100 * self.fraction:g} %"

    @property
    def packed(self) -> bool:
        """Whether linear layers run on packed weights, dense ones too."""
        return self.mode == "aligned" and self.precision == "bfloat16" and self.device == "cpu"


#: So many of the lines below have a target, or stand in docs/deploy.md.
_EARLY = 12
# Jobs in this order; what stands in none of the lines comes last. A line: models, precisions,
# modes, alignments, batch sizes; empty is any.
_FIRST: tuple[tuple[str, str, str, str, str], ...] = (
    ("deit_small", "bfloat16", "aligned", "32", "1 16"),
    ("deit_small", "float32", "eager", "1", "16"),
    ("deit_small", "float32", "aligned", "32", "1"),
    ("dinov2_small_518", "bfloat16", "aligned", "32", "1"),
    ("deit_small", "float32", "onnxruntime", "32", "1"),
    ("deit_small", "bfloat16", "openvino", "32", "1 16"),
    ("deit_base", "bfloat16", "aligned", "32", "1 16"),
    ("deit_base", "float32", "aligned", "32", "1"),
    ("vit_large", "bfloat16", "aligned", "32", "1"),
    ("dinov2_small_518", "float32 bfloat16", "onnxruntime openvino", "32", "1"),
    ("dinov2_base_518", "bfloat16", "aligned", "32", "1"),
    ("deit_base", "float32", "eager", "1", "16"),
    ("deit_small", "", "eager", "", ""),
    ("deit_small", "float32", "aligned", "", ""),
    ("deit_small", "float32", "onnxruntime", "", ""),
    ("dinov2_small_518", "", "eager onnxruntime openvino", "", "1"),
    ("deit_small", "int8 float32", "openvino", "", ""),
    ("deit_base dinov2_small siglip_base", "", "eager aligned", "", ""),
    ("deit_base", "", "onnxruntime openvino", "", ""),
    ("", "", "eager aligned", "", "1"),
    ("deit_small", "", "compile graphs", "", ""),
    ("", "", "onnxruntime openvino", "", "1"),
)


def jobs(device: str = "cpu") -> list[Job]:
    """All jobs on a device, the most important first."""
    found = []
    threads = (1, 2) if device == "cpu" else (1,)
    for model, precision, (mode, (_, places)) in itertools.product(
        MODELS, PRECISIONS, MODES.items()
    ):
        if device not in places or not _possible(precision, mode):
            continue
        aligns = {"aligned": (ALIGNED,), "openvino": (ALIGNED,), "onnxruntime": (ALIGNED, 1)}
        for align, t, batch in itertools.product(aligns.get(mode, (1,)), threads, (1, 16)):
            found.append(Job(model, precision, mode, align, t, batch, device, FRACTION))
    return sorted(found, key=_place)


def _possible(precision: str, mode: str) -> bool:
    """Whether an engine computes in a precision."""
    if precision == "int8":
        return mode == "openvino"
    return precision == "float32" or mode != "onnxruntime"


def _place(job: Job) -> tuple[Any, ...]:
    own = (job.model, job.precision, job.mode, str(job.align), str(job.batch))

    def fits(line: Sequence[str]) -> bool:
        pairs = zip(own, line, strict=True)
        return all(not wanted or value in wanted.split() for value, wanted in pairs)

    place = next((i for i, line in enumerate(_FIRST) if fits(line)), len(_FIRST))
    # Of what has a target everything on one thread first; but exported models are dear to make.
    exported, early = MODES[job.mode][0] in EXPORTED, place < _EARLY
    own_threads = 1 if exported else job.threads
    return (not early, own_threads if early else 1, place, job.model, job.threads, job.batch)


def target(job: Job, method: str) -> float | None:
    """The efficiency against dense with the same kernels that is aimed at; None for none."""
    merges, prunes = method in ("tome", "pitome", "diffrate"), method in ("topk", "evit")
    if not (merges or prunes) or job.device != "cpu" or job.fraction != FRACTION:
        return None
    kind, large = (job.precision, job.mode, job.batch), job.model in ("deit_base", "vit_large")
    if job.model.endswith("_518"):
        if kind != ("bfloat16", "aligned", 1):
            return None
        return 1.0 if prunes else 0.85 if method == "pitome" else 0.95
    if job.model != "deit_small" and not large:
        return None
    pair = {
        ("float32", "eager", 16): (1.0, 1.0),
        ("float32", "aligned", 1): (0.82, 0.90),
        ("bfloat16", "aligned", 16): (0.92, 1.0),
        ("bfloat16", "aligned", 1): (0.77, 0.82) if large else (0.68, 0.79),
        ("float32", "onnxruntime", 1): (0.90, 0.94),
        ("bfloat16", "openvino", 1): (0.82, 0.88),
        ("bfloat16", "openvino", 16): (0.92, 0.97),
    }.get(kind)
    return None if pair is None else pair[0] if merges else pair[1]


def target_over_timm(job: Job, method: str) -> float | None:
    """The speed-up over timm's untouched model that is aimed at; None for none."""
    if (job.precision, job.mode, job.batch) != ("bfloat16", "aligned", 1):
        return None
    known = target(job, method) is not None and not job.model.endswith("_518")
    return None if not known else 1.40 if method in ("tome", "pitome", "diffrate") else 1.58

"""Graphs of a model as files of other runtimes.

Every writer takes a model in evaluation mode and example images, and writes a graph that takes
batches of any size.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reduction.functional.portable import to_be_rounded
from zoo.errors import ZooError

FORMATS = ("onnx", "openvino", "torch", "aoti")
PRECISIONS = ("float32", "bfloat16", "int8")
#: Which precisions a format can be written in.
POSSIBLE = {
    "onnx": ("float32",),
    "openvino": PRECISIONS,
    "torch": ("float32", "bfloat16"),
    "aoti": ("float32", "bfloat16"),
}
_WHY = {
    ("onnx", "bfloat16"): "ONNX Runtime has no bfloat16 products on a CPU",
    ("onnx", "int8"): "quantising is offered through OpenVINO",
    ("torch", "int8"): "quantising is offered through OpenVINO",
    ("aoti", "int8"): "quantising is offered through OpenVINO",
}


def check_format(kind: str, precision: str) -> None:
    """Refuse a format, or a precision that it cannot be written in.

    Raises:
        ZooError: With what to type.
    """
    if kind not in FORMATS:
        raise ZooError(f"export.format must be one of {', '.join(FORMATS)}, got {kind!r}")
    if precision not in PRECISIONS:
        raise ZooError(
            f"export.precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    if precision not in POSSIBLE[kind]:
        raise ZooError(
            f"export.format={kind} cannot be written in {precision}: {_WHY[kind, precision]}; "
            f"type export.precision={'|'.join(POSSIBLE[kind])}, or export.format=openvino"
        )


def needed(module: str, extra: str) -> Any:
    """Import what a format needs.

    Raises:
        ZooError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ZooError(
            f"{module} is needed for this format and cannot be imported ({error}); "
            f"pip install 'tokenzoo[{extra}]'"
        ) from error


def to_onnx(model: nn.Module, images: Tensor, folder: Path) -> Path:
    """Write `model.onnx` for ONNX Runtime.

    Args:
        model: In evaluation mode, float32.
        images: `(B, C, H, W)`, B of at least 2.
        folder: An existing folder.

    Raises:
        ZooError: If a package is missing, or the graph cannot be captured.
    """
    needed("onnxscript", "export")
    needed("onnx", "export")
    path = folder / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    with _quietly(), torch.no_grad(), _captured("onnx"):
        torch.onnx.export(
            model, (images,), path, dynamo=True, verbose=False, dynamic_shapes=shapes,
            input_names=["images"], output_names=["logits"], external_data=False,
        )  # fmt: skip
    return path


def to_openvino(
    model: nn.Module, images: Tensor, folder: Path, calibration: Iterable[Tensor] | None = None
) -> Path:
    """Write `model.xml` and `model.bin` for OpenVINO.

    The graph goes through ONNX, whose export is tested for every method. Weights are stored in
    float32; with bfloat16 the runtime is told so when the model is loaded.

    Args:
        model: In evaluation mode, float32.
        images: `(B, C, H, W)`, B of at least 2.
        folder: An existing folder.
        calibration: Batches of images as the model sees them; then products are quantised to int8
            by NNCF.

    Raises:
        ZooError: If a package is missing, or the graph cannot be captured.
    """
    needed("openvino", "openvino")
    with contextlib.nullcontext() if calibration is None else to_be_rounded():
        source = to_onnx(model, images, folder)
    path = onnx_to_openvino(source, folder, calibration)
    source.unlink()
    return path


def onnx_to_openvino(
    source: Path, folder: Path, calibration: Iterable[Tensor] | None = None
) -> Path:
    """As `to_openvino`, from a graph that `to_onnx` wrote.

    Raises:
        ZooError: If a package is missing.
    """
    openvino = needed("openvino", "openvino")
    path = folder / "model.xml"
    with _quietly():
        graph = openvino.convert_model(str(source))
        if calibration is not None:
            nncf = needed("nncf", "openvino")
            batches = [batch.numpy() for batch in calibration]
            if not batches:
                raise ZooError("export.precision=int8 needs images to calibrate on, got none")
            kind = nncf.ModelType.TRANSFORMER
            given = nncf.Dataset(batches)
            graph = nncf.quantize(graph, given, model_type=kind, subset_size=len(batches))
        openvino.save_model(graph, str(path), compress_to_fp16=False)
    return path


def to_torch(model: nn.Module, images: Tensor, folder: Path) -> Path:
    """Write `model.pt2`, a graph of `torch.export` that torch runs on any device.

    Args:
        model: In evaluation mode.
        images: `(B, C, H, W)`, B of at least 2, of the type of the weights.
        folder: An existing folder.

    Raises:
        ZooError: If the graph cannot be captured.
    """
    path = folder / "model.pt2"
    torch.export.save(_program(model, images), path)
    return path


def to_aoti(model: nn.Module, images: Tensor, folder: Path) -> Path:
    """Write `model.pt2`, compiled ahead of time for this kind of processor.

    Args:
        model: In evaluation mode.
        images: `(B, C, H, W)`, B of at least 2, of the type of the weights.
        folder: An existing folder.

    Raises:
        ZooError: If the graph cannot be captured or compiled.
    """
    from torch._inductor import aoti_compile_and_package

    path = folder / "model.pt2"
    program = _program(model, images)
    with _quietly(), torch.no_grad(), _captured("aoti"):
        aoti_compile_and_package(program, package_path=str(path))
    return path


def _program(model: nn.Module, images: Tensor) -> Any:
    with _quietly(), torch.no_grad(), _captured("torch"):
        shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


@contextlib.contextmanager
def _captured(kind: str) -> Iterator[None]:
    try:
        yield
    except ZooError:
        raise
    except Exception as error:  # exporters raise whatever they meet
        raise ZooError(f"export.format={kind} cannot capture this model: {_why(error)}") from error


def _why(error: BaseException) -> str:
    """What an exporter failed at, in one line: what it says around that is advice to its makers."""
    while error.__cause__ is not None and error.__cause__ is not error:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error))
    return " ".join(plain.split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporters say of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

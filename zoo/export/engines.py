"""Exported models run by their own runtimes: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import BadCheckpoint, ZooError
from zoo.export.formats import needed

Engine = Callable[[np.ndarray], np.ndarray]
_GRAPHS = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2", "aoti": "model.pt2"}


def open_engine(
    folder: str | Path, kind: str, precision: str = "float32", threads: int | None = None
) -> Engine:
    """Load the graph of an exported folder.

    Args:
        folder: As `export_model` wrote it.
        kind: The format.
        precision: The precision that it was written for.
        threads: CPU threads; None leaves the runtime's choice.

    Returns:
        A function from images `(B, C, H, W)` in float32 to logits `(B, classes)`.

    Raises:
        BadCheckpoint: If there is no graph, or the runtime cannot read it.
        ZooError: If the format is unknown or its runtime is not installed.
    """
    if kind not in _GRAPHS:
        raise ZooError(f"format must be one of {', '.join(_GRAPHS)}, got {kind!r}")
    path = Path(folder) / _GRAPHS[kind]
    if not path.is_file():
        raise BadCheckpoint(f"{path}: there is no such file; export with format={kind} first")
    opener = {"onnx": _onnx, "openvino": _openvino, "torch": _torch, "aoti": _aoti}[kind]
    try:
        return opener(path, precision, threads)
    except ZooError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadCheckpoint(f"{path}: {kind} cannot read it ({reason})") from error


def _onnx(path: Path, precision: str, threads: int | None) -> Engine:
    runtime = needed("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {name: images})[0])

    return run


def _openvino(path: Path, precision: str, threads: int | None) -> Engine:
    openvino = needed("openvino", "openvino")
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> np.ndarray:
        return np.array(request.infer([images])[0])

    return run


def _torch(path: Path, precision: str, threads: int | None) -> Engine:
    import torch

    module = torch.export.load(path).module()
    return _of_torch(module, precision, threads)


def _aoti(path: Path, precision: str, threads: int | None) -> Engine:
    import torch

    return _of_torch(torch._inductor.aoti_load_package(str(path)), precision, threads)


def _of_torch(module: Any, precision: str, threads: int | None) -> Engine:
    import torch

    dtype = getattr(torch, precision)
    if threads:
        torch.set_num_threads(threads)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            answers = module(torch.from_numpy(images).to(dtype))
        return np.asarray(answers.float().numpy())

    return run

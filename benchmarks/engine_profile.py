"""Where an exported model's time goes in its runtime, kind of operation by kind.

    python -m benchmarks.engine_profile onnxruntime topk diffrate
    python -m benchmarks.engine_profile openvino pitome diffrate

One image, one thread, 0.6 of the dense GMACs, counts aligned to 32, beside dense (OpenVINO
in bfloat16). Milliseconds per image, by the runtime's own profiler, which costs a few percent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoo
from benchmarks.models import backbone_name
from zoo.export.formats import needed, to_onnx
from zoo.model.attached import as_tensors

SCHEDULE = {"name": "target_gmacs", "fraction": 0.6, "align": 32}
WARM, RUNS, SHOWN = 3, 10, 9


def times_of(runtime: str, graph: Path, images: np.ndarray) -> Counter[str]:
    """Microseconds per image of every kind of operation.

    Args:
        runtime: "onnxruntime" or "openvino".
        graph: An ONNX file.
        images: `(1, 3, H, W)`.
    """
    profiler = _onnxruntime if runtime == "onnxruntime" else _openvino
    return profiler(graph, images)


def _onnxruntime(graph: Path, images: np.ndarray) -> Counter[str]:
    ort = needed("onnxruntime", "export")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(graph.with_suffix(""))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for _ in range(RUNS):
        session.run(None, {name: images})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            found[event["args"]["op_name"]] += event["dur"] / RUNS
    return found


def _openvino(graph: Path, images: np.ndarray) -> Counter[str]:
    ov: Any = needed("openvino", "openvino")
    core = ov.Core()
    options = {
        "INFERENCE_NUM_THREADS": 1,
        "PERF_COUNT": True,
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    request = core.compile_model(core.read_model(graph), "CPU", options).create_infer_request()
    found: Counter[str] = Counter()
    for i in range(WARM + RUNS):
        request.infer({0: images})
        if i >= WARM:
            for node in request.profiling_info:
                if (seconds := node.real_time.total_seconds()) > 0:
                    found[node.node_type] += 1e6 * seconds / RUNS
    return found


def table(times: dict[str, Counter[str]]) -> str:
    """Markdown: the largest kinds of the dense model and of each method, in milliseconds."""
    whole: Counter[str] = Counter()
    for found in times.values():
        whole.update(found)
    kinds = [kind for kind, _ in whole.most_common(SHOWN)]
    lines = ["| method | " + " | ".join(kinds) + " | others | sum |"]
    lines.append("|---" * (len(kinds) + 3) + "|")
    for method, found in times.items():
        total = sum(found.values())
        cells = [f"{found[kind] / 1e3:.2f}" for kind in kinds]
        rest = total - sum(found[kind] for kind in kinds)
        cells += [f"{rest / 1e3:.2f}", f"{total / 1e3:.2f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    usage = argparse.ArgumentParser(prog="python -m benchmarks.engine_profile")
    usage.add_argument("runtime", choices=("onnxruntime", "openvino"))
    usage.add_argument("reducers", nargs="+", help="e.g. tome topk")
    usage.add_argument("--backbone", default="deit_small")
    given = usage.parse_args(arguments)
    torch.set_num_threads(1)
    times = {}
    for method in (None, *given.reducers):
        torch.manual_seed(0)
        schedule = None if method is None else SCHEDULE
        name = backbone_name(given.backbone)
        model = zoo.create_model(name, reducer=method, schedule=schedule).eval()
        images = torch.randn(1, *model.tower.input_size(model.backbone))
        with tempfile.TemporaryDirectory() as folder:
            graph = to_onnx(as_tensors(model), images, Path(folder))
            times[method or "dense"] = times_of(given.runtime, graph, images.numpy())
    print(table(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())

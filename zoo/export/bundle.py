"""An exported model as a folder that needs nothing of this package."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.export.agreement import compare
from zoo.export.engines import open_engine
from zoo.export.formats import check_format, to_aoti, to_onnx, to_openvino, to_torch
from zoo.model.attached import as_reduced
from zoo.model.evaluating import evaluating
from zoo.model.reduced import ReducedViT
from zoo.version import __version__

#: How closely float32 has to agree with torch, relative to the largest logit where that is above 1.
TOLERANCE = 1e-4


class Bundle(NamedTuple):
    """What was written, and how well it agrees with torch.

    Attributes:
        folder: Where it lies.
        format: "onnx", "openvino", "torch" or "aoti".
        precision: "float32", "bfloat16" or "int8".
        files: Names of the files of the graph.
        megabytes: Their size, in 1e6 bytes.
        max_error: Largest difference of a logit to torch in float32, over all images.
        n_undecided: Images on which float32 differs for no other reason than rounding, see
            `zoo.export.agreement`.
        agreement: Percent of images with the same first class.
        n_random: Images of random numbers that were compared.
        n_real: Other images that were compared.
    """

    folder: str
    format: str
    precision: str
    files: tuple[str, ...]
    megabytes: float
    max_error: float
    n_undecided: int
    agreement: float
    n_random: int
    n_real: int


def export_model(
    model: ReducedViT,
    folder: str | Path,
    format: str = "onnx",
    precision: str = "float32",
    preprocess: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    images: Iterable[Tensor] = (),
    calibration: Iterable[Tensor] = (),
) -> Bundle:
    """Write a model for another runtime, with all that is needed to use it, and compare the two.

    The folder holds the graph for batches of any size, `preprocess.json`, `labels.json` where
    classes have names, `recipe.json`, and `run.py`, which needs numpy, Pillow and the runtime.

    Args:
        model: With any reducer. Methods whose counts follow the image run at their upper limit.
        folder: Is made; what lies there under the same names is replaced.
        format: "onnx" (ONNX Runtime), "openvino", "torch" (`torch.export`) or "aoti" (compiled
            ahead of time).
        precision: "float32"; "bfloat16" (openvino, torch, aoti); "int8" (openvino).
        preprocess: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, as timm's
            data configuration has them; None is the model's own.
        labels: Names of the classes, in order.
        images: Batches `(B, C, H, W)` to compare on, beside random ones.
        calibration: Batches for "int8".

    Raises:
        ZooError: If something is not installed or cannot be exported, the model does not answer
            with one vector for each image, or float32 does not agree with torch to 1e-4 where
            rounding does not decide.
    """
    check_format(format, precision)
    model = as_reduced(model)
    if labels is not None and model.num_classes and len(labels) != model.num_classes:
        raise ZooError(f"{len(labels)} labels for a model of {model.num_classes} classes")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ZooError(f"{target} is a file; name a folder")
    with evaluating(model):
        example = torch.randn(2, *model.tower.input_size(model.backbone))
        found = [batch.float().cpu() for batch in images]
        expected = [_answers(model, batch) for batch in (*_random(example), *found)]
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            graph = _write(model, example, Path(scratch), format, precision, calibration)
            files = tuple(sorted(p.name for p in Path(scratch).iterdir() if p.stem == graph.stem))
            for name in files:  # whole or not at all
                os.replace(Path(scratch) / name, target / name)
    _describe(model, target, format, precision, preprocess, labels)
    run = open_engine(target, format, precision)
    batches = [*_random(example), *found]
    compared = [(x, y, run(x.numpy())) for x, y in zip(batches, expected, strict=True)]
    with evaluating(model):
        tolerance = TOLERANCE if precision == "float32" else None
        known = compare(lambda x: _answers(model, x), compared, tolerance)
    if not known.agrees:
        raise ZooError(
            f"{target}: the exported model differs from torch by {known.error:.2g}, expected at "
            f"most {known.limit:.2g}; keep it away from use, and report it with its recipe.json"
        )
    same = sum(int((y.numpy().argmax(1) == z.argmax(1)).sum()) for _, y, z in compared)
    total = sum(len(batch) for batch in batches)
    size = sum((target / name).stat().st_size for name in files) / 1e6
    real = sum(len(batch) for batch in found)
    share = 100 * same / total
    return Bundle(
        str(target), format, precision, files, size, known.error, known.undecided, share,
        total - real, real,
    )  # fmt: skip


def _random(example: Tensor) -> list[Tensor]:
    """Batches of other sizes than the one that is captured."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, *example.shape[1:], generator=generator) for n in (1, 3)]


@torch.no_grad()
def _answers(model: ReducedViT, images: Tensor) -> Tensor:
    weight = next(model.parameters())
    answers: Any = model(images.to(weight.device, weight.dtype))
    if isinstance(answers, Tensor) and answers.dim() == 2:
        return answers.float().cpu()
    shape = getattr(answers, "shape", None)
    found = f"a {type(answers).__name__}" if shape is None else f"one of the shape {tuple(shape)}"
    raise ZooError(
        "expected a model that answers with one vector for each image, a tensor (B, N), got "
        f"{found}; an image tower of open_clip does so with output_tokens=False, or pool_type='tok'"
        " in place of 'none', a model of timm with global_pool='token' or 'avg' in place of ''"
    )


def _write(
    model: ReducedViT,
    example: Tensor,
    folder: Path,
    format: str,
    precision: str,
    calibration: Iterable[Tensor],
) -> Path:
    weight = next(model.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ZooError(
            f"export starts from float32 weights on the CPU, got {weight.dtype} on "
            f"{weight.device}; leave weights_dtype and device alone and say export.precision"
        )
    if format == "onnx":
        return to_onnx(model, example, folder)
    if format == "openvino":
        batches = list(calibration) if precision == "int8" else None
        return to_openvino(model, example, folder, batches)
    write = to_torch if format == "torch" else to_aoti
    if precision != "bfloat16":
        return write(model, example, folder)
    # A cast and back leaves rounded weights: the caller's stay as they are.
    return write(copy.deepcopy(model).bfloat16(), example.bfloat16(), folder)


def _describe(
    model: ReducedViT,
    folder: Path,
    format: str,
    precision: str,
    preprocess: Mapping[str, Any] | None,
    labels: Sequence[str] | None,
) -> None:
    from zoo.data.checks import data_config

    config = dict(preprocess) if preprocess is not None else data_config(model)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    shown = {key: _plain(config.get(key)) for key in keys}
    _json(folder / "preprocess.json", shown)
    if labels is not None:
        _json(folder / "labels.json", list(labels))
    else:
        (folder / "labels.json").unlink(missing_ok=True)
    recipe = {
        "format": format, "precision": precision, "recipe": model.recipe,
        "token_counts": model.token_counts(),
        "versions": {"tokenzoo": __version__, "torch": str(torch.__version__)},
    }  # fmt: skip
    _json(folder / "recipe.json", recipe)
    script = importlib.resources.files("zoo.assets") / "run_exported.py.txt"
    (folder / "run.py").write_text(script.read_text(encoding="utf-8"), encoding="utf-8")


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

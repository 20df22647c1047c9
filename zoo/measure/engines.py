"""What runs a model: torch, torch compiled, or the runtime of another kind, on its exported graph.

An `Engine` turns models into steps that a clock can call; `zoo.measure.throughput` times them in
turns.
"""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.measure.device import like_weights
from zoo.model.attached import as_reduced, as_tensors

Step = Callable[[], object]
#: From a batch of images to what is timed; copies and casts are done before.
Start = Callable[[Tensor], Step]

ENGINES = ("torch", "compile", "onnxruntime", "openvino")
#: The format of `zoo.export` that a runtime reads, and the extra that installs it.
EXPORTED = {"onnxruntime": ("onnx", "export"), "openvino": ("openvino", "openvino")}
#: How closely an exported model has to answer in float32, relative to the largest logit above 1.
_TOLERANCE = 1e-3


class Engine:
    """One way to run models.

    Args:
        name: One of `ENGINES`.
        device: Where torch runs; exported models run on the CPU.
        dtype: Precision of autocast; float32 switches it off.
        threads: CPU threads of the runtimes; None is torch's setting. Torch's own are set by who
            measures.
        precision: Of exported models: "float32", "bfloat16", or "int8", which is calibrated on
            random images and for its speed alone; None is that of the weights.
        graphs: Exported before, maybe for another engine.
        option: What the name is the value of, for messages.

    Raises:
        ZooError: There is no such engine, it is not installed, or it cannot do what is asked.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        precision: str | None = None,
        graphs: Graphs | None = None,
        option: str = "throughput.engine",
    ) -> None:
        check_engine(name, device, dtype, option)
        self.name, self.device, self.dtype = name, device, dtype
        self.threads, self.precision, self.option = threads, precision, option
        self.graphs = graphs or Graphs()
        self._known: WeakKeyDictionary[nn.Module, Start] = WeakKeyDictionary()

    @property
    def version(self) -> str | None:
        """Version of the runtime, None for torch, whose version every row has."""
        return importlib.metadata.version(self.name) if self.name in EXPORTED else None

    def start(self, model: nn.Module) -> Start:
        """A model as a function from images to a step; exported or compiled once.

        Args:
            model: In evaluation mode, on the device.

        Raises:
            ZooError: If the model cannot be exported, or does not answer as in torch.
        """
        if model not in self._known:
            self._known[model] = self._made(as_tensors(model))
        return self._known[model]

    def _made(self, model: nn.Module) -> Start:
        if self.name in EXPORTED:
            return self._exported(model)
        if self.name == "compile":
            _many_compiled()
            # One graph per shape: a graph for all sizes, which a second size asks for, is slower.
            model = torch.compile(model, dynamic=False)  # type: ignore[assignment]

        def start(images: Tensor) -> Step:
            given = like_weights(images, model, self.device)
            mixed = self.dtype != torch.float32

            def step() -> object:
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
                    return model(given)

            return step

        return start

    def _exported(self, model: nn.Module) -> Start:
        from zoo.export.engines import open_engine
        from zoo.export.formats import onnx_to_openvino

        half = next(model.parameters()).dtype == torch.bfloat16
        precision = self.precision or ("bfloat16" if half else "float32")
        if precision != "float32" and self.name == "onnxruntime":
            raise ZooError(
                f"{self.option}={self.name}: ONNX Runtime has no {precision} products on a CPU; "
                f"leave weights_dtype out, or type {self.option}=openvino"
            )
        kind, _ = EXPORTED[self.name]
        threads = self.threads or torch.get_num_threads()
        with torch.inference_mode(False), tempfile.TemporaryDirectory() as scratch:
            try:
                source, images, wanted = self.graphs.of(model)
                folder = source.parent
                if kind == "openvino":
                    folder = Path(scratch)
                    onnx_to_openvino(source, folder, [images] * 4 if precision == "int8" else None)
            except ZooError as error:
                raise ZooError(
                    f"{self.option}={self.name}: {error}; leave {self.name} out for this model"
                ) from error
            run = open_engine(folder, kind, precision, threads)
        if precision == "float32":
            self._check(model, images, wanted, run(images.numpy()))

        def start(images: Tensor) -> Step:
            array = images.float().cpu().numpy()
            return lambda: run(array)

        return start

    def _check(self, model: nn.Module, images: Tensor, wanted: Tensor, found: np.ndarray) -> None:
        from zoo.export.agreement import compare

        with torch.no_grad():
            known = compare(_in_float32(model), [(images, wanted, found)], _TOLERANCE)
        if not known.agrees:
            raise ZooError(
                f"{self.option}={self.name}: the exported model differs from torch by "
                f"{known.error:.2g}, expected at most {known.limit:.2g}; its speed would be that "
                f"of another model, leave {self.name} out"
            )


class Graphs:
    """Models in ONNX, each written once, in a folder that goes with this object."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._known: WeakKeyDictionary[nn.Module, tuple[Path, Tensor, Tensor]] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> tuple[Path, Tensor, Tensor]:
        """The file of a model, images, and what torch answers to them in float32.

        Args:
            model: In evaluation mode.

        Raises:
            ZooError: If it cannot be exported.
        """
        if model not in self._known:
            self._known[model] = self._written(model)
        return self._known[model]

    def _written(self, model: nn.Module) -> tuple[Path, Tensor, Tensor]:
        from zoo.export.formats import to_onnx

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        whole = as_reduced(model)
        size = whole.tower.input_size(whole.backbone)
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        given = _in_float32(model)  # as a graph is; the runtime is told what to compute in
        with torch.no_grad():
            return to_onnx(given, images, folder), images, given(images).float()


def _in_float32(model: nn.Module) -> nn.Module:
    same = next(model.parameters()).dtype == torch.float32
    return model if same else copy.deepcopy(model).float()


def check_engine(
    name: str, device: torch.device, dtype: torch.dtype, option: str = "throughput.engine"
) -> None:
    """Refuse an engine that there is not, or not here.

    Args:
        name: As it was typed.
        device: That was chosen.
        dtype: Precision of autocast.
        option: What it is the value of.

    Raises:
        ZooError: With what to type.
    """
    if name not in ENGINES:
        raise ZooError(f"{option}={name}: expected one of {', '.join(ENGINES)}")
    if name not in EXPORTED:
        return
    if device.type != "cpu":
        raise ZooError(f"{option}={name} runs on the CPU, not on {device}; type device=cpu")
    if dtype != torch.float32:
        word = str(dtype).removeprefix("torch.")
        instead = "weights_dtype=bfloat16" if name == "openvino" else "dtype=float32"
        raise ZooError(
            f"{option}={name} knows no autocast, which dtype={word} is; type {instead} instead"
        )
    from zoo.export.formats import needed

    for module in (name, "onnxscript", "onnx"):
        needed(module, EXPORTED[name][1] if module == name else "export")


def _many_compiled() -> None:
    """Let a process compile many models of one class, and say so where even that is too few.

    Past its limit torch goes on uncompiled, and a time would be of another engine.
    """
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, 256)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 1024)
    config.fail_on_recompile_limit_hit = True

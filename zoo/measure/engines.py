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
from zoo.model.attached import as_tensors

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
        int8: Quantise the exported model, calibrated on random images: for its speed alone.
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
        int8: bool = False,
        option: str = "throughput.engine",
    ) -> None:
        check_engine(name, device, dtype, option)
        if int8 and name != "openvino":
            raise ZooError(f"{option}={name} has no int8; type {option}=openvino")
        self.name, self.device, self.dtype = name, device, dtype
        self.threads, self.int8, self.option = threads, int8, option
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
        from zoo.export.formats import to_onnx, to_openvino

        weight = next(model.parameters())
        half = weight.dtype == torch.bfloat16
        if half and self.name == "onnxruntime":
            raise ZooError(
                f"{self.option}={self.name}: ONNX Runtime has no bfloat16 products on a CPU; "
                f"leave weights_dtype out, or type {self.option}=openvino"
            )
        # The graph holds float32; the runtime is told what to compute in.
        given = model if weight.dtype == torch.float32 else copy.deepcopy(model).float()
        size = _input_size(model)
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        kind, _ = EXPORTED[self.name]
        precision = "int8" if self.int8 else "bfloat16" if half else "float32"
        threads = self.threads or torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            try:
                if kind == "onnx":
                    to_onnx(given, images, Path(folder))
                else:
                    calibration = [images] * 4 if self.int8 else None
                    to_openvino(given, images, Path(folder), calibration)
            except ZooError as error:
                raise ZooError(
                    f"{self.option}={self.name}: {error}; leave {self.name} out for this model"
                ) from error
            run = open_engine(folder, kind, precision, threads)
        if precision == "float32":
            self._check(run(images.numpy()), given, images)

        def start(images: Tensor) -> Step:
            array = images.float().cpu().numpy()
            return lambda: run(array)

        return start

    def _check(self, found: np.ndarray, model: nn.Module, images: Tensor) -> None:
        with torch.no_grad():
            wanted = model(images).float().numpy()
        gap, most = float(np.abs(found - wanted).max()), max(1.0, float(np.abs(wanted).max()))
        if not gap <= _TOLERANCE * most:
            raise ZooError(
                f"{self.option}={self.name}: the exported model differs from torch by {gap:.2g}, "
                f"expected at most {_TOLERANCE * most:.2g}; its speed would be that of another "
                f"model, leave {self.name} out"
            )


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


def _input_size(model: nn.Module) -> tuple[int, ...]:
    from zoo.model.attached import as_reduced

    whole = as_reduced(model)
    return tuple(whole.tower.input_size(whole.backbone))


def _many_compiled() -> None:
    """Let a process compile many models of one class, and say so where even that is too few.

    Past its limit torch goes on uncompiled, and a time would be of another engine.
    """
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, 256)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 1024)
    config.fail_on_recompile_limit_hit = True

"""What single rows say about speed, fidelity and cost, in the form that entries hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.report.words import is_dense, number, total_gmacs

# Lightning's names of precisions, and torch's.
_PRECISIONS = {
    "32": "float32",
    "32-true": "float32",
    "16-mixed": "float16",
    "16-true": "float16",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "64-true": "float64",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Speed:
    """Throughput of one entry in one setting.

    `dense` is the unreduced model's, run alike; `timm` that of the model as its library has it.
    """

    rate: float
    dense: float | None
    row: Row
    memory: float | None = None  # MiB at most
    memory_dense: float | None = None
    timm: float | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the dense model."""
        return self.rate / self.dense if self.dense else None

    @property
    def efficiency(self) -> float | None:
        """The speed-up over what the arithmetic promises: 1 is all of it."""
        return self._part(self.speedup)

    @property
    def over_timm(self) -> float | None:
        """How many times faster than the model as its library has it."""
        return self.rate / self.timm if self.timm else None

    @property
    def efficiency_over_timm(self) -> float | None:
        """As `efficiency`, of the speed-up over the untouched model."""
        return self._part(self.over_timm)

    def _part(self, speedup: float | None) -> float | None:
        whole, total = number(self.row.get("gmacs_dense")), total_gmacs(self.row)
        return speedup * total / whole if speedup is not None and whole and total else None


def speeds(row: Row) -> dict[str, Speed]:
    """What a row says about speed: one setting per batch size."""
    several = row.get("by_batch")
    parts = several if isinstance(several, Sequence) and several else [row]
    found = {}
    for part in parts:
        rate = number(part.get("imgs_per_s")) if isinstance(part, Mapping) else None
        if rate:
            keys = ("imgs_per_s_dense", "peak_mem_mb", "peak_mem_mb_dense")
            dense, memory, memory_dense = (number(part.get(key)) for key in keys)
            one = {**row, "batch": part.get("batch")}
            timm = number(part.get("imgs_per_s_timm")) or _timm_beside(one)
            found[setting(one)] = Speed(rate, dense, one, memory, memory_dense, timm)
    return found


def _timm_beside(row: Row) -> float | None:
    """What rows of benchmarks say of timm's own model."""
    bench = row.get("bench")
    both = bench.get("ms_dense") if isinstance(bench, Mapping) else None
    ms = number(both.get("timm")) if isinstance(both, Mapping) else None
    batch = number(row.get("batch"))
    return 1e3 * batch / ms if ms and batch else None


def fidelity(row: Mapping[str, Any]) -> dict[str, float]:
    """Agreement, divergence and cosine, as far as a row has measured them."""
    given = row.get("fidelity")
    if not isinstance(given, Mapping):
        return {}
    found = {name: number(given.get(name)) for name in ("agreement", "kl", "cosine")}
    return {name: value for name, value in found.items() if value is not None}


def reducer_share(row: Row) -> float | None:
    """Percent of the GMACs that are the reducer's own; None for dense models."""
    gmacs, total = row.get("gmacs"), total_gmacs(row)
    part = number(gmacs.get("reducer")) if isinstance(gmacs, Mapping) else None
    return None if part is None or not total or is_dense(row) else 100 * part / total


def setting(row: Mapping[str, Any]) -> str:
    """The setting of a throughput, batch size included: only rates of one setting are compared."""
    parts = [hardware(row), *switched_on(row), *_benchmark(row.get("bench"))]
    if (batch := number(row.get("batch"))) is not None:
        parts.append(f"batch {batch:.0f}")
    return ", ".join(parts)


def precision(row: Mapping[str, Any]) -> str:
    """The computation type in torch's words, and the type of the weights where they were cast."""
    name = str(row.get("dtype") or "float32")
    name, weights = _PRECISIONS.get(name, name), row.get("weights_dtype")
    if not weights or (weights == "float32" == name):
        return name
    return f"{weights} weights" if name == "float32" else f"{name}, {weights} weights"


def hardware(row: Mapping[str, Any]) -> str:
    """Device, precision and engine of a run; torch is not named."""
    parts = [row.get("device") or "unknown device", precision(row) if row.get("dtype") else None]
    engine = row.get("engine")
    if row.get("compile") or engine == "compile":
        parts.append("compiled")
    elif engine not in (None, "torch"):
        parts.append(engine)
    return ", ".join(str(p) for p in parts if p)


def _benchmark(settings: Any) -> list[str]:
    """What a benchmark did otherwise than inference call by call."""
    given = settings if isinstance(settings, Mapping) else {}
    mode = str(given.get("mode") or "inference")
    parts = [mode] if mode != "inference" else []
    parts += ["folded size bias"] * (given.get("bias") == "fold")
    return parts + ["CUDA graphs"] * bool(given.get("cuda_graphs"))


def switched_on(row: Mapping[str, Any]) -> list[str]:
    """Run-time options of a row that are not at their defaults."""
    given = row.get("runtime")
    given = given if isinstance(given, Mapping) else {}
    usual = (None, False, "off", "plain", "full")
    return [f"{key}={value}" for key, value in sorted(given.items()) if value not in usual]

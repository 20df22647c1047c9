"""Which machine a time was measured on: its processor and the instructions that it has."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

#: Instruction sets that decide how fast a product is, as Linux spells them.
INSTRUCTIONS = (
    *("amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512f"),
    *("avx_vnni", "avx2", "sve", "bf16", "i8mm", "asimd"),
)


@functools.lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """Returns name of the processor, family and model, cores, and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = read(text)
    found["name"] = found["name"] or platform.processor() or platform.machine() or "unknown"
    return {**found, "cores": os.cpu_count()}


def read(text: str) -> dict[str, Any]:
    r"""What a file in the form of /proc/cpuinfo says of its first processor.

    >>> read("model name : Some CPU 9\nflags : fpu avx2 amx_bf16")["isa"]
    ['amx_bf16', 'avx2']
    """
    facts: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "name": facts.get("model name") or facts.get("Hardware"),
        "family": facts.get("cpu family"),
        "model": facts.get("model"),
        "isa": [name for name in INSTRUCTIONS if name in flags],
    }


def in_words(found: dict[str, Any]) -> str:
    """One phrase for people: "AMD EPYC (family 26, model 2): no AMX, avx512_bf16"."""
    where = [f"{key} {found[key]}" for key in ("family", "model") if found.get(key)]
    name = str(found.get("name") or "an unknown processor")
    isa = list(found.get("isa") or ())
    amx = [flag for flag in isa if flag.startswith("amx_")]
    has = [flag for flag in isa if flag.startswith(("avx512_bf16", "avx512_vnni", "avx512f"))]
    words = [*amx, *has] if amx else ["no AMX", *has]
    about = f" ({', '.join(where)})" if where else ""
    return f"{name}{about}: {', '.join(words)}"

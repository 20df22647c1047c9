"""Result rows as words and numbers: what the tables, the plots and the summary line share.

Rows come from files, so everything here takes any value and says nothing rather than fail.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

DENSE = "none"
"""The method name of a model with nothing reduced."""


_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, moves of the cursor
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c)"  # titles, links
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)


def printable(value: Any) -> Any:
    r"""A value in whose texts nothing is left that does more to a terminal than to be read.

    >>> printable({"method": "\x1b[31mtome\x1b[0m\nevit"})
    {'method': 'tome evit'}
    """
    if isinstance(value, str):
        if value.isprintable():
            return value
        text = _ESCAPES.sub("", value)
        return "".join(c if c.isprintable() else " " * c.isspace() for c in text)
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(item) for item in value]
    return value


def number(value: Any) -> float | None:
    """The value as a finite float, or None for anything else (rows come from files)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def total_gmacs(row: Mapping[str, Any]) -> float | None:
    """Total GMACs of a row, None where they were not counted."""
    gmacs = row.get("gmacs")
    return number(gmacs.get("total") if isinstance(gmacs, Mapping) else gmacs)


def most_gmacs(row: Mapping[str, Any]) -> float | None:
    """Total GMACs; the schedule's limit where they depend on the image and were measured."""
    sample = row.get("gmacs_sample")
    limit = number(sample.get("limit")) if isinstance(sample, Mapping) else None
    return total_gmacs(row) if limit is None else limit


def cost_range(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Cheapest and most expensive image in GMACs, where the cost depends on the image."""
    sample = row.get("gmacs_sample")
    if not isinstance(sample, Mapping):
        return None
    low, high = number(sample.get("min")), number(sample.get("max"))
    return None if low is None or high is None else (low, high)


def format_range(row: Mapping[str, Any]) -> str:
    """`cost_range` in brackets, behind the mean; empty where the cost is always the same."""
    ends = cost_range(row)
    return "" if ends is None else f" [{format_gmacs(ends[0])}, {format_gmacs(ends[1])}]"


def interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of top-1 in percent, None where there is none."""
    ends = row.get("ci95")
    if not isinstance(ends, Sequence) or len(ends) != 2:
        return None
    low, high = number(ends[0]), number(ends[1])
    return None if low is None or high is None else (low, high)


def bracketed(ends: tuple[float, float]) -> str:
    """An interval as it is: neither symmetric, nor rounded to more than it says.

    >>> bracketed((97.997, 99.848))
    '[98.00, 99.85]'
    """
    return "[{:.2f}, {:.2f}]".format(*ends)


def describe_size(row: Mapping[str, Any]) -> str:
    """Side of the input in pixels, or height and width.

    >>> describe_size({"img_size": 224}), describe_size({"img_size": [224, 160]})
    ('224 px', '224x160 px')
    """
    size = row.get("img_size")
    if isinstance(size, Sequence) and not isinstance(size, str):
        size = "x".join(map(str, size))
    return f"{size} px" if size else ""


def format_millions(params: Any) -> str:
    """Parameters, given in millions.

    >>> format_millions(22.0507), format_millions(0.56785), format_millions(None)
    ('22.1 M', '0.568 M', '')
    """
    value = number(params)
    return "" if value is None else f"{value:.3g} M" if value < 1000 else f"{value:,.0f} M"


def _as_published(row: Mapping[str, Any]) -> str:
    """The cost as the method's paper counts it, where that differs."""
    paper = row.get("gmacs_paper")
    paper = paper if isinstance(paper, Mapping) else {}
    total = number(paper.get("total"))
    convention = paper.get("convention") or "its paper"
    return "" if total is None else f", {format_gmacs(total)} GMACs as {convention} counts"


def plugins(row: Mapping[str, Any]) -> list[str]:
    """Names of the plugins in a row's recipe."""
    recipe = row.get("recipe")
    found = recipe.get("plugins") if isinstance(recipe, Mapping) else None
    found = found if isinstance(found, Sequence) and not isinstance(found, str) else []
    return [str(p.get("name", p) if isinstance(p, Mapping) else p) for p in found]


def tasks(row: Mapping[str, Any]) -> set[str]:
    """What was done in a run.

    >>> sorted(tasks({"task": ["train", "accuracy"]})), tasks({"task": "flops"}), tasks({})
    (['accuracy', 'train'], {'flops'}, set())
    """
    found = row.get("task")
    if isinstance(found, str):
        return {found}
    return set(map(str, found)) if isinstance(found, Sequence) else set()


def is_dense(row: Mapping[str, Any]) -> bool:
    """Whether the row is of a model with nothing reduced, and nothing added by a plugin."""
    return row.get("method") in (None, "", DENSE, "dense") and not plugins(row)


def is_without_result(row: Mapping[str, Any]) -> bool:
    """Whether the run failed, or was skipped because what it asked for cannot be."""
    return row.get("status") in ("failed", "skipped")


def why_without_result(row: Mapping[str, Any]) -> str:
    """What became of such a run, and why.

    >>> why_without_result({"status": "failed", "error": "too hot"})
    'FAILED: too hot'
    """
    reason = " ".join(str(row.get("error") or "no reason recorded").split())
    return f"{'skipped' if row.get('status') == 'skipped' else 'FAILED'}: {reason}"


def describe_budget(schedule: Mapping[str, Any] | None) -> str:
    """Say a schedule in a few characters.

    >>> describe_budget({"name": "constant_r", "r": 13})
    'r=13'
    >>> describe_budget({"name": "keep_rate", "rate": 0.7, "blocks": [3, 6, 9]})
    'keep 0.7 @3,6,9'
    >>> describe_budget({"name": "target_gmacs", "fraction": 0.5})
    '50 % of dense'
    >>> describe_budget({"name": "target_speedup", "speedup": 1.5, "batch": 1})
    '1.5x as fast'
    >>> describe_budget({"name": "grid", "grid": "5x5"})
    'grid 5x5'
    """
    if not isinstance(schedule, Mapping):
        return "" if schedule is None else str(schedule)
    skipped = ("name", "strict")  # strict only says what to do when a budget cannot be met
    known = {str(k): v for k, v in schedule.items() if v is not None and k not in skipped}
    name = str(schedule.get("name") or "")
    if list(known) == [name]:
        return f"{name} {_short(known[name])}"
    if name == "constant_r" and "r" in known:
        slope = f" inflection {_short(known['inflection'])}" if "inflection" in known else ""
        return f"r={_short(known['r'])}{slope}"
    if name == "keep_rate" and "rate" in known:
        blocks = f" @{_short(known['blocks'])}" if known.get("blocks") else ""
        return f"keep {_short(known['rate'])}{blocks}"
    if name == "per_block" and "keep" in known:
        return f"keep {_short(known['keep'])}"
    if name == "target_gmacs" and "gmacs" in known:
        return f"{_short(known['gmacs'])} GMACs"
    if name == "target_gmacs" and number(known.get("fraction")) is not None:
        return f"{100 * known['fraction']:.4g} % of dense"
    if name == "target_ms" and "ms" in known:
        return f"{_short(known['ms'])} ms"
    if name == "target_speedup" and "speedup" in known:
        return f"{_short(known['speedup'])}x as fast"
    arguments = [f"{key}={_short(value)}" for key, value in known.items()]
    return " ".join([name, *arguments[:3]]).strip()


def _short(value: Any) -> str:
    """A value in at most about 16 characters."""
    if number(value) is not None:
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_short(item) for item in value]
        return ",".join(items if len(items) <= 4 else [*items[:3], "…"])
    text = str(value)
    return text if len(text) <= 16 else text[:15] + "…"


def describe_tokens(tokens: Any) -> str:
    """First block's tokens in, last block's tokens out: ``'197->41'``; empty if not known."""
    try:
        return f"{int(tokens[0][0])}->{int(tokens[-1][-1])}"
    except (TypeError, IndexError, KeyError, ValueError):
        return ""


def format_gmacs(gmacs: float) -> str:
    """GMACs with four figures or so, small models included."""
    for limit, decimals in ((100, 1), (10, 2), (1, 3), (0.01, 4)):
        if gmacs >= limit:
            return f"{gmacs:.{decimals}f}"
    return f"{gmacs:.3g}"


def format_rate(imgs_per_s: float) -> str:
    """Images per second, with a decimal only where it says something."""
    return f"{imgs_per_s:,.0f}" if imgs_per_s >= 20 else f"{imgs_per_s:.3g}"


def _like_dense(row: Mapping[str, Any]) -> list[str]:
    """How close the answers are to the dense model's, where that was measured."""
    found = row.get("fidelity")
    if not isinstance(found, Mapping):
        return []
    if (agreement := number(found.get("agreement"))) is not None:
        return [f"{agreement:.1f} % as dense"]
    cosine = number(found.get("cosine"))
    return [] if cosine is None else [f"feature cosine {cosine:.4f}"]


def _on_features(row: Mapping[str, Any]) -> list[str]:
    """What tasks on features found."""
    found = []
    for key, name in (("knn", "k-NN"), ("linear_probe", "linear probe"), ("zeroshot", "zero-shot")):
        given = row.get(key)
        given = given if isinstance(given, Mapping) else {}
        if (top1 := number(given.get("top1"))) is not None:
            ends = interval(given)
            found.append(f"{name} {top1:.2f} %" + (f" {bracketed(ends)}" if ends else ""))
        if (same := number(given.get("agreement"))) is not None:
            found.append(f"{name} {same:.1f} % as dense")
        memory = given.get("reservoir")
        memory = memory if isinstance(memory, Mapping) else {}
        if (top1 := number(memory.get("top1"))) is not None:
            found.append(f"{top1:.2f} % with a reservoir of {memory.get('size')}")
    kinds = row.get("retrieval")
    for kind, given in kinds.items() if isinstance(kinds, Mapping) else ():
        given = given if isinstance(given, Mapping) else {}
        known = (number(given.get(name)) for name in ("recall1", "recall5", "map"))
        numbers = [value for value in known if value is not None]
        if len(numbers) == 3:
            of = "" if kind == "class" else f" of the same picture ({kind})"
            found.append("recall@1 {:.2f}, @5 {:.2f}, mAP {:.2f} %".format(*numbers) + of)
    cosine = row.get("centred_cosine")
    cosine = cosine if isinstance(cosine, Mapping) else {}
    if (mean := number(cosine.get("mean"))) is not None:
        worst = number(cosine.get("worst"))
        least = "" if worst is None else f", at least {worst:.4f}"
        found.append(f"centred cosine {mean:.4f}{least}")
    return found


def _selected(row: Mapping[str, Any]) -> list[str]:
    """What a selector keeps, against its controls, at every number of tokens."""
    found = row.get("select")
    if not isinstance(found, Mapping):
        return []
    name = (found.get("selector") or {}).get("name")
    parts = []
    for entry in found.get("by_keep") or ():
        ours, lots, small = (entry.get(k) or {} for k in ("selector", "random", "resolution"))
        text = f"{name} {entry['keep']}: k-NN {ours['knn_top1']:.1f} %, random "
        text += f"{lots['knn_top1']:.1f} ± {lots['knn_top1_spread']:.1f}"
        if small:
            text += f", {small['n_tokens']} of a smaller image {small['knn_top1']:.1f}"
        parts.append(text)
    return parts


def _exported(row: Mapping[str, Any]) -> list[str]:
    """Where an exported model lies, and how it answered."""
    found = row.get("export")
    if not isinstance(found, Mapping):
        return []
    parts = [f"{found.get('format')} in {found.get('folder')}"]
    n = sum(int(number(found.get(key)) or 0) for key in ("n_random", "n_real"))
    if n and (same := number(found.get("agreement"))) is not None:
        torn = int(number(found.get("n_undecided")) or 0)
        rounded = f", {torn} decided by rounding" if torn else ""
        parts.append(f"{same:.1f} % of {n} images as in torch{rounded}")
    return parts


def summary_line(row: Mapping[str, Any]) -> str:
    """One line that says what a run found, or why it failed.

    >>> summary_line({"backbone": "deit_small", "method": "tome", "top1": 79.5,
    ...               "schedule": {"name": "constant_r", "r": 13}, "gmacs": {"total": 2.706},
    ...               "gmacs_dense": 4.599, "tokens": [[197, 184], [184, 41]]})
    'deit_small + tome r=13 | 2.706 GMACs (-41.2 %) | tokens 197->41 | top-1 79.50 %'
    """
    row = printable(row)
    head = str(row.get("backbone") or "?")
    if not is_dense(row):
        # An architecture that reduces tokens by itself says so in its name.
        own = head.startswith(str(row.get("method")))
        head += "" if own or row.get("method") in (None, DENSE) else f" + {row['method']}"
        head += "".join(f" + {name}" for name in plugins(row))
        head += f" {describe_budget(row.get('schedule'))}".rstrip()
    if is_without_result(row):
        return f"{head} | {why_without_result(row)}"
    parts = [head]
    gmacs, dense = total_gmacs(row), number(row.get("gmacs_dense"))
    if gmacs is not None:
        saved = f" ({100 * (gmacs / dense - 1):+.1f} %)" if dense and not is_dense(row) else ""
        mean = f"{format_gmacs(gmacs)}{format_range(row)} GMACs"
        parts.append(f"{mean}{saved}{_as_published(row)}")
    if tokens := describe_tokens(row.get("tokens")):
        parts.append(f"tokens {tokens}")
    if (top1 := number(row.get("top1"))) is not None:
        ends = interval(row)
        text = f" {bracketed(ends)}" if ends else ""
        parts.append(f"top-1 {top1:.2f} %{text}")
    parts += _like_dense(row)
    parts += _on_features(row)
    parts += _selected(row)
    if (rate := number(row.get("imgs_per_s"))) is not None:
        engine, dense = row.get("engine"), number(row.get("imgs_per_s_dense"))
        where = f" in {engine}" if engine not in (None, "torch") and not row.get("compile") else ""
        where += f" ({rate / dense:.2f}x)" if where and dense and not is_dense(row) else ""
        parts.append(f"{format_rate(rate)} img/s{where}")
    parts += _exported(row)
    if isinstance(visual := row.get("visual"), Mapping):
        parts.append(f"pictures: {visual.get('page')}")
    return " | ".join(parts)

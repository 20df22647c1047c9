"""Numbers that others published, from `results/published.yaml`: for a page and for a report.

They are drawn hollow and called what they are: nobody ran them here. Our own GMACs of the same
settings are in `published_gmacs.json` beside it, which `zoo.cli.published` computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import ZooError

FILE, COSTS = "published.yaml", "published_gmacs.json"
TRAININGS = {
    "none": "off the shelf",
    "light": "rates or light parts learned",
    "tuned": "fine-tuned or trained with the method",
    "dense": "nothing reduced",
    "other": "small fast models",
}
TAGS = {
    "D": "Table 1 of the DiffRate paper, also for the methods that it compares with",
    "T": "the method's own table or README",
    "C": "the official README",
    "G": "read off a graph, ±0.1",
    "F": "read off screenshots of the paper's figures, ±0.1 to 0.2 points",
    "V": "the published CSV or README itself",
    "2": "second-hand: somebody else's summary, and no number of the paper",
    "-": "a survey that does not say how it was read; not to be quoted as the paper's",
}
#: What a published number may say, and what it has to.
_KEYS = frozenset(
    "method training backbone timm img_size gmacs top1 tag source reducer schedule published own "
    "ours exact command".split()
)
_NEEDED = ("method", "training", "top1", "tag", "source")


class Published(NamedTuple):
    """One published number.

    Attributes:
        method: As its authors call it.
        training: One of `TRAININGS`.
        backbone: Option of `backbone=`, or timm's name.
        gmacs: As published; None where nothing was.
        top1: Percent; a pair where two sets of weights were published.
        tag: One of `TAGS`.
        source: Where it was read.
        ours: Our exact GMACs; None where the method, or its setting, is not here.
        exact: Whether that is the published setting; otherwise it was solved for the GMACs.
        command: What reproduces it where ImageNet is at hand; empty if nothing here does.
    """

    method: str
    training: str
    backbone: str
    gmacs: float | None
    top1: tuple[float, ...]
    tag: str
    source: str
    ours: float | None
    exact: bool
    command: str

    @property
    def cost(self) -> float | None:
        """Where it stands in a plot: our GMACs, and the published ones where there are none."""
        return self.gmacs if self.ours is None else self.ours

    @property
    def score(self) -> float:
        """Its top-1; the middle of two."""
        return sum(self.top1) / len(self.top1)


def entries(folder: Path) -> list[dict[str, Any]]:
    """What the file says, checked.

    Args:
        folder: With `published.yaml`.

    Raises:
        ZooError: If it is damaged, naming the entry.
    """
    import yaml

    path = folder / FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ZooError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, list):
        raise ZooError(f"{path}: expected a list of published numbers")
    for place, entry in enumerate(found):
        problem = _problem(entry)
        if problem:
            raise ZooError(f"{path}: entry {place} ({entry!r:.60}): {problem}")
    return found


def _problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "expected a mapping"
    if missing := [key for key in _NEEDED if key not in entry]:
        return f"{missing[0]} is missing"
    if unknown := sorted(set(entry) - _KEYS):
        return f"unknown key {unknown[0]}"
    if entry["training"] not in TRAININGS:
        return f"training must be one of {', '.join(TRAININGS)}"
    if entry["tag"] not in TAGS:
        return f"tag must be one of {', '.join(TAGS)}"
    top1 = entry["top1"] if isinstance(entry["top1"], list) else [entry["top1"]]
    if not top1 or not all(isinstance(v, int | float) and 0 < v < 100 for v in top1):
        return "top1 must be a percentage, or two"
    if not ("backbone" in entry or "timm" in entry):
        return "backbone or timm is missing"
    return ""


def runs_here(entry: Mapping[str, Any]) -> bool:
    """Whether this package has the method and the model."""
    other = entry["training"] == "other"
    return "reducer" in entry or entry["training"] == "dense" or bool(entry.get("own")) or other


def key_of(entry: Mapping[str, Any]) -> str:
    """What an entry's costs are stored under: everything that decides them."""
    names = ("backbone", "timm", "img_size", "reducer", "schedule", "published")
    facts = {name: entry[name] for name in names if name in entry}
    if "reducer" in entry and not {"schedule", "published"} & set(entry):
        facts["gmacs"] = entry.get("gmacs")
    return json.dumps(facts, sort_keys=True)


def read(folder: Path) -> list[Published]:
    """All published numbers with our GMACs beside them.

    Args:
        folder: With `published.yaml` and, once it was computed, `published_gmacs.json`.

    Raises:
        ZooError: If one of them is damaged.
    """
    path = folder / COSTS
    try:
        costs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stored = {key: None if value is None else float(value) for key, value in costs.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ZooError(
            f"{path} is damaged; write it with `python -m zoo.cli.docs --published`"
        ) from error
    return [
        _published(entry, stored.get(key_of(entry)) if runs_here(entry) else None)
        for entry in entries(folder)
    ]


def _published(entry: Mapping[str, Any], ours: float | None) -> Published:
    top1 = entry["top1"] if isinstance(entry["top1"], list) else [entry["top1"]]
    solved = "reducer" in entry and not {"schedule", "published"} & set(entry)
    return Published(
        entry["method"],
        entry["training"],
        str(entry.get("backbone") or entry.get("timm")),
        None if entry.get("gmacs") is None else float(entry["gmacs"]),
        tuple(map(float, top1)),
        entry["tag"],
        entry["source"],
        ours,
        not solved,
        command(entry) if ours is not None else "",
    )


def command(entry: Mapping[str, Any]) -> str:
    """What is typed for an entry where ImageNet is at hand; empty if nothing here does it."""
    training, reducer = entry["training"], entry.get("reducer")
    if not runs_here(entry):
        return ""
    if training == "other" and not entry.get("own"):  # of timm's repository
        size = f" --img-size {entry['img_size']}" if "img_size" in entry else ""
        return f"python validate.py --model {entry['timm']} --pretrained{size} --data-dir PATH"
    program = "train.py" if training == "tuned" and reducer else "eval.py"
    words = ["python", program, *_backbone(entry)]
    if reducer:
        words += [f"reducer={reducer}", *_schedule(entry)]
    if training == "light" and "published" not in entry:
        words[1] = "train.py"
        words.append("module=reducer_only")
    words += ["data=imagenet", "data.root=PATH"]
    if words[1] == "eval.py":
        words.append("task=[accuracy,flops]")
    return " ".join(words)


def _backbone(entry: Mapping[str, Any]) -> list[str]:
    if "timm" in entry:
        words = ["backbone=timm", f"backbone.name={entry['timm']}", "backbone.pretrained=true"]
        size = entry.get("img_size")
        return words if size is None else [*words, f"data.img_size={size}"]
    name = entry["backbone"]
    if name.startswith("mae_"):  # timm's weights of these have no classifier
        args = ["+backbone.args.num_classes=1000", "+backbone.args.global_pool=avg"]
        return [f"backbone={name}", *args, "weights=FILE"]
    return [f"backbone={name}", "backbone.pretrained=true"]


def _schedule(entry: Mapping[str, Any]) -> list[str]:
    if "published" in entry:
        return [f"schedule={entry['published']}"]
    schedule = entry.get("schedule") or {}
    if "r" in schedule:
        r = schedule["r"]
        value = f"'schedule.r={json.dumps(r, separators=(',', ':'))}'"
        return ["schedule=constant_r", value] if isinstance(r, list) else [f"schedule.r={r}"]
    if "rate" in schedule:
        return ["schedule=keep_rate", f"schedule.rate={schedule['rate']}"]
    return ["schedule=target_gmacs", f"schedule.gmacs={entry['gmacs']}", "schedule.nearest=true"]


# ----------------------------------------------------------------------------------- page


def page(found: Sequence[Published]) -> str:
    """The text of docs/published.md.

    Args:
        found: All numbers.
    """
    lines = [
        "# Published numbers",
        "",
        "Written by `python -m zoo.cli.docs --published` from `results/published.yaml`: top-1 on",
        "ImageNet-1k at 224 pixels as others published it. **None of them was run here.** They",
        "stand in the report as hollow markers (`zoo report results`), so that what is measured",
        "here can be put beside them once ImageNet is at hand; the command in each row does that.",
        "",
        "Theirs: GMACs as published, which papers count differently. Ours: exact GMACs of the same",
        "setting by `zoo.profile` (see [conventions](conventions.md)), the reducer's own products",
        "included; `≈` where the setting is not known and the schedule was solved for their GMACs.",
        "Of adaptive methods ours is the upper limit. Tag: how the number was read.",
        "",
        "| tag | read where |",
        "|---|---|",
        *(f"| {tag} | {text} |" for tag, text in TAGS.items()),
        "",
        "Small fast models that this package does not run are evaluated by `validate.py` in timm's",
        "repository; of them ours is torch's own counter on timm's model, with branches joined",
        "where timm can. MAE's fine-tuned weights are those of its authors (`weights=FILE`):",
        "timm's have no classifier. A fine-tuned number needs the authors' recipe as well; the",
        "command starts this package's own. Where there is no command, this package does not have",
        "the method. What longer training alone brings is in some of these numbers: the page of a",
        "method says how long its authors trained.",
    ]
    for training, title in TRAININGS.items():
        chosen = [one for one in found if one.training == training]
        if not chosen:
            continue
        lines += [
            "",
            f"## {title[:1].upper()}{title[1:]}",
            "",
            "| method | backbone | theirs | ours | top-1 | tag | source | command |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(one) for one in sorted(chosen, key=_order)]
    return "\n".join([*lines, ""])


def _order(one: Published) -> tuple[str, float, str]:
    return one.backbone if one.training != "other" else "", one.cost or 0.0, one.method


def _line(one: Published) -> str:
    ours = "" if one.ours is None else f"{'' if one.exact else '≈ '}{one.ours:.3f}"
    theirs = "" if one.gmacs is None else f"{one.gmacs:g}"
    top1 = " to ".join(f"{value:g}" for value in one.top1)
    command = f"`{one.command}`" if one.command else "none"
    cells = [one.method, one.backbone, theirs, ours, top1, one.tag, one.source, command]
    return f"| {' | '.join(cells)} |"


# --------------------------------------------------------------------------------- report


def points(found: Sequence[Published]) -> list[dict[str, Any]]:
    """What the script of a report draws: those that have a cost, as plain data."""
    known = [one for one in found if one.cost is not None]
    return [
        {
            "method": one.method,
            "training": one.training,
            "backbone": one.backbone,
            "gmacs": one.cost,
            "theirs": one.gmacs,
            "ours": one.ours,
            "top1": one.score,
            "ends": list(one.top1),
            "hover": _hover(one),
        }
        for one in known
    ]


def _hover(one: Published) -> list[str]:
    top1 = " to ".join(f"{value:g}" for value in one.top1)
    lines = [f"{one.method} on {one.backbone}", f"top-1 {top1} %, {TRAININGS[one.training]}"]
    if one.gmacs is not None:
        lines.append(f"{one.gmacs:g} GMACs as published")
    if one.ours is not None:
        same = "the same setting" if one.exact else "solved for theirs"
        lines.append(f"{one.ours:.3f} GMACs by zoo, {same}")
    lines.append(f"{one.source} [{one.tag}]")
    lines.append("not run here")
    return lines

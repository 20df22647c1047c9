"""`--help` of train and eval: the groups of the command, and every option with its comment.

The comments are those of the YAML files, so that they are written once.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from zoo.published import config_folder

WIDTH, _COLUMN = 80, 34

_HEADS = {
    "train": "Trains or fine-tunes a model, tests it, saves it as a model folder.",
    "eval": "Measures a model: accuracy, FLOPs, throughput, fidelity to the dense model; features "
    "by neighbours, linear probe, retrieval, text; selectors behind a tower.",
}
_FOOT = """\
--cfg job shows the configuration of a command without running it; -m runs
every combination of comma-separated values, e.g. -m reducer=tome,evit
seed=0,1; --hydra-help explains the other flags.
Tab completion for bash: eval "$(python eval.py -sc install=bash)"
"""


def asked(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(a == "-h" or (a[:4] == "--he" and "--help".startswith(a)) for a in arguments)


def page(kind: str, arguments: Sequence[str]) -> str:
    """The help of a command, with the options of what was chosen on the command line.

    Args:
        kind: "train" or "eval".
        arguments: Of the command line; flags are left out.

    Raises:
        HydraException: An override does not fit.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from zoo.version import hydra_base

    typed = [text for text in arguments if not text.startswith("-")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), **hydra_base()):
        cfg = compose(kind, typed, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        values: Any = OmegaConf.to_container(cfg, resolve=False)
    del values["hydra"]
    lines = [
        _wrapped(f"zoo {kind}: {_HEADS[kind]}", "  "),
        "",
        "Choose an option of a group with GROUP=OPTION:",
        "",
    ]
    for group in command_groups(kind):
        names = ", ".join(sorted(p.stem for p in (config_folder() / group).glob("*.yaml")))
        if group == "backbone":
            names += ", or the name of any ViT of timm (zoo list --models)"
        lines.append(_wrapped(f"{group}: {names}", "    "))
    lines += [
        "",
        "Set a value with NAME=VALUE; quote values that hold = , or spaces:",
        "",
    ]
    notes = _notes(kind, choices)
    for name, value in _options(values, choices):
        # What stands inside one line, {a: 1, b: 2}, shares the comment of that line.
        above = name.rpartition(".")[0]
        note = notes.get(name) or ("" if above in choices else notes.get(above, ""))
        lines.append(_line(name, value, note))
    return "\n".join([*lines, "", _FOOT])


def command_groups(kind: str) -> list[str]:
    """The groups that a command has, those inside groups included."""
    root = yaml.safe_load((config_folder() / f"{kind}.yaml").read_text(encoding="utf-8"))
    names = [key for entry in root["defaults"] if isinstance(entry, dict) for key in entry]
    found = []
    for name in names:
        if name != "hydra":
            folder = config_folder() / name
            inside = [path for path in sorted(folder.iterdir()) if any(path.glob("*.yaml"))]
            found += [name, *(f"{name}/{path.name}" for path in inside if path.is_dir())]
    return found


def comments(path: Path) -> dict[str, str]:
    """The comment behind each key of a YAML file, by dotted name; "" is the comment at its head."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found: dict[str, str] = {}
    head = re.match(r"(?:#[^\n]*\n)+", text)
    if head is not None:
        words = (line.lstrip("# ") for line in head.group().splitlines())
        found[""] = " ".join(line for line in words if not line.startswith("@package"))

    def walk(node: Any, above: str) -> None:
        if isinstance(node, yaml.SequenceNode) and above == "defaults.":
            for entry in node.value:
                if isinstance(entry, yaml.MappingNode):
                    walk(entry, above)
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            block = isinstance(value, yaml.CollectionNode) and not value.flow_style
            mark = key.end_mark if block else value.end_mark
            note = re.match(r"[\s:]*#\s*(.*)", lines[mark.line][mark.column :])
            if note:
                found[f"{above}{key.value}"] = note.group(1).strip()
            walk(value, f"{above}{key.value}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def _notes(kind: str, choices: Mapping[str, Any]) -> dict[str, str]:
    """Comments by the name under which an option is typed."""
    root = comments(config_folder() / f"{kind}.yaml")
    found = {name.removeprefix("defaults."): text for name, text in root.items()}
    for group, option in choices.items():
        folder = config_folder() / group
        if option is None or not folder.is_dir():
            continue
        file = folder / f"{option}.yaml"
        if not file.is_file():  # a model of timm by its own name
            file = folder / f"{group}.yaml" if group != "backbone" else folder / "timm.yaml"
        inside = _inherited(file)
        found.update({f"{group}.{name}": text for name, text in inside.items() if name})
        if inside.get(""):
            found[group] = inside[""]
    return found


def _inherited(file: Path) -> dict[str, str]:
    """Comments of an option's file over those of the files that it builds on."""
    if not file.is_file():
        return {}
    loaded = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    found: dict[str, str] = {}
    for name in loaded.get("defaults", ()):
        if isinstance(name, str) and name != "_self_":
            found.update(_inherited(file.with_name(f"{name}.yaml")))
    own = comments(file)
    return {**found, "": own.get("", found.get("", "")), **own}


def _options(values: Mapping[str, Any], choices: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every option that can be typed, and its value: the plain ones, then group by group."""
    plain = {name: value for name, value in values.items() if name not in choices}
    for name in plain:
        yield from _inside(name, plain[name])
    for name in values:
        if name in choices:
            yield name, choices[name]
            yield from _inside(name, values[name], itself=False)


def _inside(name: str, value: Any, itself: bool = True) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, one in value.items():
            if not str(key).startswith("_"):
                yield from _inside(f"{name}.{key}", one)
    elif itself:
        yield name, value


def _line(name: str, value: Any, note: str) -> str:
    typed = f"  {name}={_typed(value)}"
    if not note:
        return typed if len(typed) <= WIDTH else _wrapped(typed, "      ")
    pad = " " * _COLUMN
    if len(typed) > _COLUMN - 2:
        return f"{_wrapped(typed, '      ')}\n{_wrapped(note, pad, pad)}"
    return _wrapped(note, pad, typed.ljust(_COLUMN))


def _typed(value: Any) -> str:
    from zoo.run.schema.check import shown

    return "" if value == "???" else shown(value)


def _wrapped(text: str, indent: str, first: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )

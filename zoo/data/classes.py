"""Classes go by their names: which number a folder gets, and which the weights know it by."""

from __future__ import annotations

import os
import pickle
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zoo.errors import ZooError

#: How class folders are numbered: timm's rule (2 before 10, small and capital letters alike) and
#: torchvision's (by code point: 10 before 2, capitals first).
ORDERS = ("natural", "plain")


def class_name(folder: str) -> str:
    """Return a folder's name as it is compared and saved.

    File systems spell accents in one character or in two; both are the same name here. Bytes that
    are no text are written out.
    """
    text = os.fsencode(folder).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def in_order(names: Iterable[str], rule: str) -> list[str]:
    """Return class names in the order of their numbers.

    >>> in_order(["b10", "b2", "C"], "natural"), in_order(["b10", "b2", "C"], "plain")
    (['b2', 'b10', 'C'], ['C', 'b10', 'b2'])
    """
    if rule == "plain":
        return sorted(set(names))
    from timm.utils.misc import natural_key

    # Names that differ in their capitals alone have equal keys: without the second they would come
    # in another order every time.
    return sorted(set(names), key=lambda name: (natural_key(name), name))


def read_class_map(source: str | Mapping[str, Any], *roots: str | Path) -> dict[str, int]:
    """Read a table from folder names to class numbers.

    Args:
        source: A mapping, a .txt file with one name a line in the order of the numbers, or a .pkl
            file that holds a mapping.
        *roots: Folders that a relative path may start from, after the current one.

    Raises:
        ZooError: There is no such file, or it is not such a table.
    """
    table: Mapping[Any, Any]
    if isinstance(source, Mapping):
        table = source
    else:
        path = Path(source).expanduser()
        found = [p for p in (path, *(Path(root) / path for root in roots)) if p.is_file()]
        if not found:
            raise ZooError(
                f"data.class_map={source}: no such file; expected a .txt with one folder name a "
                "line, in the order of the class numbers"
            )
        table = _read_table(found[0])
    clean = {class_name(str(name)): number for name, number in table.items()}
    wrong = [n for n in clean.values() if isinstance(n, bool) or not isinstance(n, int) or n < 0]
    if wrong or not clean:
        raise ZooError(
            f"data.class_map={source} must give every folder a whole number from 0, "
            f"got {wrong[0] if wrong else 'nothing'!r}"
        )
    return clean


def _read_table(path: Path) -> Mapping[Any, Any]:
    from timm.data.readers.class_map import load_class_map

    try:
        if path.suffix.lower() != ".txt":
            return load_class_map(str(path))
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (AssertionError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise ZooError(
            f"data.class_map={path} cannot be read: {reason}; expected a .txt with one folder name "
            "a line"
        ) from error
    names = [line.strip() for line in lines]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ZooError(f"data.class_map={path} names {twice[0]!r} twice; a class has one number")
    return {name: number for number, name in enumerate(names) if name}


def names_of_table(table: Mapping[str, int]) -> list[str] | None:
    """Return the names of a class map by number; None where a number has no name or several."""
    by_number = {number: name for name, number in table.items()}
    if len(by_number) < len(table) or set(by_number) != set(range(len(by_number))):
        return None
    return [by_number[i] for i in range(len(by_number))]


def trained_names(model: nn.Module) -> list[str] | None:
    """Return the names that a model's outputs were trained for, or None where nobody saved them.

    Raises:
        ZooError: What was saved is no list of names.
    """
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    saved = known.get("zoo_data") or {}
    # timm's hub models keep them under another name.
    names = saved["class_names"] if "class_names" in saved else known.get("label_names")
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ZooError(
            f"the class names saved with the weights must be a list of text, got {names!r:.60}; "
            "type data.match_names=false to go by the numbers"
        )
    # A new classifier has other outputs than the names were saved for.
    return [class_name(n) for n in names] if len(names) == _outputs(model) else None


def imagenet_names(model: nn.Module, folders: Iterable[str]) -> list[str] | None:
    """Return WordNet's names for the outputs of an ImageNet model, where the folders go by them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    folders = list(folders)
    subset = infer_imagenet_subset({"num_classes": _outputs(model)})
    if subset is None or not folders or not all(re.fullmatch(r"n\d{8}", f) for f in folders):
        return None
    names = ImageNetInfo(subset).label_names()
    return names if set(folders) <= set(names) else None


def check_table(table: Mapping[str, int], trained: Sequence[str], label: str) -> None:
    """Refuse a class map that gives a class another number than the weights do.

    Raises:
        ZooError: With the first such class.
    """
    for name, number in table.items():
        if name in trained and trained.index(name) != number:
            raise ZooError(
                f"{label}: data.class_map gives {name!r} the number {number}, the weights know it "
                f"as {trained.index(name)}; leave data.class_map out to go by the names"
            )


def differing(ours: Iterable[str], theirs: Iterable[str]) -> str:
    """Name the first few of what only one of two lists holds."""
    return shortened(sorted(set(ours) ^ set(theirs)))


def shortened(names: Sequence[str], most: int = 5) -> str:
    """Join the first few names.

    >>> shortened(["a", "b", "c"], most=2)
    'a, b, …'
    """
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _outputs(model: nn.Module) -> int | None:
    outputs: Any = getattr(model, "num_classes", None)
    return None if outputs is None else int(outputs)

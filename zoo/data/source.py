"""From a name and a root to a data set object, with one clear line when that fails."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from zoo.errors import ZooError

# timm looks for the split under these names (timm.data.dataset_factory).
_SYNONYMS = {
    "train": {"train", "training"},
    "validation": {"val", "valid", "validation", "eval", "evaluation"},
}
_EXTRA = {
    "hfds": "datasets",
    "hfids": "datasets",
    "wds": "webdataset",
    "tfds": "tensorflow_datasets",
}


def create(
    name: str,
    root: str | None,
    split: str,
    *,
    training: bool,
    num_classes: int | None,
    channels: int = 3,
    seed: int = 0,
    **options: Any,
) -> Dataset[Any]:
    """Create the data set of one split.

    Args:
        name: `digits`, `synthetic`, `folder`, or a timm name: `torch/cifar10`, `hfds/org/name`,
            `wds/...`.
        root: Folder of the data.
        split: Its split, in the data set's own words.
        training: Whether it is trained on: shuffles streamed data, and insists on a split folder.
        num_classes: For `synthetic`, how many to draw.
        channels: 1 for grey images.
        seed: For streamed and generated data.
        **options: For timm's create_dataset, or the generated data set.

    Raises:
        ZooError: nothing is found there, or a package is missing.
    """
    mode = "L" if channels == 1 else "RGB"
    if name == "digits":
        from zoo.data.digits import Digits

        return Digits(split, input_img_mode=mode)
    if name == "synthetic":
        from zoo.data.synthetic import Shapes

        lengths = {k: options.pop(k) for k in ("train_length", "eval_length") if k in options}
        length = lengths.get("train_length" if split == "train" else "eval_length", 64)
        known = {k: v for k, v in options.items() if k in {"size"}}
        return Shapes(split, length, num_classes or 4, seed=seed, input_img_mode=mode, **known)

    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if prefix == "" and name not in ("", "folder"):
        raise ZooError(
            f"unknown data name {name!r}; expected digits, synthetic, folder, or a timm name such "
            "as torch/cifar10, hfds/ORG/NAME, wds/NAME"
        )
    if prefix == "":
        _check_folder(root, split, training)
    package = _EXTRA.get(prefix)
    if package is not None and find_spec(package) is None:
        raise ZooError(f"data {name!r} needs a package: pip install {package}")
    from timm.data import create_dataset

    if prefix != "torch":  # torchvision's data sets have a mode of their own
        options["input_img_mode"] = mode
    try:
        return create_dataset(
            "" if name == "folder" else name,
            root=root,
            split=split,
            is_training=training,
            seed=seed,
            **options,
        )
    except (AssertionError, RuntimeError, FileNotFoundError, KeyError) as error:
        hint = "; type data.download=true to fetch it" if prefix == "torch" else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ZooError(
            f"cannot open data {name!r} split {split!r} at {root}: {reason}{hint}"
        ) from error


def _check_folder(root: str | None, split: str, training: bool) -> None:
    """Insist on what timm would silently replace by the root folder itself."""
    if root is None:
        raise ZooError(
            "data=folder needs data.root=PATH, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    path = Path(root).expanduser()
    if not path.exists():
        raise ZooError(f"data.root={root}: no such folder; expected one with train/ and val/ in it")
    if path.is_file():
        return  # a tar file
    wanted = next((s for s in _SYNONYMS.values() if split in s), {split})
    folders = sorted(p.name for p in path.iterdir() if p.is_dir())
    if wanted & set(folders):
        return
    has_splits = {"test", *_SYNONYMS["train"], *_SYNONYMS["validation"]} & set(folders)
    if training or has_splits:
        found = ", ".join(folders[:6]) + (", …" if len(folders) > 6 else "") if folders else "none"
        raise ZooError(
            f"data.root={root} has no folder for the split {split!r}; expected one of "
            f"{sorted(wanted)}, found: {found}"
        )


def count_classes(data: Dataset[Any]) -> int | None:
    """Return how many classes a data set has, or None when it does not say."""
    own = getattr(data, "num_classes", None)
    if isinstance(own, int):
        return own
    names = class_names(data)
    return len(names) if names else None


def class_names(data: Dataset[Any]) -> list[str] | None:
    """Return the class names in the order of their numbers, or None when they are not known."""
    table = getattr(getattr(data, "reader", data), "class_to_idx", None)
    if isinstance(table, dict) and table:
        return [str(k) for k, _ in sorted(table.items(), key=lambda item: item[1])]
    classes = getattr(data, "classes", None)
    return [str(c) for c in classes] if classes else None

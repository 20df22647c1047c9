"""Writing a model folder: all of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.adapters.tower import tower_of
from zoo.build import OFFERED
from zoo.checkpoint import config as cfg
from zoo.checkpoint.card import MARKER, model_card
from zoo.checkpoint.files import file_sha256, write_tensors
from zoo.checkpoint.rebuild import cannot_rebuild
from zoo.errors import ZooError
from zoo.libraries.build import description

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


def save_pretrained(
    model: ReducedViT,
    folder: str | Path,
    metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    data: Mapping[str, Any] | None = None,
    *,
    weights: bool = True,
) -> Path:
    """Write a model as a folder that :func:`zoo.load` reads back.

    The folder holds ``config.json`` (the recipe), ``model.safetensors`` (the backbone under timm's
    own key names), ``reducer.safetensors`` where the reducer or plugins have parameters,
    ``schedule.json`` where the schedule lists counts per block, ``metrics.json`` and a model card.
    It is written beside its place and moved there when complete: an interrupted save leaves an
    older model in the folder as it was. Files in the folder that are not part of a model stay.

    Args:
        model: the model to write.
        folder: where to; created with its parents.
        metrics: result rows to store and to show in the card.
        data: preprocessing and data set of the weights; what is not given is taken from the
            backbone's ``pretrained_cfg``, or from what its library says of it.
        weights: False writes the recipe alone, for weights that timm can fetch by name and tag.

    Returns:
        The folder.

    Raises:
        ZooError: something in the recipe has no registry name or no JSON form, or the folder
            holds a ``config.json`` that this library did not write.
    """
    folder = Path(folder)
    config, schedule = _recipe(model, data)
    if not weights and not config["backbone"]["tag"]:
        config["backbone"]["tag"] = _offered_tag(model.unwrap())
    if not weights and not config["backbone"]["tag"]:
        raise ZooError(
            "weights=False needs a backbone with a pretrained tag, e.g. "
            f"'deit_small_patch16_224.fb_in1k'; {config['backbone']['name']!r} has none"
        )
    _check_target(folder)
    doubt = cannot_rebuild(model.unwrap(), config["backbone"])
    if doubt:
        # No error: at the end of a long training the weights must reach the disk all the same.
        warnings.warn(
            f"{folder} will not load as it is: {doubt}; build the model with zoo.create_model, set "
            "model.backbone_args, or correct backbone.args in config.json by hand",
            UserWarning,
            stacklevel=2,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        _write(model, stage, config, schedule, metrics, weights)
        _make_readable(stage)
        _keep_edited_card(stage, folder)
        _move_into_place(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def _recipe(
    model: ReducedViT, data: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return ``config.json`` without the weights' entry, and ``schedule.json`` if there is one."""
    import reduction

    recipe = cfg.plain(model.recipe, "recipe")
    if recipe["reducer"] and recipe["reducer"]["name"] not in reduction.list_methods():
        raise ZooError(
            f"cannot save the reducer {recipe['reducer']['name']}: it has no registry name; put "
            "@reduction.register('my_method') above its class"
        )
    schedule = recipe["schedule"]
    searched = schedule is not None and isinstance(schedule.get("keep"), list)
    config = {
        "format": cfg.FORMAT,
        "zoo": cfg.zoo_version(),
        "backbone": recipe["backbone"],
        "reducer": recipe["reducer"],
        "schedule": {"name": schedule["name"], "file": cfg.SCHEDULE} if searched else schedule,
        "plugins": recipe["plugins"],
        "data": cfg.plain({**describe_data(model.unwrap()), **(data or {})}, "data"),
        "weights": {"model": None, "sha256": None, "reducer": None, "reducer_sha256": None},
        "written_by": cfg.versions(),
    }
    return config, schedule if searched else None


def _offered_tag(backbone: Any) -> str | None:
    """Tag of timm's weights for a model that was built without them."""
    tag = (getattr(backbone, "pretrained_cfg", None) or {}).get(OFFERED)
    return str(tag) if tag else None


def describe_data(backbone: Any) -> dict[str, Any]:
    """Preprocessing of a model as ``config.json`` stores it, plus what a loaded one said."""
    known = description(backbone)
    data = {k: known[k] for k in cfg.DATA_KEYS if known.get(k) is not None}
    data["input_size"] = list(tower_of(backbone).input_size(backbone))
    return {**data, **(known.get("zoo_data") or {})}


def _write(
    model: ReducedViT,
    stage: Path,
    config: dict[str, Any],
    schedule: dict[str, Any] | None,
    metrics: Any,
    weights: bool,
) -> None:
    entry = config["weights"]
    if weights:
        write_tensors(model.unwrap().state_dict(), stage / cfg.MODEL)
        entry.update(model=cfg.MODEL, sha256=file_sha256(stage / cfg.MODEL))
    extras = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    if extras:
        write_tensors(extras, stage / cfg.REDUCER)
        entry.update(reducer=cfg.REDUCER, reducer_sha256=file_sha256(stage / cfg.REDUCER))
    if schedule is not None:
        cfg.dump(schedule, stage / cfg.SCHEDULE)
    rows = [metrics] if isinstance(metrics, Mapping) else list(metrics or ())
    if rows:
        cfg.dump(cfg.plain(rows, "metrics", rows=True), stage / cfg.METRICS)
    (stage / cfg.CARD).write_text(model_card(config, rows, schedule), encoding="utf-8")
    cfg.dump(config, stage / cfg.CONFIG)


def _make_readable(stage: Path) -> None:
    """mkdtemp and safetensors make private files; a model is as readable as any other file."""
    umask = os.umask(0)
    os.umask(umask)
    stage.chmod(0o777 & ~umask)
    for path in stage.iterdir():
        path.chmod(0o666 & ~umask)


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ZooError(f"{folder} is a file; expected a folder to save the model in")
    if (folder / cfg.CONFIG).is_file() and not _is_ours(folder):
        raise ZooError(
            f"{folder} holds a {cfg.CONFIG} that tokenzoo did not write; choose another folder"
        )


def _is_ours(folder: Path) -> bool:
    try:
        config = cfg.read_json(folder / cfg.CONFIG)
    except ZooError:
        return False
    return isinstance(config, Mapping) and {"format", "backbone"} <= set(config)


def _keep_edited_card(stage: Path, folder: Path) -> None:
    """A README that somebody wrote, or took the marker out of, is not replaced."""
    old = folder / cfg.CARD
    if old.is_file() and MARKER not in old.read_text(encoding="utf-8", errors="replace"):
        shutil.copy2(old, stage / cfg.CARD)


def _move_into_place(stage: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(stage, folder)
        return
    if not (folder / cfg.CONFIG).exists():
        # No model here yet, so nothing to lose: config.json goes last and makes it one.
        for name in sorted(os.listdir(stage), key=lambda n: n == cfg.CONFIG):
            os.replace(stage / name, folder / name)
        return
    # Two renames swap the folders; whatever happens, one complete model remains on the disk.
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent)) / folder.name
    try:
        os.replace(folder, old)
        os.replace(stage, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        old.parent.rmdir()
        raise
    for name in os.listdir(old):
        if name in cfg.OWN_FILES:
            (old / name).unlink()
        else:
            os.replace(old / name, folder / name)
    old.rmdir()
    old.parent.rmdir()

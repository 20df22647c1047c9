"""Reading models back: from a folder, our own assets, the hub, or a Lightning checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reduction.base import Reducer
from reduction.registry import create_reducer, create_schedule
from zoo.build import CONSUMED_ARGS, set_tag, wrap
from zoo.checkpoint import config as cfg
from zoo.checkpoint.files import file_sha256, first_line
from zoo.checkpoint.hub import HUB, download
from zoo.checkpoint.positions import own_grid
from zoo.checkpoint.rebuild import tuples, twin
from zoo.checkpoint.stored import Stored, check_size, in_folder, of_run, of_the_file, writer
from zoo.checkpoint.untrusted import cut, short
from zoo.checkpoint.weights import (
    fit,
)
from zoo.errors import BadCheckpoint, UnknownName, ZooError
from zoo.libraries.build import of_recipe

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


_log = logging.getLogger(__name__)


class _Keep:
    def __repr__(self) -> str:
        return "<as saved>"


KEEP: Any = _Keep()
"""Default of :func:`load`'s arguments: take what the model was saved with."""
_ASSETS = Path(__file__).parents[1] / "assets"


def load(
    path_or_hub_name: str | Path,
    reducer: Any = KEEP,
    schedule: Any = KEEP,
    plugins: Any = KEEP,
    **backbone_overrides: Any,
) -> ReducedViT:
    """Load a saved model, in evaluation mode and float32, on the CPU.

    Args:
        path_or_hub_name: a folder of :func:`save_pretrained`; the name of a model shipped with the
            package, such as ``"vit_digits"`` (write ``./vit_digits`` for a folder of that name);
            ``"hf-hub:org/name"``, optionally with ``@revision``; or a Lightning ``.ckpt`` whose
            hyper-parameters hold the recipe.
        reducer: another reducer than the saved one; None for the dense model. Without a
            `schedule` a new reducer gets the saved one, or its default where none was saved.
        schedule: another schedule than the saved one.
        plugins: other plugins than the saved ones.
        **backbone_overrides: arguments of ``timm.create_model`` that differ from the saved ones.
            ``img_size`` and ``patch_size`` resample embeddings; ``num_classes``: a new classifier.

    Returns:
        The model.

    Raises:
        BadCheckpoint: nothing there, not safe to read, damaged, or not fitting.
        UnknownName: no file, folder or shipped model of that name.
    """
    source = find(path_or_hub_name)
    stored = in_folder(source) if source.is_dir() else of_run(source)
    return _build(stored, reducer, schedule, plugins, backbone_overrides)


def list_assets() -> list[str]:
    """Names of the models shipped with the package."""
    return sorted(p.parent.name for p in _ASSETS.glob(f"*/{cfg.CONFIG}"))


def find(name: str | Path) -> Path:
    """Return the local folder or file behind a name that :func:`load` takes.

    Raises:
        BadCheckpoint: the hub cannot be reached, or a path does not exist.
        UnknownName: the name is neither a path nor a shipped model.
    """
    text = str(name)
    if text.startswith(HUB):
        return download(text)
    if text in list_assets():
        return _ASSETS / text
    path = Path(name).expanduser()
    if path.exists():
        return path
    left = sorted(path.parent.glob(f".{path.name}.old-*/{path.name}")) if path.name else []
    if left:
        raise BadCheckpoint(
            f"{path}: no such folder, but an interrupted save left the model in {left[0]}; "
            "move it back"
        )
    if len(path.parts) > 1 or path.suffix:
        raise BadCheckpoint(
            f"{path}: no such file or folder; expected a model folder, a .ckpt file, "
            f"hf-hub:ORG/NAME or one of {list_assets()}"
        )
    raise UnknownName("model (neither a path nor shipped)", text, list_assets())


def weights_sha256(path_or_hub_name: str | Path) -> str | None:
    """SHA-256 of the backbone weights behind a name; None for a recipe without weights."""
    source = find(path_or_hub_name)
    path = source / cfg.MODEL if source.is_dir() else source
    return file_sha256(path) if path.is_file() else None


def _build(
    stored: Stored,
    reducer: Any,
    schedule: Any,
    plugins: Any,
    overrides: Mapping[str, Any],
) -> ReducedViT:
    import timm

    import zoo.models  # noqa: F401  (registers our own architectures with timm)

    config, origin = stored.config, stored.origin
    saved = config["backbone"]
    if not saved.get("library") and not timm.is_model(saved["name"]):
        raise BadCheckpoint(
            f"{origin}: {UnknownName('backbone', saved['name'][:80], timm.list_models())} "
            f"({writer(config)}); a newer timm may have it"
        )
    if stored.shapes is None and not saved["tag"]:
        raise BadCheckpoint(
            f"{origin}: no such file, and the recipe names no pretrained tag of {saved['name']} to "
            "fetch weights by; copy the weights too"
        )
    _refuse_consumed(overrides)
    args = {k: tuples(v) for k, v in saved["args"].items()}
    args.update(overrides)
    classes = args.pop("num_classes", saved["num_classes"])
    if saved["num_classes"] is not None:
        args["num_classes"] = saved["num_classes"]
    kept = plugins is KEEP and _same_method(reducer, config["reducer"])
    who = saved.get("library") or "timm"
    with of_the_file(origin, config, f"{who} cannot build {saved['name']} with {saved['args']}"):
        before = twin(saved)
    # Built here, one by one, so that a message tells the file's mistakes from the caller's.
    own_reducer = reducer is KEEP
    if own_reducer:
        reducer = _saved(create_reducer, config, "reducer", origin)
    saved_schedule = _saved(create_schedule, config, "schedule", origin)
    if reducer is None:
        saved_schedule = None
    own_schedule = schedule is KEEP
    schedule = saved_schedule if own_schedule else schedule
    parts = config["plugins"] if plugins is KEEP else plugins
    own = own_reducer and own_schedule and plugins is KEEP and not overrides
    check_size(stored, before, exact=not overrides, whole=own)
    backbone = _backbone(stored, args, overrides)
    with of_the_file(origin, config, only=own):
        model = wrap(backbone, reducer, schedule, parts, tensors=True)
    if not saved.get("library"):  # the towers of the others read them off the model
        model.backbone_args = {k: v for k, v in args.items() if k != "num_classes"}
    kept = kept and _thresholds(model.reducer) == _thresholds(config["reducer"])
    if stored.shapes is not None:
        fit(
            model,
            stored.read(model.unwrap()),
            origin,
            adapt=bool(overrides),
            ignore_extras=not kept,
            told=own_grid(before),
            other_patch="patch_size" in overrides,
        )
        # The tag of a recipe with weights says where those started from.
        set_tag(model.unwrap(), saved["tag"])
    if classes != saved["num_classes"] and classes is not None:
        model.reset_classifier(classes)
    _set_data(model.unwrap(), config["data"], overrides)
    return model.eval()


def _backbone(stored: Stored, args: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    import timm

    config, origin, pretrained = stored.config, stored.origin, stored.shapes is None
    saved = config["backbone"]
    try:
        if saved.get("library"):
            return of_recipe(saved, args, overrides, fetch=pretrained)
        return timm.create_model(_tagged(saved, origin), pretrained=pretrained, **args)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise _refusal(error, saved, args, origin, config) from error
        raise BadCheckpoint(
            f"{origin.parent}: a recipe without weights, and the pretrained weights of "
            f"{saved['name']}.{saved['tag']} could not be fetched ({first_line(error)})"
        ) from error
    except Exception as error:  # timm's models check little of what they are given
        raise _refusal(error, saved, args, origin, config) from error


def _refusal(
    error: Exception,
    saved: Mapping[str, Any],
    args: Mapping[str, Any],
    origin: Path,
    config: Mapping[str, Any],
) -> BadCheckpoint:
    return BadCheckpoint(
        f"{origin}: {saved.get('library') or 'timm'} cannot build {saved['name']} with "
        f"{short(dict(args), 200)}: "
        f"{cut(first_line(error))} ({writer(config)})"
    )


def _refuse_consumed(overrides: Mapping[str, Any]) -> None:
    wrong = sorted(CONSUMED_ARGS & set(overrides))
    if wrong:
        raise ZooError(
            f"zoo.load takes the saved weights; it has no {wrong[0]}, which belongs to "
            "zoo.create_model"
        )


def _saved(create: Callable[[Any], Any], config: Mapping[str, Any], part: str, origin: Path) -> Any:
    try:
        # Dropping an argument would quietly run another method, so this is no mere warning.
        with of_the_file(origin, config, f"{part} {config[part]}"):
            return create(config[part])
    except BadCheckpoint as error:
        if not isinstance(error.__cause__, UnknownName):
            raise
        raise BadCheckpoint(
            f"{origin}: {cut(error.__cause__)}; import the module that registers it before loading "
            f"({writer(config)})"
        ) from error


def _same_method(spec: Any, saved: Mapping[str, Any] | None) -> bool:
    if spec is KEEP:
        return True
    name = spec.get("name") if isinstance(spec, Mapping) else getattr(spec, "name", spec)
    return saved is not None and name == saved["name"]


def _thresholds(reducer: Reducer | Mapping[str, Any] | None) -> bool:
    """Whether a method merges by thresholds that are saved with it, by its option of that name."""
    given = reducer.config() if isinstance(reducer, Reducer) else reducer or {}
    return bool(given.get("thresholds", False))


def _tagged(saved: Mapping[str, Any], origin: Path) -> str:
    """Backbone name with its pretrained tag, which brings mean, std and classifier names."""
    from timm.models import list_pretrained

    name = str(saved["name"])
    if not saved["tag"]:
        return name
    full = f"{name}.{saved['tag']}"
    if full not in list_pretrained(f"{name}.*"):
        _log.warning("%s: this timm does not know the tag of %s; going on without it", origin, full)
        return name
    return full


def _set_data(backbone: Any, data: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Tell the backbone its preprocessing, where timm's resolve_data_config looks for it."""
    known = {k: tuples(v) for k, v in data.items() if k in cfg.DATA_KEYS}
    if "img_size" in overrides:
        known.pop("input_size", None)
    described = {**(getattr(backbone, "pretrained_cfg", None) or {}), **known}
    others = {k: v for k, v in data.items() if k not in cfg.DATA_KEYS}
    if others:
        described["zoo_data"] = others
    backbone.pretrained_cfg = described
    backbone.default_cfg = described  # timm keeps both names for one dictionary

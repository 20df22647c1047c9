"""Reading models back: from a folder, our own assets, the hub, or a Lightning checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoo.build import wrap
from zoo.checkpoint import config as cfg
from zoo.checkpoint.files import file_sha256, first_line, read_any
from zoo.checkpoint.weights import fit, flat_state, read_folder_state
from zoo.errors import BadCheckpoint, UnknownName, ZooError

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


_log = logging.getLogger(__name__)


class _Keep:
    def __repr__(self) -> str:
        return "<as saved>"


KEEP: Any = _Keep()
"""Default of :func:`load`'s arguments: take what the model was saved with."""

_ASSETS = Path(__file__).parents[1] / "assets"
_HUB = "hf-hub:"


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
            ``img_size`` resamples the position embedding; ``num_classes`` brings a new classifier.

    Returns:
        The model.

    Raises:
        BadCheckpoint: nothing there, not safe to read, damaged, or not fitting.
        UnknownName: no file, folder or shipped model of that name.
    """
    source = find(path_or_hub_name)
    if source.is_dir():
        config = cfg.read_config(source)
        state = _folder_state(source, config)
        origin = source / cfg.MODEL
    else:
        config, state = _read_lightning(source)
        origin = source
    return _build(config, state, origin, reducer, schedule, plugins, backbone_overrides)


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
    if text.startswith(_HUB):
        return _download(text)
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


def _folder_state(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor] | None:
    weights = config["weights"]
    for key, sha, name in (
        ("model", "sha256", cfg.MODEL),
        ("reducer", "reducer_sha256", cfg.REDUCER),
    ):
        path = folder / name
        if weights[key] is None:
            continue
        if not path.is_file():
            raise BadCheckpoint(f"{path}: no such file, but {cfg.CONFIG} names it; copy it too")
        if weights[sha] is not None:
            actual = file_sha256(path)
            if actual != weights[sha]:
                # Reading gives the more telling message where the file is cut short or a pointer.
                read_any(path)
                raise BadCheckpoint(
                    f"{path}: not the file that {cfg.CONFIG} describes (sha256 {actual[:12]}..., "
                    f"expected {str(weights[sha])[:12]}...); copy or download the folder again"
                )
    if weights["model"] is None:
        return None
    return read_folder_state(folder)


def _read_lightning(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    loaded = read_any(path)
    hyper = loaded.get("hyper_parameters") if isinstance(loaded, Mapping) else None
    recipe = hyper.get("recipe") if isinstance(hyper, Mapping) else None
    if not isinstance(recipe, Mapping):
        raise BadCheckpoint(
            f"{path}: weights without a recipe; create the model first and use "
            "zoo.checkpoint.load_weights(model, path)"
        )
    assert isinstance(hyper, Mapping)
    if isinstance(hyper.get("data"), Mapping) and "data" not in recipe:
        recipe = {**recipe, "data": hyper["data"]}
    config = cfg.check_config(recipe, f"{path} (recipe)")
    if (config["schedule"] or {}).get("file"):
        raise BadCheckpoint(f"{path}: the recipe's schedule points at a file; expected its counts")
    return config, flat_state(loaded, path)


def _build(
    config: Mapping[str, Any],
    state: dict[str, Tensor] | None,
    origin: Path,
    reducer: Any,
    schedule: Any,
    plugins: Any,
    overrides: Mapping[str, Any],
) -> ReducedViT:
    import timm

    import reduction
    import zoo.models  # noqa: F401  (registers our own architectures with timm)

    saved = config["backbone"]
    if not timm.is_model(saved["name"]):
        raise BadCheckpoint(
            f"{origin}: {UnknownName('backbone', saved['name'], timm.list_models())} "
            f"({_writer(config)}); a newer timm may have it"
        )
    if state is None and not saved["tag"]:
        raise BadCheckpoint(
            f"{origin}: no such file, and the recipe names no pretrained tag of {saved['name']} to "
            "fetch weights by; copy the weights too"
        )
    args = {k: _tuples(v) for k, v in saved["args"].items()}
    args.update(overrides)
    classes = args.pop("num_classes", saved["num_classes"])
    if saved["num_classes"] is not None:
        args["num_classes"] = saved["num_classes"]
    other_parts = plugins is not KEEP or not _same_method(reducer, config["reducer"])
    # Built here, one by one, so that a message tells the file's mistakes from the caller's.
    reducer = (
        _saved(reduction.create_reducer, config, "reducer", origin) if reducer is KEEP else reducer
    )
    saved_schedule = _saved(reduction.create_schedule, config, "schedule", origin)
    if reducer is None:
        saved_schedule = None
    schedule = saved_schedule if schedule is KEEP else schedule
    backbone = _backbone(saved, args, pretrained=state is None, origin=origin, config=config)
    try:
        model = wrap(backbone, reducer, schedule, config["plugins"] if plugins is KEEP else plugins)
    except ZooError as error:
        if other_parts or schedule is not saved_schedule or overrides:
            raise  # the caller's own words, not the file's
        raise BadCheckpoint(f"{origin}: {error} ({_writer(config)})") from error
    model.backbone_args = {k: v for k, v in args.items() if k != "num_classes"}
    if state is not None:
        fit(model, state, origin, adapt=bool(overrides), ignore_extras=other_parts)
    if classes != saved["num_classes"] and classes is not None:
        model.reset_classifier(classes)
    _set_data(model.unwrap(), config["data"], overrides)
    return model.eval()


def _backbone(
    saved: Mapping[str, Any],
    args: Mapping[str, Any],
    *,
    pretrained: bool,
    origin: Path,
    config: Mapping[str, Any],
) -> Any:
    import timm

    try:
        return timm.create_model(_tagged(saved, origin), pretrained=pretrained, **args)
    except (TypeError, AssertionError, ValueError) as error:
        raise BadCheckpoint(
            f"{origin}: timm cannot build {saved['name']} with {dict(args)}: {first_line(error)} "
            f"({_writer(config)})"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise BadCheckpoint(
            f"{origin.parent}: a recipe without weights, and the pretrained weights of "
            f"{saved['name']}.{saved['tag']} could not be fetched ({first_line(error)})"
        ) from error


def _saved(create: Callable[[Any], Any], config: Mapping[str, Any], part: str, origin: Path) -> Any:
    try:
        return create(config[part])
    except UnknownName as error:
        raise BadCheckpoint(
            f"{origin}: {error}; import the module that registers it before loading "
            f"({_writer(config)})"
        ) from error
    except ZooError as error:
        # Dropping an argument would quietly run another method, so this is no mere warning.
        raise BadCheckpoint(f"{origin}: {error} ({_writer(config)})") from error


def _writer(config: Mapping[str, Any]) -> str:
    return f"written by tokenzoo {config['zoo']}, this is {cfg.zoo_version()}"


def _same_method(spec: Any, saved: Mapping[str, Any] | None) -> bool:
    if spec is KEEP:
        return True
    name = spec.get("name") if isinstance(spec, Mapping) else getattr(spec, "name", spec)
    return saved is not None and name == saved["name"]


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


def _tuples(value: Any) -> Any:
    """JSON has no tuples, and timm tells (384, 384) from [384, 384] in places."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _set_data(backbone: Any, data: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Tell the backbone its preprocessing, where timm's resolve_data_config looks for it."""
    known = {k: _tuples(v) for k, v in data.items() if k in cfg.DATA_KEYS}
    if "img_size" in overrides:
        known.pop("input_size", None)
    described = {**(getattr(backbone, "pretrained_cfg", None) or {}), **known}
    others = {k: v for k, v in data.items() if k not in cfg.DATA_KEYS}
    if others:
        described["zoo_data"] = others
    backbone.pretrained_cfg = described
    backbone.default_cfg = described  # timm keeps both names for one dictionary


def _download(text: str) -> Path:
    """Fetch a model folder from the Hugging Face hub, or find it in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = text[len(_HUB) :].partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(cfg.OWN_FILES))
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise BadCheckpoint(
            f"{text}: no such model on the hub, or it is private ({type(error).__name__}); "
            "log in with `hf auth login` if it is yours"
        ) from error
    except HFValidationError as error:
        raise BadCheckpoint(
            f"{text}: expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"
        ) from error
    except Exception as error:  # requests, httpx, urllib, OSError: by version and kind of failure
        raise BadCheckpoint(
            f"{text}: could not be fetched and is not in the cache ({first_line(error)}); "
            "connect to the network, or copy the model folder here and give its path"
        ) from error

"""Reducing in place: a model stays what it is, and computes with fewer tokens."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from reduction.registry import create_reducer, create_schedule
from zoo.adapters.foreign import why_no_model, why_shell, why_unsupported
from zoo.adapters.tower import check_backbone, tower_of
from zoo.build import ReducerLike, ScheduleLike, assemble
from zoo.errors import UnsupportedModel, ZooError
from zoo.model.attached import attached_in, attachment_of, put, take_away, towers_in
from zoo.model.hf_model import RESTORE, as_called
from zoo.model.reduced import ReducedViT
from zoo.published import published

M = TypeVar("M", bound=nn.Module)

#: Models of Hugging Face around a tower that do not mind how many tokens it hands on: they read
#: pooled features alone, or attend to whatever comes.
_INDIFFERENT = frozenset(
    {
        "CLIPModel",
        "CLIPVisionModelWithProjection",
        "CLIPForImageClassification",
        "SiglipModel",
        "SiglipForImageClassification",
        "VisionTextDualEncoderModel",
        "VisionEncoderDecoderModel",
    }
)


def attach(
    model: M,
    reducer: ReducerLike,
    schedule: ScheduleLike = None,
    *,
    tower: str | None = None,
    restore: str | None = None,
    last_block: str = "full",
    linear: str = "plain",
) -> M:
    """Reduce the tokens of a model in place.

    Class, configuration, weights and their names stay, so whatever works with the model goes on:
    pipelines, a `Trainer`, `save_pretrained`, a vision-language model that owns the tower. What a
    method learns becomes `zoo_reducer` of the tower, and a part of its state dict; a method that
    learns nothing leaves that as it was. `zoo.profile` and `zoo.attention_maps` take the model.

    Args:
        model: A supported model, or one that owns a supported tower.
        reducer: See `zoo.wrap`.
        schedule: See `zoo.wrap`.
        tower: Name of the tower in a model that has several, such as "vision_model".
        restore: How hidden states are handed out by a model of Hugging Face. "none": one row per
            token that is left; "merged": one row per patch, that of the token which stands for it;
            "nearest", "zero", "knn": likewise, see `reduction.functional.restoring`. Whoever counts
            on one feature per patch needs one of these. None is "none", and refuses a
            surrounding model that may count on them.
        last_block: See `zoo.wrap`.
        linear: See `zoo.wrap`.

    Returns:
        The model itself.

    Raises:
        ZooError: As `zoo.wrap` does; if something is attached already, if there is no tower or
            there are several, or if the surrounding model may need all patches.
    """
    if reason := why_no_model(model):
        raise UnsupportedModel(reason)
    if isinstance(model, ReducedViT):
        raise ZooError("the model is wrapped already; pass model.unwrap() to reduce that in place")
    if reason := why_shell(model):
        raise UnsupportedModel(reason.replace("wrap first", "attach first"))
    built = create_reducer(reducer)
    if built is None:
        raise ZooError("attach needs a reducer; zoo.list_methods() names them")
    name, target = _target(model, tower)
    if attached_in(target):
        raise ZooError(f"a reducer is attached already{_where(name)}; type zoo.detach(model) first")
    check_backbone(target)
    if "forward" in vars(target):
        raise UnsupportedModel(
            f"the forward of the tower{_where(name)} has been replaced already, by accelerate or "
            "by hand; attach first, and let others replace it then"
        )
    _check_restore(model, name, target, restore)
    made = assemble(target, built, create_schedule(published(schedule)), (), last_block, linear)
    if not made.tower.tensors:
        as_called(made).restore = restore or "none"
    put(made)
    return model


def detach(model: M) -> M:
    """Undo `attach`: the model computes with all its tokens again.

    Args:
        model: That was given to `attach`, or a part of it.

    Returns:
        The model itself.

    Raises:
        ZooError: If nothing is attached.
    """
    if not isinstance(model, nn.Module):
        raise ZooError(f"expected a model, got {type(model).__name__}")
    there = attached_in(model)
    if not there:
        raise ZooError(
            f"nothing is attached to this {type(model).__name__}; zoo.attach(model, reducer=...) "
            "attaches, and a model that zoo.wrap made gives the original back by model.unwrap()"
        )
    for part in there.values():
        take_away(part)
    return model


def attached(model: nn.Module) -> ReducedViT | None:
    """What `attach` put into a model: its schedule, its reducer, its counts of tokens.

    Args:
        model: Any.

    Returns:
        The reduced model that computes in its place, None where nothing is attached.
    """
    for part in attached_in(model).values():
        made = attachment_of(part)
        return None if made is None else made.model
    return None


def _where(name: str) -> str:
    return f" to {name!r}" if name else ""


def _target(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """The tower, and its name in the model."""
    if name is not None:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            names = ", ".join(towers_in(model)) or "none"
            raise ZooError(f"the model has no part {name!r}; its towers are {names}") from None
        tower_of(found)
        return name, found
    towers = towers_in(model)
    if len(towers) == 1:
        return next(iter(towers.items()))
    if towers:
        raise ZooError(
            f"the model has {len(towers)} towers: {', '.join(map(repr, towers))}; choose one, e.g. "
            f"tower={next(iter(towers))!r}"
        )
    raise UnsupportedModel(why_unsupported(model))


def _check_restore(model: nn.Module, name: str, target: Any, restore: str | None) -> None:
    """Refuse what would be handed on in the wrong number.

    Raises:
        ZooError: If the surrounding model may need all patches, or `restore` means nothing here.
    """
    if restore is not None and restore not in RESTORE:
        raise ZooError(f"restore must be one of {', '.join(RESTORE)}, got {restore!r}")
    if restore is not None and tower_of(target).tensors:
        raise ZooError(
            f"restore is for models of Hugging Face; a {type(target).__name__} gives features on "
            "the full grid by forward_intermediates"
        )
    if restore is not None:
        return
    parts = name.split(".") if name else []
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    for owner in around:
        cls = type(owner)
        theirs = cls.__module__.startswith("transformers.") and hasattr(owner, "config")
        if theirs and cls.__name__ not in _INDIFFERENT:
            raise ZooError(
                f"the tower {name!r} is a part of a {cls.__name__}, which may count on one feature "
                'per patch: restore="merged" gives it that, each patch with the features of the '
                'token that stands for it; restore="none" hands on fewer'
            )

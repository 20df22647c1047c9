"""Models of other libraries, from their names or from a recipe.

Every library has a file with two functions: `create(name, tag, pretrained, args)` for people, and
`rebuild(name, args)` for recipes, which reads no other files and fetches nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from zoo.adapters.tower import tower_of
from zoo.errors import ZooError
from zoo.libraries.names import Library, by_package, need


class Built(NamedTuple):
    """A backbone and what is known of it.

    Attributes:
        model: The backbone.
        name: Its name in the library.
        tag: Of the weights that it holds, None for none.
        data: Preprocessing by timm's names: mean, std, interpolation, crop_pct, crop_mode.
    """

    model: nn.Module
    name: str
    tag: str | None
    data: Mapping[str, Any]


def create(library: Library, name: str, pretrained: bool, args: Mapping[str, Any]) -> nn.Module:
    """Build a backbone by its name.

    Args:
        library: Whose.
        name: In that library, with a tag of weights behind a dot where it has such tags.
        pretrained: Load weights, from the library's cache or from where it publishes them.
        args: `img_size` and `num_classes`, and arguments by the library's own names.

    Raises:
        ZooError: The library is missing, the name unknown, an argument wrong, or the weights out of
            reach.
    """
    need(library)
    built: Built = _module(library).create(name, pretrained, dict(args))
    return _described(built, library, args)


def rebuild(package: str, name: str, classes: int | None, args: Mapping[str, Any]) -> nn.Module:
    """Build the backbone of a recipe, from the recipe alone.

    Args:
        package: `library` of the recipe.
        name: Its name.
        classes: Number of classes, None where the library's default counts.
        args: What the tower's `settings` wrote down, or changes of it.

    Raises:
        ZooError: The library is missing, or an argument wrong.
    """
    library = by_package(package)
    need(library)
    built: Built = _module(library).rebuild(name, dict(args))
    changed = {} if classes is None else {"num_classes": classes}
    return _described(built, library, changed)


def of_recipe(
    recipe: Mapping[str, Any], args: Mapping[str, Any], changes: Mapping[str, Any], fetch: bool
) -> nn.Module:
    """The backbone of a saved recipe.

    Args:
        recipe: `backbone` of it.
        args: Its arguments, with those that a caller changes.
        changes: The latter alone.
        fetch: Get the library's weights by the recipe's tag; else what the recipe says is built.
    """
    library, name = by_package(recipe["library"]), recipe["name"]
    if fetch:
        tagged = name if library.prefix == "hf" else f"{name}.{recipe['tag']}"
        return create(library, tagged, True, changes)
    given = {k: v for k, v in args.items() if k != "num_classes"}
    return rebuild(library.name, name, recipe["num_classes"], given)


def preprocessing(m: nn.Module) -> dict[str, Any]:
    """How images are prepared for a backbone that its own library built, by timm's names.

    Args:
        m: A supported one.

    Returns:
        What the library says of it, or what is usual for its kind; empty where it says nothing.
    """
    package = tower_of(m).library
    ask = None if package == "timm" else getattr(_module(by_package(package)), "usual_data", None)
    return {} if ask is None else {k: v for k, v in ask(m).items() if v is not None}


def description(m: nn.Module) -> dict[str, Any]:
    """What is known of a backbone: what somebody wrote down, else what its library says of images.

    Args:
        m: A supported one.

    Returns:
        Its `pretrained_cfg`, or what stands for one in a model that was built by hand.
    """
    known = getattr(m, "pretrained_cfg", None)
    return preprocessing(m) if known is None else dict(known)


def _module(library: Library) -> Any:
    return importlib.import_module(f"zoo.libraries.{library.name}_models")


def _described(built: Built, library: Library, args: Mapping[str, Any]) -> nn.Module:
    model: Any = built.model
    tower = tower_of(model)
    tower.check(model)
    classes = args.get("num_classes")
    if classes is not None and classes != tower.classes(model):
        if not tower.classes(model) and tower.classifier(model) is None:
            raise ZooError(
                f"{built.name} of {library.title} answers with features and has no classifier, so "
                f"it cannot have num_classes={classes}"
            )
        tower.reset_classifier(model, int(classes))
    head = tower.classifier(model)
    names = [name for name, module in model.named_modules() if module is head]
    model.pretrained_cfg = {
        **{k: v for k, v in built.data.items() if v is not None},
        "architecture": built.name,
        "tag": built.tag,
        "input_size": tower.input_size(model),
        **({"classifier": names[0]} if names else {}),
    }
    model.default_cfg = model.pretrained_cfg
    return built.model


def fetched(what: str, library: Library, error: BaseException) -> ZooError:
    """The one line for something that could not be fetched."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ZooError(f"{library.title} cannot fetch {what}: {reason}")

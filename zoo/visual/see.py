"""`zoo.visualize`: images and models in, a sheet and a page out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import nn

from reduction.selection.registry import SelectorLike, create_selector
from zoo.adapters.foreign import why_no_model
from zoo.errors import UnsupportedModel, ZooError
from zoo.model.attached import as_reduced, attached_in, towers_in
from zoo.model.reduced import ReducedViT
from zoo.model.selecting import SelectingTower
from zoo.visual.drawing import draw
from zoo.visual.page import html_page
from zoo.visual.photographs import Picture, Seen, files_of, look, on_cells
from zoo.visual.sheet import Strip, row, sheet, token_plot
from zoo.visual.trail import Trail, follow

#: What is drawn: one model, several, or several by the names that they get.
Models = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Visual(NamedTuple):
    """What became of the patches of some images in some models.

    Attributes:
        title: Headline of sheets and pages.
        images: Names, and for each model its trail over what it saw.
        attention: Whether attention was noted.
    """

    title: str
    images: list[tuple[str, list[Strip]]]
    attention: bool = False

    def trail(self, image: int = 0, model: int = 0) -> Trail:
        """What happened to one image in one model."""
        return self.images[image][1][model].trail

    def picture(self, image: int = 0, model: int = 0, state: int = -1, cell: int = 16) -> Any:
        """One drawing, a Pillow image.

        Args:
            image: Number of the image.
            model: Number of the model.
            state: 0 is the image as it enters, 1 behind the first block, -1 at the end.
            cell: Side of a patch in pixels.
        """
        trail, picture = self.images[image][1][model]
        return draw(picture, trail.grid, trail.states[state], cell)

    def sheet(self, image: int = 0, **options: Any) -> Image.Image:
        """All models on one image, block by block; see `zoo.visual.sheet.sheet`."""
        name, strips = self.images[image]
        title = self.title if len(self.images) == 1 else f"{self.title}: {Path(name).name}"
        return sheet(strips, title, **{"attention": self.attention, **options})

    def strip(self, image: int = 0, model: int = 0, **options: Any) -> Image.Image:
        """Drawings of one image in one model, in a row; see `zoo.visual.sheet.row`."""
        return row(self.images[image][1][model], **options)

    def tokens(self, image: int = 0, **options: Any) -> Image.Image:
        """Tokens per block of all models, as a plot."""
        return token_plot([strip.trail for strip in self.images[image][1]], **options)

    def html(self) -> str:
        """The page with a slider over the blocks and two models side by side, as a string."""
        return html_page([(Path(name).name, strips) for name, strips in self.images], self.title)

    def save(self, path: str | os.PathLike[str], **options: Any) -> list[Path]:
        """Write the page (`.html`), or a sheet for every image (`.png`, `.jpg`, `.webp`).

        Args:
            path: Where; of several images, sheets get the numbers 0, 1, ... behind the name.
            **options: Of `sheet`.

        Returns:
            The files.

        Raises:
            ZooError: If the name has another ending, or cannot be written.
        """
        path = Path(path)
        end = path.suffix.lower()
        if end not in (".html", ".htm", *_PICTURES):
            raise ZooError(
                f"{path}: expected a name that ends in .html, or in {', '.join(_PICTURES)}"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if end not in _PICTURES:
                path.write_text(self.html(), encoding="utf-8")
                return [path]
            count = len(self.images)
            many = [path.with_stem(f"{path.stem}_{i}") for i in range(count)]
            files = [path] if count == 1 else many
            for i, file in enumerate(files):
                self.sheet(i, **options).save(file, quality=90)  # which PNG does not look at
        except OSError as error:
            raise ZooError(f"{path} cannot be written: {error.strerror or error}") from error
        return files

    def _repr_html_(self) -> str:
        """In a notebook: the page."""
        from html import escape

        page = escape(self.html(), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="760" style="border:0"></iframe>'


def visualize(
    models: Models,
    images: Picture | Sequence[Picture],
    *,
    selector: SelectorLike | None = None,
    keep: int | float | Sequence[int | float] | None = None,
    block: int = -2,
    attention: bool = False,
    title: str | None = None,
    **data: Any,
) -> Visual:
    """Draw what models keep, merge and drop of images, block by block.

    Args:
        models: A model that `zoo.wrap` takes or returned, one with a reducer in place, a
            `SelectingTower`, or a model around one of these; several, as a list or a mapping by
            the names that they shall have.
        images: A file, a folder, a pattern, a Pillow image, an array `(H, W, 3)` of 8 bits, a
            tensor `(C, H, W)` as the model takes it; or a list of them.
        selector: Also choose among the tokens that are left, see `zoo.selector`.
        keep: For it, or for the one of a `SelectingTower`: tokens or a share, or several, which
            become steps of the slider.
        block: For it: whose output is chosen from.
        attention: Also draw what the class token attends to, by `zoo.attention_maps`.
        title: Headline; None is the name of the model.
        **data: How images are prepared where the model does not say: `img_size`, `crop_pct`,
            `crop_mode`, `interpolation`, `mean`, `std`; and `upright=False`, which leaves
            photographs as they are stored.

    Returns:
        A `Visual`: `save("see.html")`, `save("see.png")`, `sheet()`, `picture()`, `trail()`.

    Raises:
        ZooError: If an image cannot be read, a model has no blocks to step through, or the parts
            do not go together.

    Examples:
        >>> import torch, zoo
        >>> model = zoo.load("vit_digits", reducer="tome", schedule={"name": "constant_r", "r": 6})
        >>> seen = zoo.visualize(model, torch.zeros(1, 16, 16))
        >>> seen.trail().counts[:3]
        [65, 59, 53]
    """
    chosen = _named(models, selector, keep, block)
    keeps = [] if keep is None else list(keep) if isinstance(keep, Sequence) else [keep]
    if keeps and not any(isinstance(model, SelectingTower) for model in chosen.values()):
        raise ZooError(
            f"keep={keep} is for a selector, and there is none; give one too, selector=NAME, or "
            "leave keep out"
        )
    pictures = _pictures(images)
    found: list[tuple[str, list[Strip]]] = []
    for name, model in chosen.items():
        inner = _inside(model)
        for i, seen in enumerate(look(inner, pictures, data)):
            strip = _strip(model, inner, seen, name, attention, keeps)
            if i == len(found):
                found.append((seen.name, []))
            found[i][1].append(strip)
    return Visual(title or _title(chosen, found), found, attention)


def _strip(
    model: nn.Module,
    inner: ReducedViT,
    seen: Seen,
    name: str,
    attention: bool,
    keeps: Sequence[int | float],
) -> Strip:
    weight = next(inner.parameters(), None)
    tensor = seen.tensor if weight is None else seen.tensor.to(weight.device, weight.dtype)
    # One by one: of a batch, padding and shared limits could show in an image's counts.
    (trail,) = follow(model, tensor, name, attention, keeps)
    return Strip(trail, on_cells(seen.picture, inner.tower, inner.backbone, trail.grid))


def _named(
    models: Models,
    selector: SelectorLike | None,
    keep: int | float | Sequence[int | float] | None,
    block: int,
) -> dict[str, nn.Module]:
    if isinstance(models, nn.Module | str):
        models = [models]  # type: ignore[list-item]  # a name is refused with what to type
    if not models:
        raise ZooError("there is no model to look at")
    if isinstance(models, Mapping):
        models = {name: looked_at(model) for name, model in models.items()}
    else:
        models = [looked_at(model) for model in models]
    if selector is not None:
        first = keep[0] if isinstance(keep, Sequence) and keep else keep
        chooser = create_selector(selector)

        def select(model: nn.Module) -> nn.Module:
            if isinstance(model, SelectingTower):
                raise ZooError("the model is a tower with a selector already; leave selector out")
            return SelectingTower(as_reduced(model), chooser, first, block)  # type: ignore[arg-type]

        if isinstance(models, Mapping):
            models = {name: select(model) for name, model in models.items()}
        else:
            models = [select(model) for model in models]
    if isinstance(models, Mapping):
        return dict(models)
    found: dict[str, nn.Module] = {}
    for model in models:
        name = base = describe_model(model)
        while name in found:
            name = f"{base} ({sum(known.startswith(base) for known in found) + 1})"
        found[name] = model
    return found


def describe_model(model: nn.Module) -> str:
    """What a model is called on a sheet: its selector, its reducer and budget, or "dense"."""
    if isinstance(model, SelectingTower):
        inner = describe_model(model.tower)
        return model.selector.name + ("" if inner == "dense" else f" behind {inner}")
    reduced = as_reduced(model)
    parts = [plugin.name for plugin in reduced.plugins]  # type: ignore[union-attr]
    if reduced.reducer is not None:
        parts.insert(0, reduced.reducer.name)
    return " + ".join(map(str, parts)) or "dense"


def looked_at(model: nn.Module) -> nn.Module:
    """What is drawn of a model: itself, or the one tower that it holds.

    Args:
        model: A CLIP, a vision-language model, a training module or a shell such as that of
            `torch.compile` may be around the tower.

    Raises:
        ZooError: If there are several towers.
        UnsupportedModel: If there is none.
    """
    if reason := why_no_model(model):
        raise UnsupportedModel(reason)
    if isinstance(model, ReducedViT | SelectingTower) or attached_in(model):
        return model
    ready = {n: m for n, m in model.named_modules() if isinstance(m, ReducedViT | SelectingTower)}
    outermost = [n for n in ready if not any(n.startswith(f"{outer}.") for outer in ready)]
    found = {n: ready[n] for n in outermost} or towers_in(model)
    if len(found) > 1:
        names = ", ".join(found)
        raise ZooError(
            f"the {type(model).__name__} holds {len(found)} towers: {names}; give the one to look "
            f"at, model.{next(iter(found))}"
        )
    return next(iter(found.values()), model)


def _inside(model: nn.Module) -> ReducedViT:
    """The model whose blocks are run."""
    return as_reduced(model.tower if isinstance(model, SelectingTower) else model)


def _title(models: Mapping[str, nn.Module], found: Sequence[tuple[str, Sequence[Strip]]]) -> str:
    inner = []
    for model in models.values():
        tower = _inside(model)
        known: Any = tower.pretrained_cfg or {}
        name = known.get("architecture") or type(tower.backbone).__name__
        inner.append(str(name))
    names = " and ".join(dict.fromkeys(inner))
    return f"{names}: {Path(found[0][0]).name}" if len(found) == 1 else names


def _pictures(images: Any) -> list[Any]:
    if isinstance(images, str | os.PathLike):
        return list(files_of(images))
    if hasattr(images, "shape") and len(images.shape) == 4:
        found: list[Any] = list(images)
    elif isinstance(images, Image.Image) or hasattr(images, "shape"):
        found = [images]
    elif isinstance(images, Iterable):
        found = []
        for one in images:
            found += files_of(one) if isinstance(one, str | os.PathLike) else [one]
    else:
        raise ZooError(f"expected images, got {type(images).__name__}")
    if not found:
        raise ZooError("there are no images to look at; give a file, a folder or a list")
    return found

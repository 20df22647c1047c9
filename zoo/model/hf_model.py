"""A reduced model of Hugging Face that is called, and answers, as the original."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reduction.eager import traced
from reduction.functional.restoring import POLICIES, Change, restored
from reduction.tokens import Tokens
from zoo.adapters.tower import Sized
from zoo.errors import ZooError
from zoo.model.empty import for_any_batch
from zoo.model.reduced import ReducedViT
from zoo.model.sizes import joined, several_rasters
from zoo.model.stream import Outflow, flow, own_answer

RESTORE = ("none", *POLICIES)
_WHY_NO_MAPS = (
    "output_attentions is not possible here: the maps of a reduced model have another size in "
    "every block; zoo.attention_maps(model, pixel_values) shows them with the tokens they are over"
)


class ReducedHfModel(ReducedViT):
    """A model of Hugging Face with a reducer inside: its own call and its own output classes.

    `last_hidden_state` and `hidden_states` are as long as the tokens that are left. What the class
    does with its other arguments stays: `labels` give a loss, `return_dict=False` a tuple. See
    `ReducedViT` for everything else; `tensors()` is the same model with images in and logits out.
    """

    #: "none" hands out hidden states as long as the tokens that are left; a policy of
    #: `reduction.functional.restoring` gives one row per patch.
    restore = "none"

    def forward(self, *args: Any, return_info: bool | str = False, **kwargs: Any) -> Any:
        """What the original's `forward` does, with fewer tokens.

        Args:
            *args: As the original takes them.
            return_info: True also returns an `Info`; "trace" keeps the state after each block.
            **kwargs: As the original takes them.

        Returns:
            The original's output, or `(output, info)`.

        Raises:
            ZooError: If the images do not fit, or attention maps are asked for.
        """
        names = self.tower.arguments  # type: ignore[attr-defined]  # of these towers
        if len(args) > len(names):
            raise ZooError(f"expected at most {len(names)} arguments ({', '.join(names)})")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        images = options.pop("pixel_values", None)
        if not isinstance(images, Tensor):
            raise ZooError(
                f"expected pixel_values, a tensor of images, got {type(images).__name__}; an image "
                'processor makes it: processor(images, return_tensors="pt").pixel_values'
            )
        if not images.shape[0]:
            options.pop("labels", None)
        parts = self.tower.several(self.backbone, images, options)  # type: ignore[attr-defined]
        if parts:
            return self._by_size(images, parts, options, return_info)
        return self._call(images, options, return_info)

    def _by_size(
        self,
        images: Tensor,
        parts: Sequence[Sized],
        options: dict[str, Any],
        return_info: bool | str,
    ) -> Any:
        """Images of one size together and without padding; the answer is of the whole batch."""
        m, tower = self.backbone, self.tower
        if return_info and len(parts) > 1:
            raise ZooError(several_rasters(parts))
        if not return_info and self.unchanged([part.images for part in parts]):
            return type(m).forward(m, images, **options)
        as_dict = options.pop("return_dict", None)
        labels = options.pop("labels", None)
        dropped = ("pixel_attention_mask", "spatial_shapes")
        own = {k: v for k, v in options.items() if k not in dropped} | {"return_dict": True}
        found = [self._call(part.images, dict(own), return_info) for part in parts]
        answers = [answer for answer, _ in found] if return_info else found
        # One row per patch is handed out as long as the mask is, whose padding is zeros.
        length = 0 if self.restore == "none" else images.shape[1]
        fields = joined(answers, parts, length)
        if labels is not None:
            given = {**options, "labels": labels}
            fields["loss"] = tower.loss(m, fields["logits"], given)  # type: ignore[attr-defined]
        answer = type(answers[0])(**fields)
        as_dict = getattr(m.config, "return_dict", True) if as_dict is None else as_dict
        answer = answer if as_dict else answer.to_tuple()
        return (answer, found[0][1]) if return_info else answer

    @for_any_batch
    def _call(self, images: Tensor, options: dict[str, Any], return_info: bool | str) -> Any:
        m, tower = self.backbone, self.tower
        config = m.config
        if _flag(options, config, "output_attentions"):
            raise ZooError(_WHY_NO_MAPS)
        for name in ("head_mask", "attention_mask"):
            given = options.pop(name, None)
            if given is not None and not (isinstance(given, Tensor) and bool(given.bool().all())):
                raise ZooError(
                    f"{name} is not possible here: a reduced model merges and drops tokens, so "
                    "heads or patches cannot be masked by their place; leave it out"
                )
        self._check(images, options)
        wanted = _flag(options, config, "output_hidden_states")
        training = self.training or m.training
        whole = return_info or training or wanted or not tower.part  # type: ignore[attr-defined]
        changes: list[tuple[int, Change]] = []

        def note(block: int, before: Tokens, behind: Tokens) -> None:
            changes.append((block, (before, behind)))

        with self.linear():
            out = flow(
                self,
                images,
                track=bool(return_info) or self.restore != "none",
                trace=bool(wanted) or return_info == "trace",
                last_block="full" if whole else self.runtime.last_block,
                options=options,
                note=note if self.restore == "knn" else None,
            )
            answer = self._answer(out, {**options, "pixel_values": images}, wanted, changes)
        as_dict = options.get("return_dict")
        as_dict = getattr(config, "return_dict", True) if as_dict is None else as_dict
        answer = answer if as_dict else answer.to_tuple()
        if not return_info:
            return answer
        info = out.info if return_info == "trace" else out.info._replace(trace=())
        return answer, info

    def _check(self, images: Tensor, options: Mapping[str, Any]) -> None:
        if not traced():
            self.tower.check_images(self.backbone, images, **options)  # type: ignore[call-arg]

    def _answer(
        self,
        out: Outflow,
        options: dict[str, Any],
        wanted: Any,
        changes: Sequence[tuple[int, Change]],
    ) -> Any:
        m, tower = self.backbone, self.tower
        own = own_answer(self, out.t, out.memories)
        t = out.t._replace(x=tower.norm(m, out.t.x))

        def shown(state: Tokens, block: int) -> Tensor:
            """Features behind a block as they are handed out; -1 is what enters the first."""
            if self.restore == "none":
                return state.x
            so_far = [change for i, change in changes if i <= block]
            rows = restored(state, out.info.grid, self.restore, so_far)
            return torch.cat([state.x[:, : state.prefix], rows], dim=1)

        answer = tower.answer(m, t, shown(t, self.depth), own, options)  # type: ignore[attr-defined]
        if wanted:
            assert out.entered is not None
            states = enumerate((out.entered, *out.info.trace), start=-1)
            answer["hidden_states"] = tuple(_selected([shown(s, i) for i, s in states], wanted))
        return answer

    def tensors(self) -> ReducedViT:
        """The same model, parts and weights shared, with images in and logits or features out."""
        other = copy.copy(self)
        other.__class__ = ReducedViT  # type: ignore[assignment]  # the other way round is fine
        return other

    def around(self, inner: Any) -> ReducedHfModel:
        """The same reduction around a part of the backbone that is a tower itself.

        Args:
            inner: That part.
        """
        other = copy.copy(self)
        other._modules = {**self._modules, "backbone": inner}
        return other

    def verify(self, images: Tensor, tolerance: float = 0.0) -> float:
        """See `ReducedViT`."""
        return self.tensors().verify(images, tolerance)

    def training_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `ReducedViT`."""
        return self.tensors().training_logits(images)


def as_called(model: ReducedViT) -> ReducedHfModel:
    """A reduced model of Hugging Face, called as the original is.

    Args:
        model: With images in and logits out. It is changed.
    """
    model.__class__ = ReducedHfModel
    assert isinstance(model, ReducedHfModel)
    return model


def _flag(options: dict[str, Any], config: Any, name: str) -> Any:
    given = options.pop(name, None)
    return getattr(config, name, False) if given is None else given


def _selected(states: Sequence[Tensor], wanted: Any) -> list[Tensor | None]:
    """All states, or None in place of those that were not asked for by their number."""
    if wanted is True:
        return list(states)
    chosen = {i % len(states) for i in ([wanted] if isinstance(wanted, int) else wanted)}
    return [state if i in chosen else None for i, state in enumerate(states)]

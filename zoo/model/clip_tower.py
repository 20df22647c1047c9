"""A reduced tower in the place of open_clip's own: `model.visual = zoo.wrap(model.visual, ...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zoo.adapters.tower import tower_of
from zoo.errors import ZooError
from zoo.model.empty import for_any_batch
from zoo.model.features import intermediates
from zoo.model.reduced import ReducedViT


class ReducedClipTower(ReducedViT):
    """An image tower of open_clip with a reducer inside, which answers as the original does.

    What open_clip asks of a tower besides is handed on to it: sizes, preprocessing, `lock`.
    """

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, of the tower."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "backbone" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.backbone, name)

    @for_any_batch
    def forward_intermediates(  # type: ignore[override]  # open_clip has other names than timm
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Features of chosen blocks on the full patch grid, as open_clip hands them out.

        Args:
            x: Images `(B, 3, H, W)`.
            indices: Blocks, negative ones from the end; an int takes the last so many, None all.
            stop_early: Run no block behind the last one that is asked for.
            normalize_intermediates: Apply the final norm to them.
            intermediates_only: Leave the embedding out.
            output_fmt: "NCHW" or "NLC".
            output_extra_tokens: Add the class tokens.

        Returns:
            `image_intermediates`, with `image_intermediates_prefix` and `image_features` where they
            are wanted. What a patch has that was merged or dropped is what `restoring` says.
        """
        self.checked(x)
        found: dict[str, Any] = intermediates(
            self,
            x,
            indices,
            return_prefix_tokens=output_extra_tokens,
            norm=normalize_intermediates,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=True,
            restore=self.restoring,
        )
        if not intermediates_only:
            answer = self.forward_head(found["image_features"])
            # The intermediate features come with the embedding alone, whatever else it puts out.
            found["image_features"] = answer[0] if isinstance(answer, tuple) else answer
        return found

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
        restore: str | None = None,
    ) -> Any:
        """See `zoo.model.timm_api.TimmContract`."""
        if attn_mask is not None:
            raise ZooError("attn_mask is not possible here: tokens change from block to block")
        return intermediates(
            self,
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            restore=self.restoring if restore is None else restore,
        )


def wrapper_of(backbone: Any) -> type[ReducedViT]:
    """The class of wrappers that answers as a backbone's library does."""
    return ReducedClipTower if tower_of(backbone).library == "open_clip" else ReducedViT

"""OpenCLIP's towers whose trunk is a model of timm: SigLIP, EVA-02, PE and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.timm_model import TimmModel
from torch import Tensor

from reduction.tokens import Tokens
from zoo.adapters.attention import linear_weights
from zoo.adapters.tower import Tower, register_tower, tower_of
from zoo.errors import UnsupportedModel


def _of_trunk(name: str) -> Callable[..., Any]:
    """A question that the tower of the trunk answers."""

    def ask(self: Tower, m: Any, *args: Any, **options: Any) -> Any:
        return getattr(tower_of(m.trunk), name)(m.trunk, *args, **options)

    ask.__name__, ask.__doc__ = name, "See `Tower`."
    return ask


class OpenClipTimm(Tower):
    """OpenCLIP's `TimmModel`: a trunk of timm, and a projection."""

    title = "open_clip TimmModel"
    library = "open_clip"

    blocks = _of_trunk("blocks")
    prefix = _of_trunk("prefix")
    class_tokens = _of_trunk("class_tokens")
    width = _of_trunk("width")
    reads = _of_trunk("reads")
    why_all_tokens = _of_trunk("why_all_tokens")
    grid = _of_trunk("grid")
    patch_size = _of_trunk("patch_size")
    grid_of = _of_trunk("grid_of")
    input_size = _of_trunk("input_size")
    check_images = _of_trunk("check_images")
    by_size = _of_trunk("by_size")
    embed = _of_trunk("embed")
    biased = _of_trunk("biased")
    bias = _of_trunk("bias")
    raster = _of_trunk("raster")
    why_one_piece = _of_trunk("why_one_piece")
    patches = _of_trunk("patches")
    positions = _of_trunk("positions")
    pre_norm = _of_trunk("pre_norm")
    norm = _of_trunk("norm")
    norm_maps = _of_trunk("norm_maps")
    stem = _of_trunk("stem")
    stem_of_layers = _of_trunk("stem_of_layers")
    position_macs = _of_trunk("position_macs")
    checkpointing = _of_trunk("checkpointing")
    set_checkpointing = _of_trunk("set_checkpointing")
    weighs = _of_trunk("weighs")
    class_embedding = _of_trunk("class_embedding")
    places_prefix = _of_trunk("places_prefix")

    def check(self, m: Any) -> None:
        """See `Tower`."""
        trunk = type(m.trunk).__name__
        try:
            tower_of(m.trunk).check(m.trunk)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"the timm trunk of this open_clip tower: {error}") from error
        if hasattr(m.head, "pool"):
            raise UnsupportedModel(
                f"the head of this open_clip tower pools a whole map of the {trunk} (timm_pool="
                "'abs_attn' or 'rot_attn'), and of a reduced sequence there is none"
            )

    def classes(self, m: Any) -> int:
        """See `Tower`: it answers with an embedding."""
        return 0

    def features(self, m: Any) -> int:
        """See `Tower`: the width of the embedding."""
        last = [f.out_features for f in m.head.modules() if hasattr(f, "out_features")]
        trunk = int(m.trunk.num_classes or tower_of(m.trunk).features(m.trunk))
        return int(last[-1]) if last else trunk

    def settings(self, m: Any) -> dict[str, Any]:
        """See `Tower`."""
        trunk, head = m.trunk, m.head
        known = getattr(trunk, "pretrained_cfg", None) or {}
        kind = "mlp" if hasattr(head, "mlp") else "linear" if hasattr(head, "proj") else ""
        last = head.mlp.fc2 if kind == "mlp" else getattr(head, "proj", None)
        drop = getattr(head, "drop", None)
        vision = {
            "timm_model_name": known.get("architecture") or type(trunk).__name__,
            "timm_pool": str(trunk.global_pool),
            "timm_proj": kind or ("" if trunk.num_classes else "none"),
            "timm_proj_bias": getattr(last, "bias", None) is not None,
            "timm_drop": float(getattr(drop, "p", 0.0)),
            "image_size": list(self.input_size(m)[1:]),
        }
        return {"embed_dim": self.features(m), "quick_gelu": False, "vision_cfg": vision}

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """See `Tower`."""
        inner = tower_of(m.trunk).after_blocks(m.trunk)
        return ("head.", *(f"trunk.{name}" for name in inner))

    def head_macs(self, m: Any, tokens: int) -> tuple[int, int]:
        """See `Tower`."""
        linear, attention = tower_of(m.trunk).head_macs(m.trunk, tokens)
        return linear + linear_weights(m.head), attention

    def undecayed(self, m: Any) -> set[str]:
        """See `Tower`."""
        return {f"trunk.{name}" for name in tower_of(m.trunk).undecayed(m.trunk)}

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
        """See `Tower`."""
        x = tower_of(m.trunk).leave(m.trunk, t)
        return x if pre_logits else m.head(x)


register_tower(TimmModel, OpenClipTimm())

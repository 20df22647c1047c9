"""What the vision transformers of Hugging Face have in common.

A model is a tower alone (`ViTModel`), or one with something around it that holds the tower as an
attribute (`ViTForImageClassification.vit`). Both are run by the same object, which knows the name
of that attribute. Their own modules do the work; what is restated here is which of them are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from reduction.tokens import Tokens
from zoo.adapters.attention import linear_weights
from zoo.adapters.heads import mean
from zoo.adapters.timm_tower import of_projection
from zoo.adapters.tower import Embedded, Sized, Tower
from zoo.errors import UnsupportedModel, ZooError

OLDEST = "5.24"
if Version(transformers.__version__) < Version(OLDEST):  # classes have other parts there
    raise ZooError(
        f"models of Hugging Face need transformers {OLDEST} or newer, this is "
        f"{transformers.__version__}; type pip install -U transformers"
    )
KERNELS = ("sdpa", "eager")
#: Said in every configuration, and nothing about the model.
_PASSING = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype")
#: What the classes are called, which is said with the preprocessing; their number is what counts.
_LABELS = ("id2label", "label2id")


class HfTower(Tower):
    """A vision transformer of Hugging Face.

    Args:
        part: Attribute of the model that holds the tower; empty where the model is the tower.
        arguments: Names of what its `forward` takes, in order, behind the images.
        passes_on: Whether its `forward` hands unknown arguments on to the loss.
    """

    library = "transformers"
    tensors = False
    #: Names of arguments that the embedding takes.
    embedding: ClassVar[tuple[str, ...]] = ("bool_masked_pos", "interpolate_pos_encoding")
    #: Whether images of any size are taken without being asked to.
    any_size: ClassVar[bool] = False
    #: Attributes of the tower whose `forward` is restated here, with their classes.
    loops: ClassVar[Mapping[str, type[nn.Module]]] = {}
    #: Where the blocks are, and the norm behind them.
    layers: ClassVar[str] = "layers"
    last_norm: ClassVar[str] = "layernorm"

    def __init__(
        self, part: str = "", arguments: Iterable[str] = (), passes_on: bool = True
    ) -> None:
        self.part = part
        self.arguments = ("pixel_values", *arguments)
        self.passes_on = passes_on

    def inner(self, m: Any) -> Any:
        """The tower itself."""
        return getattr(m, self.part) if self.part else m

    # ---------------------------------------------------------------- facts

    def check(self, m: Any) -> None:
        """See `Tower`, as for all others."""
        inner = self.inner(m)
        kernel = inner.config._attn_implementation
        if kernel not in KERNELS:
            raise UnsupportedModel(
                f"attn_implementation={kernel!r} takes no bias for the sizes of merged tokens; "
                'load the model with attn_implementation="sdpa", which on a GPU runs flash kernels '
                "too"
            )
        for name, cls in self.loops.items():
            if type(getattr(inner, name)).forward is not cls.forward:
                raise UnsupportedModel(
                    f"{name} of the {type(inner).__name__} is a "
                    f"{type(getattr(inner, name)).__name__}, not the {cls.__name__} of "
                    "transformers, so its forward is not known"
                )

    def blocks(self, m: Any) -> Sequence[nn.Module]:
        """See `Tower`."""
        return attrgetter(self.layers)(self.inner(m))  # type: ignore[no-any-return]

    def prefix(self, m: Any) -> int:
        """See `Tower`."""
        return 1

    def class_tokens(self, m: Any) -> int:
        """See `Tower`."""
        return 1

    def width(self, m: Any) -> int:
        """See `Tower`."""
        return int(self.inner(m).config.hidden_size)

    def classes(self, m: Any) -> int:
        """See `Tower`."""
        head = self.classifier(m)
        return int(head.out_features) if isinstance(head, nn.Linear) else 0

    def reads(self, m: Any) -> str:
        """See `Tower`."""
        return "class"

    def why_all_tokens(self, m: Any) -> str:
        """See `Tower`."""
        if self.reads(m) == "patches":
            return "the classifier does not read the class token alone (it averages over patches)"
        return ""

    def patch_size(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        return _pair(self.inner(m).config.patch_size)

    def input_size(self, m: Any) -> tuple[int, int, int]:
        """See `Tower`."""
        config = self.inner(m).config
        return (int(config.num_channels), *_pair(config.image_size))

    def grid(self, m: Any) -> tuple[int, int]:
        """See `Tower`."""
        (_, height, width), patch = self.input_size(m), self.patch_size(m)
        return height // patch[0], width // patch[1]

    def grid_of(self, m: Any, images: Tensor, **options: Any) -> tuple[int, int]:
        """See `Tower`; options are those of the model's own call."""
        patch = self.patch_size(m)
        return images.shape[-2] // patch[0], images.shape[-1] // patch[1]

    def stem(self, m: Any) -> nn.Module:
        """See `Tower`."""
        return self.inner(m).embeddings.patch_embeddings  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- running

    def check_images(self, m: Any, images: Tensor, **options: Any) -> None:
        """See `Tower`; options are those of the model's own call.

        Raises:
            ZooError: If the images do not fit.
        """
        channels, height, width = self.input_size(m)
        if images.dim() != 4 or images.shape[1] != channels:
            raise ZooError(
                f"expected pixel_values of shape (B, {channels}, H, W), got {tuple(images.shape)}"
            )
        own, patch = tuple(images.shape[-2:]), self.patch_size(m)
        if own[0] < patch[0] or own[1] < patch[1]:
            raise ZooError(f"images of {own[0]}x{own[1]} are smaller than a patch of {patch}")
        if self.any_size or options.get("interpolate_pos_encoding") or own == (height, width):
            return
        more = ""
        if "interpolate_pos_encoding" in self.embedding:
            more = ", or call the model with interpolate_pos_encoding=True"
        raise ZooError(
            f"expected images of {height}x{width}, got {own[0]}x{own[1]}: the image processor has "
            f"another size than the model; set its size to {height}x{width}{more}"
        )

    def several(self, m: Any, images: Tensor, options: Mapping[str, Any]) -> Sequence[Sized]:
        """A batch of several sizes, or with padding, as images of one size each; else empty.

        Args:
            m: The backbone.
            images: `pixel_values`.
            options: Of the model's own call.

        Raises:
            ZooError: If what is said of the padding does not fit.
        """
        return ()

    def embed(self, m: Any, images: Tensor, **options: Any) -> Embedded:
        """See `Tower`; options are those of the model's own call."""
        given = {k: v for k, v in options.items() if k in self.embedding and v is not None}
        return Embedded(self.inner(m).embeddings(self.cast(m, images), **given), None, False)

    def why_one_piece(self, m: Any) -> str:
        """See `Tower`."""
        return ""

    def patches(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        # Some of the modules around it take images of the model's own size alone.
        proj = next(c for c in self.stem(m).modules() if isinstance(c, nn.Conv2d))
        return of_projection(proj, self.cast(m, images))

    def positions(self, m: Any, grid: tuple[int, int]) -> Tensor:
        """See `Tower`; tables are resampled as the model does for other image sizes."""
        embeddings, width, own = self.inner(m).embeddings, self.width(m), self.grid(m)
        table = _positions(embeddings)
        count = grid[0] * grid[1]
        if table is None:
            return next(self.stem(m).parameters()).new_zeros(1, count, width)
        first = table.shape[1] - own[0] * own[1]
        if grid != own:
            size = (n * p for n, p in zip(grid, self.patch_size(m), strict=True))
            like = table.new_zeros(1, first + count, width)
            table = embeddings.interpolate_pos_encoding(like, *size)
        return table[:, first:]

    def whole(self, m: Any, images: Tensor) -> Tensor:
        """See `Tower`."""
        return self._vector(m, m(images))

    def _vector(self, m: Any, answer: Any) -> Tensor:
        """What `leave` would answer, of an output of the model."""
        for name in ("logits", "image_embeds", "pooler_output"):
            if answer.get(name) is not None:
                return answer[name]  # type: ignore[no-any-return]
        return self.feature(m, Tokens.start(answer.last_hidden_state, self.prefix(m)))

    def cast(self, m: Any, images: Tensor) -> Tensor:
        """Images in the precision of the patch embedding, as all of these models bring them to."""
        first = next(self.stem(m).parameters())
        return images.to(first.dtype)

    def as_timm(self, m: Any) -> Any:
        """See `Tower`."""
        return _AsTimm(self, m)

    def norm(self, m: Any, x: Tensor) -> Tensor:
        """See `Tower`."""
        return attrgetter(self.last_norm)(self.inner(m))(x)  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- heads

    def pooled(self, m: Any, t: Tokens) -> Tensor | None:
        """What the model calls `pooler_output`, of tokens behind the final norm."""
        pooler = getattr(self.inner(m), "pooler", None)
        return None if pooler is None else pooler(t.x)

    def feature(self, m: Any, t: Tokens) -> Tensor:
        """What a classifier reads, or one vector per image where there is none, `(B, C)`."""
        if not self.part:
            pooled = self.pooled(m, t)
            if pooled is not None:
                return pooled
        return t.x[:, 0] if self.class_tokens(m) else mean(t)

    def leave(self, m: Any, t: Tokens, pre_logits: bool = False) -> Tensor:
        """See `Tower`."""
        x, head = self.feature(m, t), self.classifier(m)
        return x if pre_logits or head is None else head(x)

    def answer(
        self, m: Any, t: Tokens, last: Tensor, own: Tensor | None, options: Mapping[str, Any]
    ) -> Any:
        """The output that the model's class has.

        Args:
            m: The backbone.
            t: Tokens behind the final norm.
            last: What is handed out as `last_hidden_state`.
            own: Logits of a method that answers in place of the classifier.
            options: Of the call, such as `labels`.
        """
        if not self.part:
            return BaseModelOutputWithPooling(
                last_hidden_state=last, pooler_output=self.pooled(m, t)
            )
        logits = self.leave(m, t) if own is None else own
        return ImageClassifierOutput(loss=self.loss(m, logits, options), logits=logits)

    def loss(self, m: Any, logits: Tensor, options: Mapping[str, Any]) -> Any:
        """What the model's class makes of `labels`; None without any.

        Args:
            m: The backbone.
            logits: `(B, classes)`.
            options: Of the call.
        """
        if options.get("labels") is None:
            return None
        passed = ("num_items_in_batch",) if self.passes_on else ()
        extra = {k: options[k] for k in passed if options.get(k) is not None}
        return m.loss_function(options["labels"], logits, m.config, **extra)

    def head_macs(self, m: Any, tokens: int) -> tuple[int, int]:
        """See `Tower`."""
        linear = sum(linear_weights(head) for head in self.heads(m))
        pooler = getattr(self.inner(m), "pooler", None)
        return linear + (0 if pooler is None else linear_weights(pooler)), 0

    def heads(self, m: Any) -> list[nn.Module]:
        """Linear layers behind pooling."""
        head = self.classifier(m)
        return [] if head is None else [head]

    def classifier(self, m: Any) -> Any:
        """See `Tower`."""
        return getattr(m, "classifier", None)

    def reset_classifier(self, m: Any, classes: int, pool: str | None = None) -> None:
        """See `Tower`."""
        old = self.classifier(m)
        if old is None:
            raise ZooError(
                f"a {type(m).__name__} has no classifier; load the ForImageClassification class of "
                "its family"
            )
        m.classifier = self.fresh(m, self.features(m), classes)
        m.num_labels = classes
        if classes:
            m.config.num_labels = classes

    def fresh(self, m: Any, width: int, classes: int) -> nn.Module:
        """A new classifier."""
        new = nn.Linear(width, classes) if classes else nn.Identity()
        like = next(m.parameters())
        return new.to(like.device, like.dtype)

    def features(self, m: Any) -> int:
        """See `Tower`."""
        head = self.classifier(m)
        return int(head.in_features) if isinstance(head, nn.Linear) else self.width(m)

    # ---------------------------------------------------------------- training

    def checkpointing(self, m: Any) -> bool:
        """See `Tower`."""
        return any(
            getattr(b, "gradient_checkpointing", False) and b.training for b in self.blocks(m)
        )

    def set_checkpointing(self, m: Any, enable: bool) -> None:
        """See `Tower`."""
        (m.gradient_checkpointing_enable if enable else m.gradient_checkpointing_disable)()

    def after_blocks(self, m: Any) -> tuple[str, ...]:
        """See `Tower`."""
        part = f"{self.part}." if self.part else ""
        heads = [name for name, module in m.named_modules() if module in self.heads(m)]
        return (f"{part}{self.last_norm}.", *(f"{name}." for name in heads))

    def undecayed(self, m: Any) -> set[str]:
        """See `Tower`."""
        words = ("position_embedding", "_token", "class_embedding", "probe")
        return {n for n, _ in m.named_parameters() if any(word in n for word in words)}

    def groups(self, m: Any, coarse: bool = False) -> dict[str, Any]:
        """See `Tower`."""
        part = self.part.replace(".", r"\.") + r"\." if self.part else ""
        layers = self.layers.replace(".", r"\.")
        return {
            "stem": rf"^{part}embeddings",
            "blocks": [
                (rf"^{part}{layers}\.(\d+)", None),
                (rf"^{part}{self.last_norm}", (99999,)),
            ],
        }

    def settings(self, m: Any) -> dict[str, Any]:
        """See `Tower`."""
        left_out = (*_PASSING, *_LABELS)
        config = {k: v for k, v in m.config.to_diff_dict().items() if k not in left_out}
        config["model_type"] = m.config.model_type
        if self.classifier(m) is not None:
            config["num_labels"] = int(m.config.num_labels)
        return {"class": type(m).__name__, "config": config}


class _AsTimm:
    """Norm and head of a model by timm's names."""

    def __init__(self, tower: HfTower, m: Any) -> None:
        self._tower, self._m = tower, m

    def norm(self, x: Tensor) -> Tensor:
        """The norm behind the last block."""
        return self._tower.norm(self._m, x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Pool and classify tokens of size one."""
        return self._tower.classify(self._m, x)


def _positions(embeddings: Any) -> Any:
    """Positions of all tokens, `(1, N, C)`; None where nothing is added."""
    table = getattr(embeddings, "position_embedding", None)
    if table is not None:
        return table.weight.unsqueeze(0)
    return getattr(embeddings, "position_embeddings", None)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Iterable):
        height, width = size
        return int(height), int(width)
    return int(size), int(size)

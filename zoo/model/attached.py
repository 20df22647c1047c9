"""What stands in a model whose tokens are reduced in place: its `forward`, and where it leads.

`zoo.attach` puts an `Attachment` where instances look before their class does, so that nothing else
of the model changes: class, configuration and weights stay. It is found again by `attachment_of`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from zoo.adapters.tower import find_tower
from zoo.model.features import known
from zoo.model.hf_model import ReducedHfModel
from zoo.model.placed import ATTACHED, is_of
from zoo.model.reduced import ReducedViT

#: Where a model keeps the parts of a method that learn.
REDUCER = "zoo_reducer"
#: What is replaced in a model besides `forward`, by its library.
_ALSO = {
    "timm": (
        "forward_features",
        "forward_head",
        "forward_intermediates",
        "get_intermediate_layers",
    ),
    "open_clip": ("forward_intermediates",),
}


class Attachment:
    """In place of a model's `forward`.

    Args:
        model: What runs instead. It holds the model, and the model holds this: nobody else does.
    """

    def __init__(self, model: ReducedViT) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `forward`."""
        return self.model(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments of the original: a `Trainer` chooses columns by their names."""
        whole = inspect.signature(type(self.model.backbone).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's, with fewer tokens."""
        return self.model.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's; features that come from here know what their tokens stand for."""
        if known(x) is not None:
            return self.model.forward_head(x, pre_logits=pre_logits)
        backbone = self.model.backbone
        return type(backbone).forward_head(backbone, x, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm's or open_clip's, on the full patch grid."""
        return self.model.forward_intermediates(*args, **kwargs)

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """timm's, likewise."""
        return self.model.get_intermediate_layers(*args, **kwargs)


def put(model: ReducedViT) -> None:
    """Let a reduced model stand in for its own backbone, from inside of it.

    Args:
        model: Called as its backbone is.
    """
    m: Any = model.backbone
    # Whether anything trains is for the backbone to say, whose flag everybody sets.
    model.training = False
    place(m, model)
    if model.reducer is not None:
        setattr(m, REDUCER, model.reducer.train(m.training))
    if isinstance(model, ReducedHfModel) and (inner := model.tower.inner(m)) is not m:  # type: ignore[attr-defined]
        place(inner, model.around(inner))


def place(m: Any, model: ReducedViT) -> None:
    """Put an attachment into one module."""
    made = Attachment(model)
    setattr(m, ATTACHED, made)
    m.forward = made
    for name in _ALSO.get(model.tower.library, ()):
        if hasattr(m, name):
            setattr(m, name, getattr(made, name))


def take_away(m: nn.Module) -> None:
    """Undo `place` in one module."""
    made = attachment_of(m)
    for name, value in list(vars(m).items()):
        if is_of(value, made):
            delattr(m, name)
    if REDUCER in m._modules:
        delattr(m, REDUCER)


def attachment_of(m: nn.Module) -> Attachment | None:
    """What is attached to a module itself, None for nothing."""
    found = vars(m).get(ATTACHED)
    return found if isinstance(found, Attachment) else None


def attached_in(m: nn.Module) -> dict[str, nn.Module]:
    """Every module in a model, by name, that something is attached to."""
    return {name: part for name, part in m.named_modules() if attachment_of(part) is not None}


def towers_in(model: nn.Module) -> dict[str, nn.Module]:
    """Supported models in a model, by name, without those that are parts of one."""
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and find_tower(part) is not None:
            found[name] = part
    return found


def as_reduced(model: nn.Module) -> ReducedViT:
    """A reduced model as it is, what is attached in a model, or a dense model wrapped.

    Its answers are tensors, whatever library the model is of.

    Args:
        model: Any supported one.

    Raises:
        UnsupportedModel: If it is none.
    """
    if not isinstance(model, ReducedViT):
        for part in attached_in(model).values():
            made = attachment_of(part)
            assert made is not None
            model = made.model
            break
    if isinstance(model, ReducedHfModel):
        return model.tensors()
    return model if isinstance(model, ReducedViT) else ReducedViT(model)


def as_tensors(model: nn.Module) -> nn.Module:
    """A model with images in and one tensor out, where it is known how; others as they are.

    Args:
        model: Any.
    """
    if isinstance(model, ReducedHfModel) or attached_in(model):
        return as_reduced(model)
    if isinstance(model, ReducedViT):
        return model
    tower = find_tower(model)
    return model if tower is None or tower.tensors else ReducedViT(model)

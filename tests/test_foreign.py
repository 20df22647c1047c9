"""What cannot be wrapped is told why: the true reason, and what to type instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import zoo
from tests.cases import backbone, images
from zoo.errors import ZooError


def _compiled_in_place() -> nn.Module:
    model = backbone("plain")
    model.compile()
    return model


def _compiled_block() -> nn.Module:
    model: Any = backbone("plain")
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "compiled": (
        lambda: torch.compile(backbone("plain")),
        r"compiled already \(OptimizedModule\): wrap first, then torch.compile\(zoo.wrap",
    ),
    "compiled in place": (_compiled_in_place, r"compiled already \(by .compile\(\)\).*wrap first"),
    "a compiled block": (_compiled_block, r"its blocks.1 is compiled already .*wrap first"),
    "spread over devices": (
        lambda: nn.DataParallel(backbone("plain")),
        r"spread over devices already \(DataParallel\): wrap first, .*\.module is the model",
    ),
    "averaged": (lambda: AveragedModel(backbone("plain")), "an average of weights already"),
    "a name": (lambda: "vit_tiny_patch16_224", r"the text .*zoo.create_model\('vit_tiny"),
    "a class": (lambda: timm.models.VisionTransformer, "the class VisionTransformer; pass an inst"),
    "a state dict": (lambda: backbone("plain").state_dict(), "a mapping; if it holds weights"),
    "a file's content": (lambda: {"state_dict": {}}, "a mapping; if it holds weights"),
    "nothing": (lambda: None, "got NoneType"),
    "a function": (lambda: timm.create_model, "got function"),
    "a tensor": (lambda: torch.ones(3), "got Tensor"),
    "a recorded graph": (
        lambda: torch.jit.trace(backbone("plain"), images(1)),
        "recorded graph",
    ),
    "a hierarchy": (
        lambda: timm.create_model("test_efficientnet"),
        "EfficientNet is not supported: it has no one sequence of tokens.*supported are",
    ),
    "parts in a row": (lambda: nn.Sequential(nn.Linear(3, 3)), "not supported"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", CASES)
def test_the_reason_of_a_refusal_is_the_true_one(what: str) -> None:
    make, expected = CASES[what]
    with pytest.raises(ZooError, match=expected) as refused:
        zoo.wrap(make(), "tome")
    assert "\n" not in str(refused.value)


def test_what_a_refusal_advises_works() -> None:
    dense = backbone("plain")
    inside = {
        "_orig_mod": torch.compile(copy.deepcopy(dense)),
        "module": nn.DataParallel(copy.deepcopy(dense)),
    }
    x = images(1)
    with torch.no_grad():
        expected = zoo.wrap(dense, "tome")(x)
        for name, shell in inside.items():
            assert torch.equal(zoo.wrap(getattr(shell, name), "tome").eval()(x), expected)
        assert torch.equal(nn.DataParallel(zoo.wrap(dense, "tome"))(x), expected)

"""Devices by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import ZooError

#: Types that weights and autocast may have, by their names.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str, option: str = "device") -> torch.device:
    """Returns the device of that name; "auto" is the accelerator if there is one.

    Args:
        name: As torch spells it, or "auto".
        option: What it is the value of, for the message.

    Raises:
        ZooError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ZooError(
            f"{option}={name} cannot be used here: {reason}; type {option}=cpu"
        ) from error
    if device.type == "meta":
        raise ZooError(f"{option}=meta computes nothing; type {option}=cpu")
    return device


def pick_dtype(name: str, option: str = "dtype") -> torch.dtype:
    """Returns the precision of that name.

    Args:
        name: As torch spells it, without "torch.".
        option: What it is the value of, for the message.

    Raises:
        ZooError: It is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ZooError(f"{option}={name}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def like_weights(images: Tensor, model: nn.Module, device: torch.device) -> Tensor:
    """Images where a model is, in the type of its weights; compiled models are looked into."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return images.to(device, next(dtypes, images.dtype))

"""Devices by name."""

from __future__ import annotations

import torch

from zoo.errors import ZooError


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

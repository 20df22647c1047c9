"""What earlier versions wrote is read by this one and gives the same logits.

`tests/saved` holds a small model folder of every kind, a training checkpoint and a plain file of
weights, written before the packages were rearranged (commit a84a58c), with the logits they gave.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.checkpoint import load_weights, save_pretrained

SAVED = Path(__file__).parent / "saved"
FOLDERS = sorted(path.name for path in SAVED.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(SAVED / "expected.safetensors")


def test_there_is_one_of_each_kind() -> None:
    assert {"dense", "tome", "diffrate", "dynamicvit", "evit_clca", "ltmp", "target"} <= set(
        FOLDERS
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_folder_gives_what_it_gave(name: str, expected: dict[str, torch.Tensor]) -> None:
    model = zoo.load(str(SAVED / name))
    with torch.no_grad():
        logits = model(expected["images"])
    assert torch.allclose(logits, expected[f"logits.{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_saving_it_again_writes_the_same_recipe(name: str, tmp_path: Path) -> None:
    """Of arguments that came later it says what they are without being given."""
    model = zoo.load(str(SAVED / name))
    save_pretrained(model, tmp_path / name)
    old, new = (
        json.loads((folder / name / "config.json").read_text()) for folder in (SAVED, tmp_path)
    )
    for part, built in (("reducer", model.reducer), ("schedule", model.schedule)):
        known = {} if built is None else inspect.signature(type(built)).parameters
        for later in set(new[part] or {}) - set(old[part] or {}):
            assert new[part].pop(later) == known[later].default, (part, later)
    for part in ("format", "backbone", "reducer", "schedule", "plugins"):
        assert new[part] == old[part], part


def test_a_training_checkpoint_gives_what_it_gave(expected: dict[str, torch.Tensor]) -> None:
    model = zoo.load(str(SAVED / "training.ckpt"))
    with torch.no_grad():
        logits = model(expected["images.training"])
    assert torch.allclose(logits, expected["logits.training"], rtol=1e-5, atol=1e-5)


def test_a_plain_file_of_weights_fits(expected: dict[str, torch.Tensor]) -> None:
    model = zoo.load(str(SAVED / "training.ckpt"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        load_weights(model, SAVED / "timm_state.pth")
        logits = model(expected["images.training"])
    assert torch.allclose(logits, expected["logits.training"], rtol=1e-5, atol=1e-5)

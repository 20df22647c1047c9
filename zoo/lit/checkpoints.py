"""Checkpoints of a training: files that are whole or not there, in a folder that may be moved."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class WholeFiles(TorchCheckpointIO):
    """Lightning's way to files, but the old one stays until the new one is complete.

    Lightning writes to the system's temporary folder and moves the file from there, which on
    another file system is a copy onto the old one, and passes over a folder that it may not write.
    It also forgets which epoch was the best where the folder of a run has been moved.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint beside its place and put it there.

        Args:
            checkpoint: What to save.
            path: Of the file; where it is no local one, Lightning writes it.
            storage_options: See Lightning.

        Raises:
            OSError: It cannot be written; the error names the file.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        buffer = io.BytesIO()  # torch's own writer has no words for a full disk
        torch.save(checkpoint, buffer)
        scratch = file.with_name(f".{file.name}.tmp")  # of a killed run the next one replaces it
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(scratch, "wb") as stream:
                stream.write(buffer.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(scratch, file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, whose run may lie in another folder now."""
        checkpoint = super().load_checkpoint(path, *args, **kwargs)
        folder = os.path.realpath(os.path.dirname(str(path)))
        for name, state in (checkpoint.get("callbacks") or {}).items():
            if isinstance(state, Mapping) and "best_model_path" in state:
                checkpoint["callbacks"][name] = moved(state, folder)
        return checkpoint


def moved(state: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The state of Lightning's `ModelCheckpoint`, with its files where they lie now.

    Args:
        state: As it was saved, with the paths of then.
        folder: Of the checkpoint that it is from.
    """
    before = state.get("dirpath")
    if not before or before == folder or Path(before).name != Path(folder).name:
        return dict(state)  # or a copy of one file, whose run lies where it lay

    def here(path: str) -> str:
        found = os.path.join(folder, os.path.basename(path))
        return found if path and os.path.isfile(found) else path

    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    paths = {name: here(state[name]) for name in names if name in state}
    best = {here(path): score for path, score in (state.get("best_k_models") or {}).items()}
    return {**state, **paths, "best_k_models": best, "dirpath": folder}


def write_whole(trainer: pl.Trainer) -> None:
    """Has a trainer save by `WholeFiles`, unless its strategy writes files of its own kind."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()

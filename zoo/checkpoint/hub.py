"""Model folders from the hub, through its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zoo.checkpoint import config as cfg
from zoo.checkpoint.files import first_line
from zoo.errors import BadCheckpoint

if TYPE_CHECKING:
    pass

#: How names of the hub begin.
HUB = "hf-hub:"


def download(text: str) -> Path:
    """Fetch a model folder from the Hugging Face hub, or find it in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = text[len(HUB) :].partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(cfg.OWN_FILES))
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise BadCheckpoint(
            f"{text}: no such model on the hub, or it is private ({type(error).__name__}); "
            "log in with `hf auth login` if it is yours"
        ) from error
    except HFValidationError as error:
        raise BadCheckpoint(
            f"{text}: expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"
        ) from error
    except Exception as error:  # requests, httpx, urllib, OSError: by version and kind of failure
        raise BadCheckpoint(
            f"{text}: could not be fetched and is not in the cache ({first_line(error)}); "
            "connect to the network, or copy the model folder here and give its path"
        ) from error

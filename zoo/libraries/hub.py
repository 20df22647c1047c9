"""What Hugging Face's hub has: looked up in its cache, and asked for once.

Its own client tries again and again where there is no network, with lines of its own.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download


def cached(repository: str, file: str) -> Path | None:
    """A file in the local cache, None where it is not there or this is no name of a repository."""
    try:
        return Path(hf_hub_download(repository, file, local_files_only=True))
    except Exception:  # of the several kinds that the client has for it
        return None


def offline() -> bool:
    """Whether the hub is not to be asked."""
    return bool(constants.HF_HUB_OFFLINE)


def ask_hub() -> None:
    """Find out whether the hub answers, once and within seconds.

    Raises:
        Exception: What the network says.
    """
    get_session().head(constants.ENDPOINT, timeout=5)

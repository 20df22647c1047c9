"""Where image files lie: a folder on disk, or a tar file read as one."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import IO, Any, NamedTuple

from zoo.errors import ZooError


class Entry(NamedTuple):
    """Something in a folder.

    Attributes:
        name: Its name.
        kind: `folder`, `file`, or `other`: a link to nothing, a pipe, a device.
    """

    name: str
    kind: str


class Disk:
    """A folder on disk.

    Args:
        root: Its path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def entries(self, *parts: str) -> list[Entry]:
        """List a folder below this one.

        Raises:
            ZooError: It cannot be read.
        """
        folder = self.root.joinpath(*parts)
        try:
            with os.scandir(folder) as found:
                return [Entry(e.name, _kind(e)) for e in found]
        except OSError as error:
            raise ZooError(f"{folder} cannot be read: {error.strerror}") from error

    def below(self, *parts: str) -> Disk:
        """The folder of that name as one of its own."""
        return Disk(self.root.joinpath(*parts))

    def path(self, *parts: str) -> str:
        """Where a file is."""
        return os.path.join(self.root, *parts)

    def open(self, path: str) -> IO[bytes]:
        """Open a file by what `path` gave."""
        return open(path, "rb")


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_dir():
        return "folder"
    return "file" if entry.is_file() else "other"


class Tar:
    """A tar file, its members read where they lie.

    Args:
        file: Its path.
        inside: A folder in it.

    Raises:
        ZooError: It is no tar file, or a compressed one, which has no quick way to a member.
    """

    def __init__(self, file: Path, inside: tuple[str, ...] = ()) -> None:
        self.file, self.inside = file, inside
        self._members: dict[str, tarfile.TarInfo] = {}
        self._folders: dict[str, dict[str, str]] = {"": {}}
        self._handles: dict[int, tarfile.TarFile] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    self._add(member)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ZooError(
                f"data.root={file}: expected a folder or an uncompressed .tar file ({error})"
            ) from error

    def __str__(self) -> str:
        return os.path.join(self.file, *self.inside)

    def _add(self, member: tarfile.TarInfo) -> None:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        for depth, name in enumerate(parts):
            above, here = "/".join(parts[:depth]), "/".join(parts[: depth + 1])
            if depth < len(parts) - 1 or member.isdir():
                kind = "folder"
                self._folders.setdefault(here, {})
            else:
                kind = "file" if member.isfile() else "other"
                self._members[here] = member
            self._folders.setdefault(above, {})[name] = kind

    def entries(self, *parts: str) -> list[Entry]:
        """List a folder below this one."""
        found = self._folders.get("/".join((*self.inside, *parts)), {})
        return [Entry(name, kind) for name, kind in found.items()]

    def below(self, *parts: str) -> Tar:
        """The folder of that name as one of its own."""
        other = Tar.__new__(Tar)
        other.__dict__.update(self.__dict__, inside=(*self.inside, *parts), _handles={})
        return other

    def path(self, *parts: str) -> str:
        """Where a file is."""
        return os.path.join(self.file, *self.inside, *parts)

    def open(self, path: str) -> IO[bytes]:
        """Open a file by what `path` gave."""
        name = path[len(str(self.file)) + 1 :].replace(os.sep, "/")
        # Processes that share an open file share its position, and would read each other's bytes.
        archive = self._handles.get(os.getpid())
        if archive is None:
            archive = self._handles[os.getpid()] = tarfile.open(self.file, "r:")
        opened = archive.extractfile(self._members[name])
        if opened is None:
            raise FileNotFoundError(f"{path}: no file")
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


Tree = Disk | Tar

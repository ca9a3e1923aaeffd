"""Where the files of a snapshot lie and how they are read: `Files`, and those of a folder.

A Hub repository that is not downloaded has the same face, in `hub.py`. Everything read here is untrusted.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ..format.header import Header, read_header
from ..format.untrusted import open_regular, parse_json, read_whole
from ..telling.errors import ConvertError, ResumableError

# Several times what the largest real ones have: configs with lists of labels, indices with 100,000 tensors.
_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_MAX_INDEX_BYTES = 32 * 1024 * 1024
_PIECE_BYTES = 4 * 1024 * 1024
MAX_NAME_BYTES = 255  # of one part of a path: what file systems take
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Files(Protocol):
    """Where a snapshot's files lie: a folder, or a Hub repository at one commit."""

    @property
    def label(self) -> str:
        """How errors name the snapshot."""

    @property
    def repo(self) -> str | None:
        """The Hub id, None for a folder."""

    @property
    def commit(self) -> str | None:
        """The Hub repository's commit, None for a folder."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by its path relative to the snapshot (posix). Listed once."""

    def read(self, path: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes. Raises ConvertError."""

    def pieces(self, path: str) -> Iterator[bytes]:
        """The content of a file, whatever its size, a few megabytes at a time; as many bytes as `sizes` says."""

    def header(self, path: str) -> Header:
        """The validated header of a safetensors file."""

    def local(self, path: str) -> Path | None:
        """Where the file lies on this machine, None if it is not here."""

    def sha256(self, path: str) -> str | None:
        """The digest that the file must have, where the source states one."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a snapshot on this machine.

    where: how errors name it. stat: what `file_stat` gave before its header was read.
    """

    path: Path
    where: str
    stat: tuple[int, ...]

    def check_unchanged(self) -> None:
        """Raise ResumableError if the file is no longer the one that was described."""
        if file_stat(self.path) != self.stat:
            raise ResumableError(f"{self.where} changed while it was read; run again.")


class LocalFiles:
    """A snapshot in a folder. Links may point inside it, or into the blobs of the Hub cache that it belongs to.

    digests: sha256 of files, by path, as whoever wrote the snapshot states them.
    """

    repo: str | None = None
    commit: str | None = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.label = str(root)
        self._inside = (root.resolve(), *_hub_blobs(root))
        self.digests: Mapping[str, str] = {}
        self._listed: dict[str, int] | None = None
        self._stats: dict[str, tuple[int, ...]] = {}

    def sizes(self) -> Mapping[str, int]:
        if self._listed is None:
            self._listed = self._list()
        return self._listed

    def _list(self) -> dict[str, int]:
        sizes = {}
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = sorted(f for f in subfolders if not f.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                try:
                    sizes[path.relative_to(self.root).as_posix()] = path.stat().st_size
                except OSError:  # a dangling link: reported when something needs the file
                    continue
        return sizes

    def local(self, path: str) -> Path:
        full = self.root / path
        resolved = full.resolve()
        if not any(resolved.is_relative_to(root) for root in self._inside):
            raise ConvertError(f"{path} in {self.label} links outside the snapshot; replace the link by its file.")
        return full

    def sha256(self, path: str) -> str | None:
        return self.digests.get(path)

    def read(self, path: str, limit: int) -> bytes:
        return read_whole(self.local(path), f"{path} in {self.label}", limit)

    def pieces(self, path: str) -> Iterator[bytes]:
        return file_pieces(self.local(path), f"{path} in {self.label}", self.sizes()[path])

    def header(self, path: str) -> Header:
        self.open(path)  # before the header: what is read later must be the same file
        return read_header(self.local(path), f"{path} in {self.label}")

    def open(self, path: str) -> SourceFile:
        """The file as it was when this was first asked of it, or its header read."""
        local = self.local(path)
        if path not in self._stats:
            self._stats[path] = file_stat(local)
        return SourceFile(local, path, self._stats[path])


def require_folder(path: Path) -> None:
    """Raise ConvertError unless a snapshot's folder lies at `path`."""
    if path.is_dir():
        return
    problem = f"{path} is a file" if path.exists() else f"The folder {path} does not exist"
    raise ConvertError(f"{problem}; give the folder of a snapshot on this machine.")


def read_json(files: Files, path: str) -> dict[str, Any]:
    """A JSON object from the snapshot: a config or an index. Raises ConvertError for anything else."""
    is_index = ".safetensors." in PurePosixPath(path).name
    raw = files.read(path, _MAX_INDEX_BYTES if is_index else _MAX_CONFIG_BYTES)
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{path} in {files.label} {error}; download it again.") from error
    if not isinstance(data, dict):
        raise ConvertError(f"{path} in {files.label} is not a JSON object; download it again.")
    return data


def content_sha256(files: Files, path: str) -> str:
    """sha256 of a file of the snapshot, read in pieces."""
    digest = hashlib.sha256()
    for piece in files.pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def file_pieces(path: Path, where: str, size: int) -> Iterator[bytes]:
    """A regular file's `size` bytes, a few megabytes at a time. Raises ResumableError if it has others by now."""
    left = size
    try:
        with open(open_regular(path, where), "rb", buffering=0) as file:
            while piece := file.read(min(_PIECE_BYTES, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
    except OSError as error:
        raise ResumableError(f"{where} cannot be read ({error.strerror}); check the disk and run again.") from error
    if left:
        raise ResumableError(f"{where} changed while it was read; run again.")


def file_stat(path: Path) -> tuple[int, ...]:
    """What tells, without reading it, that a file is the one seen before. Raises ResumableError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ResumableError(f"{path} cannot be opened ({error.strerror}); check the path and permissions.") from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _hub_blobs(root: Path) -> list[Path]:
    """The blobs that a Hub cache's snapshot (models--…/snapshots/COMMIT), or a folder in one, may link to."""
    whole = Path(os.path.abspath(root))
    for folder in (whole, *whole.parents):
        snapshots, repo = folder.parent, folder.parent.parent
        if snapshots.name == "snapshots" and repo.name.startswith("models--") and _COMMIT.fullmatch(folder.name):
            return [(repo / "blobs").resolve()]
    return []

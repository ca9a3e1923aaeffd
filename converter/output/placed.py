"""Writing one file whose bytes come in any order, so that it can be trusted: preallocated, synced, read back, renamed.

What `writing.FileWriter` is for bytes in order. A digest of the whole cannot grow with the bytes here, so each piece
is remembered by its place and checksum, and reading back checks all of them and makes the digest.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ..format.descriptor import allocate, drop_cached, open_descriptor, write_at
from ..telling.errors import ResumableError
from .writing import disk_errors, sync_folder, temporary_name

_READ_BYTES = 4 * 1024 * 1024
_SYNC_BYTES = 128 * 1024 * 1024  # so that little is left to write to the disk at the end


class _Piece(NamedTuple):
    start: int
    size: int
    checksum: int


class PlacedWriter:
    """Writes pieces of a temporary file beside PATH; `commit` makes it PATH. A context manager: without one nothing
    stays. Raises ResumableError where the disk is full or fails.
    """

    def __init__(self, path: Path, size: int, label: str) -> None:
        self.path, self.size, self.label = path, size, label
        self._temporary = path.with_name(temporary_name(path.name))
        self._pieces: dict[int, _Piece] = {}
        self._unsynced = 0
        self._syncs: list[Future[None]] = []
        self._syncer = ThreadPoolExecutor(1, "fp8-sync")
        with disk_errors(label):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = open_descriptor(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                if size:
                    allocate(self._fd, size)
            except BaseException:
                self.__exit__(None, None, None)
                raise

    def __enter__(self) -> PlacedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._syncer.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._temporary.unlink(missing_ok=True)

    def write(self, data: memoryview, start: int) -> None:
        """Write bytes at `start`. The same bytes may come to one place twice, others may not."""
        if not data.nbytes:
            return
        piece = _Piece(start, data.nbytes, zlib.crc32(data))
        if (before := self._pieces.setdefault(start, piece)) != piece:
            raise AssertionError(f"{self.label}: other bytes at {start} than {before.size} that were there before")
        with disk_errors(self.label):
            done = 0
            while done < data.nbytes:
                done += write_at(self._fd, data[done:], start + done)
        self._unsynced += done
        if self._unsynced >= _SYNC_BYTES:
            self._syncs.append(self._syncer.submit(os.fsync, self._fd))
            self._unsynced = 0

    def commit(self) -> str:
        """Sync the file, read it back, give it its name and sync the folder; returns its sha256."""
        pieces = sorted(self._pieces.values())
        position = 0
        for piece in pieces:
            if piece.start != position:
                raise AssertionError(f"{self.label}: the bytes from {position} on were not written once")
            position += piece.size
        if position != self.size:
            raise AssertionError(f"{self.label}: {position} bytes were written instead of {self.size}")
        with disk_errors(self.label):
            for sync in self._syncs:
                sync.result()
            os.fsync(self._fd)
            digest = self._read_back(pieces)
            os.close(self._fd)  # Windows renames no open file
            self._fd = -1
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        return digest

    def _read_back(self, pieces: Sequence[_Piece]) -> str:
        """Read the file from the disk, compare every piece with what was written, and return the whole's sha256."""
        drop_cached(self._fd, 0, self.size)
        digest = hashlib.sha256()
        with open(self._temporary, "rb", buffering=_READ_BYTES) as file:
            for piece in pieces:
                checksum, left = 0, piece.size
                while left and (data := file.read(min(left, _READ_BYTES))):
                    digest.update(data)
                    checksum = zlib.crc32(data, checksum)
                    left -= len(data)
                if checksum != piece.checksum:
                    raise ResumableError(f"{self.label} reads back other bytes than were written; check the disk.")
        drop_cached(self._fd, 0, self.size)
        return digest.hexdigest()

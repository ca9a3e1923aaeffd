"""Writing one output file so that it can be trusted: preallocated, hashed, synced, read back if wanted, then renamed.

Bytes are appended. Background threads write and hash them in pieces of STAGING_BYTES, past the page cache where the
file system allows it (O_DIRECT), so that a conversion neither waits for write-back nor evicts what others cached.
Another one syncs, and reads back, every CHECK_BYTES behind them, so that little is left to do at the end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from ..format.descriptor import SECTOR, allocate, drop_cached, open_descriptor, read_at, set_direct, write_at
from ..format.untrusted import open_regular
from ..telling.errors import ResumableError

STAGING_BYTES = 8 * 1024 * 1024
CHECK_BYTES = 128 * 1024 * 1024
_READ_BYTES = 4 * 1024 * 1024


class FileWriter:
    """Appends to a temporary file beside PATH; `commit` makes it PATH. A context manager: without one nothing stays.

    read_back: whether to read everything from the disk again and compare. Raises ResumableError where the disk is full
    or fails.
    """

    def __init__(self, path: Path, size: int, label: str, *, read_back: bool = False) -> None:
        self.path, self.size, self.label = path, size, label
        self._temporary = path.with_name(temporary_name(path.name))
        self._hash = hashlib.sha256()
        self._position = 0  # of the next piece in the file
        self._fill = 0
        self._staging = [_aligned(STAGING_BYTES), _aligned(STAGING_BYTES)]
        self._under_way: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, "fp8-write")
        self._hasher = ThreadPoolExecutor(1, "fp8-hash")
        self._checker = ThreadPoolExecutor(1, "fp8-check")
        self._checks: list[Future[None]] = []
        self._checked = 0
        self._fd = self._check_fd = -1
        self._read_back: _ReadBack | None = None
        with self._translated():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = open_descriptor(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            with self._translated():
                if self.size:
                    allocate(self._fd, self.size)
                    set_direct(self._fd, True)
                if read_back:
                    self._check_fd = open_descriptor(self._temporary, os.O_RDONLY)  # with its own O_DIRECT flag
                    self._read_back = _ReadBack(self._check_fd)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for executor in (self._executor, self._hasher, self._checker):
            executor.shutdown(wait=True, cancel_futures=True)
        self._close()
        self._temporary.unlink(missing_ok=True)
        self._staging.clear()

    def append(self, data: memoryview) -> None:
        """Append bytes; they are copied before this returns."""
        if not data:
            return
        done, source = 0, np.frombuffer(data, np.uint8)
        while done < len(data):
            take = min(STAGING_BYTES - self._fill, len(data) - done)
            # By numpy, which lets other threads run meanwhile.
            np.copyto(self._staging[0][self._fill : self._fill + take], source[done : done + take])
            self._fill += take
            done += take
            if self._fill == STAGING_BYTES:
                self._flush()

    def commit(self) -> str:
        """Sync the file, read it back if wanted, give it its name and sync the folder; returns its sha256."""
        self._flush()
        self._wait()
        digest = self._hash.hexdigest()
        if self._position != self.size:
            raise AssertionError(f"{self.label}: {self._position} bytes were written instead of {self.size}")
        with self._translated():
            for check in self._checks:
                check.result()
            self._check(self.size)
            if self._read_back is not None and self._read_back.digest.hexdigest() != digest:
                raise ResumableError(f"{self.label} reads back other bytes than were written; check the disk.")
            self._close()  # Windows renames no open file
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        return digest

    def _close(self) -> None:
        fds, self._fd, self._check_fd = (self._fd, self._check_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _flush(self) -> None:
        """Hand the filled staging buffer to the writing thread, after the one before it was written."""
        self._wait()
        if self._position >= (len(self._checks) + 1) * CHECK_BYTES:
            self._checks.append(self._checker.submit(self._check, self._position))
        if self._fill:
            self._under_way = self._executor.submit(self._write, self._staging[0], self._fill, self._position)
            self._position += self._fill
            self._fill = 0
            self._staging.reverse()

    def _wait(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            with self._translated():
                under_way.result()

    def _write(self, staging: np.ndarray, length: int, position: int) -> None:
        data = staging.data[:length]
        hashed = self._hasher.submit(self._hash.update, data)  # while the disk writes
        try:
            self._write_out(data, position)
        finally:
            hashed.result()

    def _write_out(self, data: memoryview, position: int) -> None:
        if len(data) % SECTOR:
            set_direct(self._fd, False)  # the last piece: direct writes come in whole sectors
        done = 0
        while done < len(data):
            try:
                done += write_at(self._fd, data[done:], position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not set_direct(self._fd, False):
                    raise

    def _check(self, stop: int) -> None:
        """Make the file safe on the disk up to `stop`, and read it back so far."""
        os.fsync(self._fd)
        if self._read_back is not None:
            self._read_back.read_to(stop)
        else:
            drop_cached(self._fd, self._checked, stop)
        self._checked = stop

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        return disk_errors(self.label)


def _aligned(size: int) -> np.ndarray:
    """Memory as direct writes need it: uint8 [size], at a page's begin."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


@contextlib.contextmanager
def disk_errors(label: str) -> Iterator[None]:
    """Turn errors of writing `label` into a ResumableError."""
    try:
        yield
    except OSError as error:
        raise ResumableError(
            f"{label} cannot be written ({error.strerror}); free some space or check the disk, then run the same "
            "command again to resume."
        ) from error


class _ReadBack:
    """sha256 of an open file's bytes as far as they were read, past the page cache where that is possible."""

    def __init__(self, fd: int) -> None:
        self.digest = hashlib.sha256()
        self._fd = fd
        self._position = 0
        set_direct(fd, True)

    def read_to(self, stop: int) -> None:
        """Go on to byte `stop`: a multiple of a sector, or the file's size. Stops early at the file's end."""
        start = self._position
        drop_cached(self._fd, start, stop)
        reading, hashing = (memoryview(mmap.mmap(-1, _READ_BYTES)) for _ in range(2))  # aligned, for direct reads
        hashed: Future[None] | None = None
        with ThreadPoolExecutor(1, "fp8-hash") as hasher:
            while self._position < stop and (count := self._read(reading, stop)):
                if hashed is not None:
                    hashed.result()  # before the next read goes into its buffer
                hashed = hasher.submit(self.digest.update, reading[:count])
                reading, hashing = hashing, reading
                self._position += count
        drop_cached(self._fd, start, stop)

    def _read(self, view: memoryview, stop: int) -> int:
        wanted = -(-(stop - self._position) // SECTOR) * SECTOR  # direct reads come in whole sectors
        while True:
            try:
                return read_at(self._fd, view[:wanted], self._position)
            except OSError as error:
                if error.errno != errno.EINVAL or not set_direct(self._fd, False):
                    raise


def sha256_at(path: Path, where: str) -> str:
    """sha256 of the regular file at `path`, which errors call `where`. Raises ConvertError."""
    fd = open_regular(path, where)
    try:
        return file_sha256(fd)
    finally:
        os.close(fd)


def file_sha256(fd: int) -> str:
    """sha256 of an open file, read past the page cache where that is possible."""
    whole = _ReadBack(fd)
    whole.read_to(os.fstat(fd).st_size)
    return whole.digest.hexdigest()


def write_pieces(
    path: Path, size: int, pieces: Iterable[bytes | memoryview], label: str, *, read_back: bool = False
) -> str:
    """Write a file of `size` bytes that come in pieces, in bounded memory; returns its sha256.

    Raises ResumableError where the pieces are more or fewer bytes, and where the disk fails.
    """
    with FileWriter(path, size, label, read_back=read_back) as writer:
        left = size
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise ResumableError(f"{label} became longer than its {size} bytes while it was read; run again.")
            writer.append(memoryview(piece))
        if left:
            raise ResumableError(f"{label} gave {size - left} bytes instead of {size}; check its source and run again.")
        return writer.commit()


def write_small(path: Path, data: bytes, label: str, *, read_back: bool = False) -> str:
    """Write a small file with the same care as a shard; returns its sha256."""
    return write_pieces(path, len(data), [data], label, read_back=read_back)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some file systems sync none
        fd = open_descriptor(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def temporary_name(name: str) -> str:
    """What a file is called until it is committed.

    Short, since a name may be as long as the file system allows, and another file's for no other name.
    """
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.tmp"

"""Writing one output file so that it can be trusted: preallocated, hashed, synced, read back, then renamed.

Bytes are appended. A background thread hashes and writes them in pieces of STAGING_BYTES, past the page cache
where the file system allows it (O_DIRECT), so that a conversion neither waits for write-back nor evicts what others
cached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from .errors import ConvertError, ResumableError

STAGING_BYTES = 8 * 1024 * 1024
_SECTOR = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class FileWriter:
    """Appends to PATH.tmp; `commit` makes it PATH. A context manager: without a commit nothing stays.

    Raises ResumableError where the disk is full or fails.
    """

    def __init__(self, path: Path, size: int, label: str) -> None:
        self.path, self.size, self.label = path, size, label
        self._temporary = path.with_name(path.name + ".tmp")
        self._hash = hashlib.sha256()
        self._position = 0  # of the next piece in the file
        self._fill = 0
        self._staging = [mmap.mmap(-1, STAGING_BYTES), mmap.mmap(-1, STAGING_BYTES)]
        self._under_way: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, "fp8-write")
        with self._translated():
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
            self._fd = os.open(self._temporary, flags, 0o666)
        try:
            with self._translated():
                self._allocate()
        except ConvertError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._temporary.unlink(missing_ok=True)
        for staging in self._staging:
            with contextlib.suppress(BufferError):  # an exception's traceback may still hold a view
                staging.close()

    def append(self, data: memoryview) -> None:
        """Append bytes; they are copied before this returns."""
        done = 0
        while done < len(data):
            take = min(STAGING_BYTES - self._fill, len(data) - done)
            self._staging[0][self._fill : self._fill + take] = data[done : done + take]
            self._fill += take
            done += take
            if self._fill == STAGING_BYTES:
                self._flush()

    def commit(self) -> str:
        """Sync the file, read it back, give it its name and sync the folder; returns its sha256."""
        self._flush()
        self._wait()
        digest = self._hash.hexdigest()
        if self._position != self.size:
            raise AssertionError(f"{self.label}: {self._position} bytes were written instead of {self.size}")
        with self._translated():
            os.fsync(self._fd)
            if file_sha256(self._fd) != digest:
                raise ResumableError(f"{self.label} reads back other bytes than were written; check the disk.")
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        return digest

    def _allocate(self) -> None:
        if not self.size:
            return
        try:
            os.posix_fallocate(self._fd, 0, self.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(self._fd, self.size)
        _set_direct(self._fd, True)

    def _flush(self) -> None:
        """Hand the filled staging buffer to the writing thread, after the one before it was written."""
        self._wait()
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

    def _write(self, staging: mmap.mmap, length: int, position: int) -> None:
        with memoryview(staging) as view, view[:length] as data:
            self._hash.update(data)
            if length % _SECTOR:
                _set_direct(self._fd, False)  # the last piece: direct writes come in whole sectors
            done = 0
            while done < length:
                try:
                    done += os.pwrite(self._fd, data[done:], position + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not _set_direct(self._fd, False):
                        raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResumableError(
                f"{self.label} cannot be written ({error.strerror}); make room or mend the disk and run the same "
                "command again to resume."
            ) from error


def file_sha256(fd: int) -> str:
    """sha256 of an open file, read past the page cache where that is possible."""
    digest = hashlib.sha256()
    _set_direct(fd, True)
    size = os.fstat(fd).st_size
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with mmap.mmap(-1, STAGING_BYTES) as buffer, memoryview(buffer) as view:
        position = 0
        while position < size:
            try:
                count = os.preadv(fd, [view], position)
            except OSError as error:
                if error.errno != errno.EINVAL or not _set_direct(fd, False):
                    raise
                continue
            if count == 0:
                break
            digest.update(view[:count])
            position += count
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def write_small(path: Path, data: bytes, label: str) -> str:
    """Write a small file with the same care as a shard; returns its sha256."""
    with FileWriter(path, len(data), label) as writer:
        writer.append(memoryview(data))
        return writer.commit()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the file system allows it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def _set_direct(fd: int, on: bool) -> bool:
    """Switch O_DIRECT; returns whether the flag changed."""
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | _O_DIRECT if on else flags & ~_O_DIRECT
    if wanted == flags:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return True

"""File descriptors alike on every system: opening them, reading and writing at an offset, past the page cache or not.

Linux has a call for each of these; what macOS or Windows lack is done by other means here, with the same result.
"""

from __future__ import annotations

import errno
import io
import os
import threading

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SECTOR = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0) if fcntl is not None else 0
_INHERITED_BY_NONE = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
_AT_ONCE = 1 << 30  # macOS refuses 2 GiB and more in one call
_COPIED_AT_ONCE = 8 * 1024 * 1024  # where a read goes through memory of its own
# One descriptor has one position: without positional calls, threads that share it take turns.
_TURNS = [threading.Lock() for _ in range(64)]


def open_descriptor(path: os.PathLike[str], flags: int) -> int:
    """`os.open` for bytes: no translation of line ends, no inheritance by child processes. Raises OSError."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0) | _INHERITED_BY_NONE, 0o666)


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read into `view` from the file's `offset`, in any thread; returns how many bytes came, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view[:_AT_ONCE]], offset)
    if hasattr(os, "pread"):
        data = os.pread(fd, min(len(view), _COPIED_AT_ONCE), offset)
        view[: len(data)] = data
        return len(data)
    with _TURNS[fd % len(_TURNS)]:
        os.lseek(fd, offset, os.SEEK_SET)
        with io.FileIO(fd, "rb", closefd=False) as file:
            return file.readinto(view[:_AT_ONCE]) or 0


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write `data` at the file's `offset`, in any thread; returns how many bytes were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _TURNS[fd % len(_TURNS)]:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def allocate(fd: int, size: int) -> None:
    """Give the file its size, with room on the disk for all of it where the file system can promise that."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    return os.ftruncate(fd, size)


def set_direct(fd: int, on: bool) -> bool:
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


def drop_cached(fd: int, start: int, stop: int) -> None:
    """Drop what the page cache holds of the bytes [start, stop)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)

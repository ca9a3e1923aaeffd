"""Output files: whole or absent, hashed, of the umask's mode, and clear about a disk that is full."""

import contextlib
import errno
import hashlib
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp8_convert.converter.output import writing
from fp8_convert.converter.output.writing import FileWriter, file_sha256, write_pieces, write_small
from fp8_convert.converter.telling.errors import ResumableError

S = writing.STAGING_BYTES
REAL_SHA256 = hashlib.sha256
SIZES = [0, 1, 4095, 4096, 4097, S - 1, S, S + 1, 2 * S + 5000]


def content(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def write(path: Path, data: bytes, piece: int, size: int | None = None, read_back: bool = True) -> str:
    with FileWriter(path, len(data) if size is None else size, "shard", read_back=read_back) as writer:
        for start in range(0, len(data), piece):
            writer.append(memoryview(data)[start : start + piece])
        return writer.commit()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [S // 3 + 1, 3 * S])
def test_any_size_in_any_pieces(tmp_path: Path, size: int, piece: int) -> None:
    data = content(size)
    assert write(tmp_path / "x", data, piece) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_appended_bytes_are_copied(tmp_path: Path) -> None:
    data = bytearray(b"abc")
    with FileWriter(tmp_path / "x", 6, "x") as writer:
        writer.append(memoryview(data))
        data[:] = b"def"
        writer.append(memoryview(data))
        writer.commit()
    assert (tmp_path / "x").read_bytes() == b"abcdef"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "😀" * 63])
def test_names_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    write_small(tmp_path / name, b"1", "x")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_of_one_folder_are_written_at_the_same_time(tmp_path: Path) -> None:
    """Even where one has the other's name with what a temporary file's might end in."""
    names = ["x", "x.tmp", ".x.tmp", "x" * 250 + "a", "x" * 250 + "b"]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(FileWriter(tmp_path / name, len(name), name)) for name in names]
        for name, writer in zip(names, writers, strict=True):
            writer.append(memoryview(name.encode()))
        for writer in writers:
            writer.commit()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: name for name in names}


def test_a_file_is_closed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows renames no file that is open."""
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and alive(fd)]
        assert str(source) not in opened
        real(source, target)

    def alive(fd: str) -> bool:
        return os.path.lexists(f"/proc/self/fd/{fd}")

    monkeypatch.setattr(os, "replace", replace)
    write_small(tmp_path / "x", b"1", "x")
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.parametrize("size", SIZES)
def test_pieces_of_any_size(tmp_path: Path, size: int) -> None:
    data = content(size)
    pieces = (data[i : i + 1_000_003] for i in range(0, size, 1_000_003))
    assert write_pieces(tmp_path / "x", size, pieces, "x") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([], "gave 0 bytes instead of 5"),
        ([b"12", b"34"], "gave 4 bytes instead of 5"),
        ([b"123", b"456", b"789"], "became longer than its 5 bytes while it was read"),
    ],
)
def test_pieces_of_another_length(tmp_path: Path, pieces: list[bytes], says: str) -> None:
    taken = iter(pieces)
    with pytest.raises(ResumableError, match=rf"LICENSE {says}; .*run again\."):
        write_pieces(tmp_path / "x", 5, taken, "LICENSE")
    assert list(tmp_path.iterdir()) == []
    assert list(taken) == pieces[2:]  # nothing is taken beyond what is too much


def test_folders_are_created_and_files_replaced(tmp_path: Path) -> None:
    write_small(tmp_path / "a" / "b" / "x", b"old", "x")
    assert write_small(tmp_path / "a" / "b" / "x", b"new", "x") == hashlib.sha256(b"new").hexdigest()
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_honour_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_small(tmp_path / "x", b"1", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_nothing_stays_without_a_commit(tmp_path: Path) -> None:
    with FileWriter(tmp_path / "x", 10, "x") as writer:
        writer.append(memoryview(b"12345"))
    with pytest.raises(TypeError):
        write(tmp_path / "x", ["no bytes"], 10)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_without_a_commit(tmp_path: Path) -> None:
    write_small(tmp_path / "x", b"old", "x")
    with FileWriter(tmp_path / "x", 3, "x") as writer:
        writer.append(memoryview(b"new"))
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("size", [4, 6])
def test_a_wrong_size_is_a_bug_and_shows(tmp_path: Path, size: int) -> None:
    with pytest.raises(AssertionError, match="shard: 5 bytes were written instead of"):
        write(tmp_path / "x", b"12345", 5, size)
    assert list(tmp_path.iterdir()) == []


def failing(real: Callable[..., Any], number: int, code: int) -> Callable[..., Any]:
    """`real`, failing at its `number`th call."""
    calls = iter(range(1, 1_000_000))

    def call(*arguments: Any) -> Any:
        if next(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    return call


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("pwrite", 1, errno.ENOSPC),
        ("pwrite", 3, errno.ENOSPC),
        ("pwrite", 2, errno.EIO),
        ("posix_fallocate", 1, errno.ENOSPC),
        ("fsync", 1, errno.EIO),
        ("replace", 1, errno.EACCES),
    ],
)
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: int) -> None:
    monkeypatch.setattr(os, name, failing(getattr(os, name), number, code))
    with pytest.raises(ResumableError, match=r"shard cannot be written \(.*\); free some space or check the disk"):
        write(tmp_path / "x", content(3 * S), S)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResumableError, match="shard cannot be written"):
        FileWriter(tmp_path / "file" / "x", 1, "shard")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_that_cannot_preallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(os.posix_fallocate, 1, code))
    assert write(tmp_path / "x", content(5000), 999) == hashlib.sha256(content(5000)).hexdigest()
    assert (tmp_path / "x").read_bytes() == content(5000)


def test_file_systems_that_refuse_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some take the flag and fail at the write: it is dropped and the write done again."""
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, 1, errno.EINVAL))
    data = content(2 * S + 100)
    assert write(tmp_path / "x", data, S) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data


def test_bytes_that_read_back_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def flipping(fd: int, data: memoryview, offset: int) -> int:
        bad = mmap.mmap(-1, len(data))  # aligned, as direct writes need it
        bad[:] = data.tobytes()
        bad[len(bad) // 2] ^= 1
        return real(fd, bad, offset)

    monkeypatch.setattr(os, "pwrite", flipping)
    with pytest.raises(ResumableError, match="reads back other bytes than were written"):
        write(tmp_path / "x", content(5000), 5000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("read_back", [False, True])
def test_reading_back_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, read_back: bool) -> None:
    read = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: (read.append(real(*a)), read[-1])[1])
    assert write(tmp_path / "x", content(size), S, read_back=read_back) == hashlib.sha256(content(size)).hexdigest()
    assert sum(read) == (size if read_back else 0)
    assert (tmp_path / "x").read_bytes() == content(size)


@pytest.mark.parametrize("size", SIZES)
def test_file_sha256(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(content(size))
    with open(tmp_path / "x", "rb") as file:
        assert file_sha256(file.fileno()) == hashlib.sha256(content(size)).hexdigest()


class SlowHash:
    """sha256 that falls behind the disk: what it has not yet taken must not be overwritten."""

    def __init__(self, data: bytes = b"") -> None:
        self._real = REAL_SHA256(data)

    def update(self, data: memoryview) -> None:
        time.sleep(0.03)
        self._real.update(data)

    def hexdigest(self) -> str:
        return self._real.hexdigest()


def test_a_hash_slower_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(3 * S + 999)
    monkeypatch.setattr("fp8_convert.converter.output.writing.hashlib.sha256", SlowHash)
    assert write(tmp_path / "x", data, S // 2) == REAL_SHA256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data

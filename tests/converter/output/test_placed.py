"""A file that is written in any order is the file, and what is wrong with it is found before it has its name."""

from __future__ import annotations

import hashlib
import itertools
import random
from pathlib import Path

import pytest

from fp8_convert.converter.output.placed import PlacedWriter
from fp8_convert.converter.telling.errors import ResumableError

DATA = random.Random(0).randbytes(10_000)
CUTS = (0, 1, 4096, 4097, 9_999, 10_000)


def pieces() -> list[tuple[int, bytes]]:
    return [(start, DATA[start:stop]) for start, stop in itertools.pairwise(CUTS)]


def test_any_order_gives_the_file(tmp_path: Path) -> None:
    for seed in range(3):
        shuffled = random.Random(seed).sample(pieces(), len(pieces()))
        path = tmp_path / f"{seed}" / "file"
        with PlacedWriter(path, len(DATA), "file") as writer:
            for start, data in shuffled:
                writer.write(memoryview(data), start)
            digest = writer.commit()
        assert path.read_bytes() == DATA
        assert digest == hashlib.sha256(DATA).hexdigest()
        assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_same_bytes_may_come_twice_and_others_may_not(tmp_path: Path) -> None:
    with PlacedWriter(tmp_path / "file", 4, "file") as writer:
        writer.write(memoryview(b"same"), 0)
        writer.write(memoryview(b"same"), 0)
        with pytest.raises(AssertionError, match="other bytes at 0"):
            writer.write(memoryview(b"else"), 0)
        writer.commit()
    assert (tmp_path / "file").read_bytes() == b"same"


@pytest.mark.parametrize("left_out", range(len(CUTS) - 1))
def test_what_was_not_written_is_found(tmp_path: Path, left_out: int) -> None:
    with PlacedWriter(tmp_path / "file", len(DATA), "file") as writer:
        for number, (start, data) in enumerate(pieces()):
            if number != left_out:
                writer.write(memoryview(data), start)
        with pytest.raises(AssertionError, match="written"):
            writer.commit()
    assert [*tmp_path.iterdir()] == []


def test_overlapping_pieces_are_found(tmp_path: Path) -> None:
    with PlacedWriter(tmp_path / "file", 4, "file") as writer:
        writer.write(memoryview(b"abc"), 0)
        writer.write(memoryview(b"bcd"), 1)
        with pytest.raises(AssertionError, match="written once"):
            writer.commit()


def test_bytes_that_read_back_otherwise_are_found(tmp_path: Path) -> None:
    with PlacedWriter(tmp_path / "file", len(DATA), "file") as writer:
        for start, data in pieces():
            writer.write(memoryview(data), start)
        (temporary,) = tmp_path.iterdir()
        with temporary.open("r+b") as file:
            file.seek(5000)
            file.write(bytes([DATA[5000] ^ 1]))
        with pytest.raises(ResumableError, match="reads back other bytes"):
            writer.commit()
    assert [*tmp_path.iterdir()] == []


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResumableError, match="the file cannot be written"):
        PlacedWriter(tmp_path / "file", 1 << 62, "the file")
    assert [*tmp_path.iterdir()] == []

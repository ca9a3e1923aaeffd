"""Reading spans ahead into a bounded pool: the right bytes, in order, hashed in file order, errors named."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fp8_convert.converter.stream.reading import BufferPool, SpanReader, open_for_reading, read_exactly
from fp8_convert.converter.telling.errors import ConvertError

CONTENT = bytes(i * 7 % 251 for i in range(1000))
SPANS = [(i, min(i + 64, 1000)) for i in range(0, 1000, 64)]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    fd = open_for_reading(path, "x")
    yield fd
    os.close(fd)


def pool_of(count: int) -> BufferPool:
    return BufferPool(64, count)


def count_free(pool: BufferPool) -> int:
    taken = []
    while (buffer := pool.take()) is not None:
        taken.append(buffer)
    for buffer in taken:
        pool.give_back(buffer)
    return len(taken)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("slots", [1, 3, 100])
def test_spans_come_in_order(fd: int, slots: int, threads: int) -> None:
    pool = pool_of(slots)
    got = []
    with closing(SpanReader(fd, SPANS, pool, where="x", threads=threads)) as reader:
        for _ in SPANS:
            assert not reader.done()
            span = reader.next()
            got.append(bytes(span.data.numpy()))
            span.release()
        assert reader.done()
        assert not reader.waiting()
    assert got == [CONTENT[a:b] for a, b in SPANS]
    assert count_free(pool) == slots


def test_the_hash_sees_the_bytes_in_file_order(fd: int) -> None:
    hasher = hashlib.sha256()
    with closing(SpanReader(fd, SPANS, pool_of(5), where="x", hasher=hasher, threads=4)) as reader:
        for _ in SPANS:
            reader.next().release()
    assert hasher.digest() == hashlib.sha256(CONTENT).digest()


def test_a_held_span_keeps_its_bytes(fd: int) -> None:
    """Two buffers, one of them held: everything else goes through the other."""
    with closing(SpanReader(fd, SPANS, pool_of(2), where="x")) as reader:
        first = reader.next()
        first.hold()
        first.release()
        for a, b in SPANS[1:]:
            span = reader.next()
            assert bytes(span.data.numpy()) == CONTENT[a:b]
            span.release()
        assert bytes(first.data.numpy()) == CONTENT[:64]
        first.release()


def test_reading_stops_while_all_buffers_are_held(fd: int) -> None:
    with closing(SpanReader(fd, SPANS, pool_of(2), where="x")) as reader:
        spans = [reader.next(), reader.next()]
        assert not reader.waiting()
        assert not reader.ready()
        spans[0].release()
        assert reader.waiting()


def test_spans_in_any_order(fd: int) -> None:
    spans = [(500, 510), (0, 64), (990, 1000)]
    with closing(SpanReader(fd, spans, pool_of(3), where="x", threads=2)) as reader:
        assert [bytes(reader.next().data.numpy()) for _ in spans] == [CONTENT[a:b] for a, b in spans]


def test_closing_early_gives_the_buffers_back(fd: int) -> None:
    pool = pool_of(4)
    reader = SpanReader(fd, SPANS, pool, where="x")
    reader.next().release()
    reader.close()
    assert count_free(pool) == 4


def test_a_file_that_became_shorter(fd: int) -> None:
    with closing(SpanReader(fd, [(0, 64), (980, 1010)], pool_of(3), where="x.safetensors")) as reader:
        reader.next().release()
        with pytest.raises(ConvertError, match=r"x\.safetensors became shorter while it was read"):
            reader.next()


def test_a_read_error(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(ConvertError, match=r"x cannot be read \(.*directory\); check the disk"):
            read_exactly(folder, memoryview(bytearray(1)), 0, "x")
    finally:
        os.close(folder)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="x cannot be opened"):
        open_for_reading(tmp_path / "missing", "x")


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    paths = {"folder": tmp_path, "fifo": tmp_path / "fifo", "device": Path("/dev/zero")}
    os.mkfifo(paths["fifo"])
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        ConvertError, match=rf"x is a {'FIFO' if kind == 'fifo' else kind} instead of a file; replace it"
    ):
        open_for_reading(paths[kind], "x")
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_pool_reuses_its_buffers() -> None:
    pool = pool_of(2)
    a, b = pool.take(), pool.take()
    assert a is not None
    assert b is not None
    assert pool.take() is None
    pool.give_back(a)
    assert pool.take() is a
    pool.give_back(a)
    pool.give_back(b)
    following = BufferPool(64, 3, spare=pool.free)
    buffers = [following.take() for _ in range(4)]
    assert {id(buffer) for buffer in buffers} >= {id(a), id(b)}
    assert [buffer is None for buffer in buffers] == [False, False, False, True]


def test_a_pool_takes_no_more_spare_buffers_than_it_may_have() -> None:
    pool = BufferPool(64, 1, spare=[torch.empty(64, dtype=torch.uint8) for _ in range(3)])
    assert len(pool.free) == 1
    assert pool.take() is not None
    assert pool.take() is None

"""Reading spans of a file, ahead of their use, into a bounded set of reused buffers.

Spans are delivered in the order asked for. A hash object is fed in that order too, by a thread of its own: hashing
is the slowest of all steps that cannot be shared out. What was read is dropped from the page cache behind, except
where it is read again.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from ..format.descriptor import drop_cached, read_at
from ..format.untrusted import open_regular
from ..telling.errors import ResumableError


class Hasher(Protocol):
    """A hashlib object."""

    def update(self, data: memoryview, /) -> None: ...


class BufferPool:
    """At most `count` buffers of `slot_bytes` bytes each: those of `spare`, and new ones when first needed."""

    def __init__(
        self, slot_bytes: int, count: int, *, spare: Iterable[torch.Tensor] = (), pinned: bool = False
    ) -> None:
        self.free = list(itertools.islice(spare, count))
        self._slot_bytes, self._left, self._pinned = slot_bytes, count - len(self.free), pinned

    def take(self) -> torch.Tensor | None:
        """A uint8 [slot_bytes] buffer, or None while all are in use."""
        if self.free:
            return self.free.pop()
        if not self._left:
            return None
        self._left -= 1
        return torch.empty(self._slot_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)

    def give_back(self, buffer: torch.Tensor) -> None:
        self.free.append(buffer)


class Span:
    """Bytes that were read. `data` (uint8 [n]) is valid until every holder has released the span."""

    def __init__(self, data: torch.Tensor, buffer: torch.Tensor, reader: SpanReader) -> None:
        self.data = data
        self._buffer = buffer
        self._reader = reader
        self._holders = 1

    def hold(self) -> Span:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._reader.recycle(self._buffer)


class SpanReader:
    """Reads file spans [(start, stop), …] ahead. To be used by one thread, and closed."""

    def __init__(
        self,
        fd: int,
        spans: Sequence[tuple[int, int]],
        pool: BufferPool,
        *,
        where: str,
        hasher: Hasher | None = None,
        threads: int = 1,
        drop_behind: bool = True,
    ) -> None:
        self._fd, self._spans, self._pool, self._where = fd, spans, pool, where
        self._hasher, self._drop_behind = hasher, drop_behind
        self._next = 0
        self._reads: deque[tuple[Future[torch.Tensor], torch.Tensor]] = deque()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="fp8-read")
        self._hashing = ThreadPoolExecutor(1, "fp8-hash")
        self.read_on()

    def done(self) -> bool:
        """Whether every span has been handed out."""
        return not self._reads and self._next == len(self._spans)

    def ready(self) -> bool:
        """Whether `next` would return without waiting."""
        return bool(self._reads) and self._reads[0][0].done()

    def waiting(self) -> bool:
        """Whether a read is under way; False while every buffer is in use."""
        return bool(self._reads)

    def next(self) -> Span:
        """The next span, waiting for it."""
        future, buffer = self._reads.popleft()
        return Span(future.result(), buffer, self)

    def recycle(self, buffer: torch.Tensor) -> None:
        self._pool.give_back(buffer)
        self.read_on()

    def close(self) -> None:
        """Stop reading and wait until no thread writes into a buffer any more."""
        self._next = len(self._spans)
        for executor in (self._executor, self._hashing):
            executor.shutdown(wait=True, cancel_futures=True)
        for _, buffer in self._reads:
            self._pool.give_back(buffer)
        self._reads.clear()

    def begun(self) -> bool:
        """Whether the reads of all spans have begun."""
        return self._next == len(self._spans)

    def read_on(self) -> None:
        """Begin reads into the buffers that are free; called where another reader of the pool gave some back."""
        while self._next < len(self._spans) and (buffer := self._pool.take()) is not None:
            span = self._spans[self._next]
            read = self._executor.submit(self._read, span, buffer)
            if self._hasher is not None:
                read = self._hashing.submit(self._hash, read, self._hasher)
            self._reads.append((read, buffer))
            self._next += 1

    def _read(self, span: tuple[int, int], buffer: torch.Tensor) -> torch.Tensor:
        start, stop = span
        data = buffer[: stop - start]
        view = memoryview(data.numpy().data)
        read_exactly(self._fd, view, start, self._where)
        if self._drop_behind:
            # From the file's start: pages come in large folios, and one that reached into this span was not dropped.
            drop_cached(self._fd, 0, stop)
        return data

    def _hash(self, read: Future[torch.Tensor], hasher: Hasher) -> torch.Tensor:
        data = read.result()
        hasher.update(memoryview(data.numpy().data))
        return data


def read_exactly(fd: int, view: memoryview, offset: int, where: str) -> None:
    """Fill `view` from the file's `offset`. Raises ResumableError at an early end or a read error."""
    done = 0
    while done < len(view):
        try:
            count = read_at(fd, view[done:], offset + done)
        except OSError as error:
            raise ResumableError(f"{where} cannot be read ({error.strerror}); check the disk and run again.") from error
        if count == 0:
            raise ResumableError(f"{where} became shorter while it was read; check the source and run again.")
        done += count


def open_for_reading(path: os.PathLike[str], where: str) -> int:
    """A descriptor of a regular file for front-to-back reading. Raises ConvertError."""
    fd = open_regular(path, where)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd

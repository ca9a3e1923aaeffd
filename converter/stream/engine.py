"""What conversions share: the device that computes, the threads that compute for it on the CPU, and the buffers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from ..plan.schedule import MEMORY
from .reading import BufferPool

T = TypeVar("T")

_SHARE_BYTES = 128 * 1024 * 1024  # of buffers for each shard more; Qwen-Image's DiT, at its largest weight, needs 144


class Engine:
    """A context manager. device: where the arithmetic runs. workers: threads for it on the CPU, whatever the number of
    shards. readers: threads that read a shard. shards: how many may be under way at the same time.
    """

    def __init__(self, device: torch.device | str = "cpu", workers: int = 2, readers: int = 1, shards: int = 1) -> None:
        self.device = torch.device(device)
        self.readers = readers
        self.shards = shards
        self._executor = ThreadPoolExecutor(workers, "fp8-quantize") if self.device.type == "cpu" else None
        self._threads = torch.get_num_threads()
        self._budget = MEMORY.pool_bytes + (shards - 1) * _SHARE_BYTES
        self._taken = 0
        self._spare: list[torch.Tensor] = []  # buffers of one size that nobody uses
        self._given_back = threading.Condition()

    def __enter__(self) -> Engine:
        if self._executor is not None:
            torch.set_num_threads(1)  # OpenMP over small chunks collapses under load; our own threads scale
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Run a task in a worker; on CUDA at once, since kernels queue up by themselves."""
        if self._executor is not None:
            return self._executor.submit(task)
        future: Future[T] = Future()
        future.set_result(task())
        return future

    @contextlib.contextmanager
    def pool(self, slot_bytes: int, least: int, most: int) -> Iterator[BufferPool]:
        """Buffers of `slot_bytes` for one shard, to be given back by then; waits until there is memory for them.

        least: how many the shard cannot do without. most: how many it gets where it is alone; with others under way it
        gets its share. All that are taken stay within one budget, but for a shard that alone needs more.
        """
        count = most if self.shards == 1 else min(most, max(least, _SHARE_BYTES // slot_bytes))
        with self._given_back:
            self._given_back.wait_for(lambda: not self._taken or self._taken + slot_bytes * count <= self._budget)
            self._taken += slot_bytes * count
            self._drop_spare_but(slot_bytes)
            pool = BufferPool(slot_bytes, count, spare=self._spare, pinned=self.device.type == "cuda")
            del self._spare[: len(pool.free)]
        try:
            yield pool
            with self._given_back:  # not after an error: some of its buffers may be in use
                self._drop_spare_but(slot_bytes)
                self._spare += pool.free
        finally:
            with self._given_back:
                self._taken -= slot_bytes * count
                self._given_back.notify_all()

    def _drop_spare_but(self, slot_bytes: int) -> None:
        """Free the memory of spare buffers of another size."""
        self._spare = [buffer for buffer in self._spare if buffer.numel() == slot_bytes]

"""What conversions share: the device that computes, the threads that compute for it on the CPU, and the buffers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from .reading import BufferPool

T = TypeVar("T")


class Engine:
    """A context manager. device: where the arithmetic runs. workers: threads for it on the CPU. readers: threads that
    read.
    """

    def __init__(self, device: torch.device | str = "cpu", workers: int = 2, readers: int = 1) -> None:
        self.device = torch.device(device)
        self.readers = readers
        self.pool = BufferPool(pinned=self.device.type == "cuda")
        self._executor = ThreadPoolExecutor(workers, "fp8-quantize") if self.device.type == "cpu" else None
        self._threads = torch.get_num_threads()

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

"""Several things done at the same time, with the result of doing them one after the other.

Each is worked on in a thread; what ends it is done in the order in which they were begun. Where one fails, those begun
before it are finished, those behind it are stopped, and the first error in their order is raised: what an interrupted
conversion leaves, and what it says, do not depend on how many shards were under way.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoppedError(Exception):
    """Raised in the thread of an item that is not wanted any more; nobody else sees it."""


class _Stop:
    """Who is to stop: all behind the first item that failed."""

    def __init__(self) -> None:
        self._last: int | None = None  # that may go on
        self._turn = threading.Lock()

    def behind(self, number: int) -> None:
        with self._turn:
            self._last = number if self._last is None else min(self._last, number)

    def concerns(self, number: int) -> bool:
        return self._last is not None and number > self._last

    def check(self, number: int) -> None:
        if self.concerns(number):
            raise StoppedError


class UnderWay(Generic[Item, Result]):
    """Works on items, at most `most` at a time.

    work: called in a thread with an item and a function to call now and then, which raises where the work is in vain.
    finish: called in another thread with what `work` returned, in the order of the items. unfinished: how many items
    may be begun and not finished.
    """

    def __init__(
        self,
        most: int,
        work: Callable[[Item, Callable[[], None]], Result],
        finish: Callable[[Result], None],
        *,
        unfinished: int,
    ) -> None:
        self._most, self._work, self._finish, self._unfinished = most, work, finish, unfinished
        self._stop = _Stop()
        self._finishing: list[Future[None]] = []
        self._ended = False

    def run(self, items: Iterable[Item]) -> None:
        """Work on all items, which are asked for in this thread as `unfinished` allows. Raises the first error."""
        with ThreadPoolExecutor(1, "fp8-finish") as finisher, ThreadPoolExecutor(self._most, "fp8-shard") as workers:
            try:
                try:
                    self._begin(items, workers, finisher)
                except Exception:
                    self._wait()  # an error of an item that was begun goes before
                    raise
                self._wait()
            except BaseException:
                self._stop.behind(-1)
                raise

    def _begin(self, items: Iterable[Item], workers: ThreadPoolExecutor, finisher: ThreadPoolExecutor) -> None:
        asked = iter(items)
        for number in itertools.count():
            wait(self._finishing[: max(0, number + 1 - self._unfinished)])
            if self._stop.concerns(number) or (item := next(asked, None)) is None:
                return
            result = workers.submit(self._work_on, number, item)
            self._finishing.append(finisher.submit(self._finish_with, number, result))

    def _wait(self) -> None:
        for finished in self._finishing:
            finished.result()

    def _work_on(self, number: int, item: Item) -> Result:
        try:
            self._stop.check(number)
            return self._work(item, lambda: self._stop.check(number))
        except BaseException:
            self._stop.behind(number)
            raise

    def _finish_with(self, number: int, result: Future[Result]) -> None:
        try:
            done = result.result()
            if self._ended:
                raise StoppedError
            self._finish(done)
        except BaseException:
            self._ended = True  # nothing is finished behind what is not
            self._stop.behind(number)
            raise

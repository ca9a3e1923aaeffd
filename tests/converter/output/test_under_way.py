"""Several things at once, with what doing them one after the other would give."""

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from fp8_convert.converter.output.under_way import StoppedError, UnderWay

WAIT_S = 30


class Work:
    """Items whose work lasts until `release` says so; what happened is in `begun`, `stopped` and `finished`."""

    def __init__(self, released: bool = True) -> None:
        self.begun: list[int] = []
        self.stopped: list[int] = []
        self.finished: list[int] = []
        self.events = [threading.Event() for _ in range(20)]
        self.failing: dict[int, Exception] = {}
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        if released:
            for event in self.events:
                event.set()

    def work(self, item: int, check: Callable[[], None]) -> int:
        with self._lock:
            self.begun.append(item)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            while not self.events[item].wait(0.01):
                check()
            check()
            if item in self.failing:
                raise self.failing[item]
            return 10 * item
        except StoppedError:
            self.stopped.append(item)
            raise
        finally:
            with self._lock:
                self._now -= 1

    def finish(self, result: int) -> None:
        self.finished.append(result // 10)

    def run(self, most: int, items: Iterator[int], unfinished: int | None = None) -> None:
        UnderWay(most, self.work, self.finish, unfinished=unfinished or 2 * most).run(items)

    def in_background(self, most: int, items: Iterator[int]) -> tuple[threading.Thread, list[BaseException]]:
        raised: list[BaseException] = []

        def run() -> None:
            try:
                self.run(most, items)
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread, raised


def until(condition: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(100 * WAIT_S):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("nothing happened")


@pytest.mark.parametrize("most", [1, 2, 5])
def test_everything_is_done_and_finished_in_order(most: int) -> None:
    work = Work()
    work.run(most, iter(range(12)))
    assert sorted(work.begun) == work.finished == [*range(12)]
    assert work.most_at_once <= most


def test_as_many_as_are_allowed_are_under_way() -> None:
    work = Work(released=False)
    thread, raised = work.in_background(3, iter(range(5)))
    until(lambda: len(work.begun) == 3)
    for number in (4, 3, 2, 1):  # in whatever order they are done
        work.events[number].set()
    until(lambda: len(work.begun) == 5)
    assert work.finished == []
    work.events[0].set()
    thread.join(WAIT_S)
    assert work.finished == [*range(5)]
    assert (work.most_at_once, raised) == (3, [])


def test_an_error_stops_what_is_behind_it_and_lets_what_is_before_it_end() -> None:
    work = Work(released=False)
    work.failing[2] = ValueError("third")
    thread, raised = work.in_background(4, iter(range(9)))
    until(lambda: len(work.begun) == 4)
    work.events[2].set()
    until(lambda: work.stopped == [3])
    assert thread.is_alive()
    work.events[1].set()
    work.events[0].set()
    thread.join(WAIT_S)
    assert [str(error) for error in raised] == ["third"]
    assert work.finished == [0, 1]
    assert sorted(work.begun) == [0, 1, 2, 3]


def test_the_first_error_in_order_is_raised() -> None:
    work = Work(released=False)
    work.failing = {1: ValueError("second"), 2: ValueError("third")}
    thread, raised = work.in_background(3, iter(range(9)))
    until(lambda: len(work.begun) == 3)
    work.events[2].set()
    until(lambda: work._now == 2)
    work.events[1].set()
    work.events[0].set()
    thread.join(WAIT_S)
    assert [str(error) for error in raised] == ["second"]
    assert work.finished == [0]


def test_an_error_of_asking_comes_behind_those_of_what_was_begun() -> None:
    def items() -> Iterator[int]:
        yield from range(2)
        raise ValueError("no third")

    work = Work()
    with pytest.raises(ValueError, match="no third"):
        work.run(4, items())
    assert work.finished == [0, 1]
    work = Work()
    work.failing[1] = ValueError("second")
    with pytest.raises(ValueError, match="second"):
        work.run(4, items())


def test_nothing_is_finished_behind_what_could_not_be() -> None:
    class Full(Work):
        def finish(self, result: int) -> None:
            if result == 10:
                raise OSError("full")
            super().finish(result)

    work = Full()
    with pytest.raises(OSError, match="full"):
        work.run(4, iter(range(9)))
    assert work.finished == [0]


def test_the_next_is_asked_for_when_the_one_before_is_finished() -> None:
    work = Work()

    def items() -> Iterator[int]:
        for number in range(5):
            assert work.finished == [*range(number)]
            yield number

    work.run(1, items(), unfinished=1)
    assert work.finished == [*range(5)]


def test_few_wait_to_be_finished() -> None:
    """What is done and not finished holds memory: `unfinished` bounds it."""
    work = Work(released=False)
    for event in work.events[1:]:
        event.set()
    thread, _ = work.in_background(2, iter(range(12)))
    until(lambda: len(work.begun) == 4)
    work.events[15].wait(0.1)
    assert sorted(work.begun) == [0, 1, 2, 3]
    work.events[0].set()
    thread.join(WAIT_S)
    assert work.finished == [*range(12)]


def test_an_interruption_stops_all() -> None:
    work = Work(released=False)
    work.events[0].set()

    def interrupt() -> None:
        until(lambda: len(work.begun) == 4)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        work.run(3, iter(range(9)))
    interrupter.join(WAIT_S)
    assert sorted(work.stopped) == [1, 2, 3]
    assert work.finished == [0]

"""How a long conversion tells how far it is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress(Protocol):
    """What `convert` tells of its work; bytes are source bytes. `finishing`: from now on it is too late to stop."""

    def start(self, total: int) -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, line: str) -> None: ...
    def finishing(self) -> None: ...
    def close(self) -> None: ...


class Silent:
    """Tells nothing: the library's default."""

    def start(self, total: int) -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, line: str) -> None: ...
    def finishing(self) -> None: ...
    def close(self) -> None: ...


class Bar:
    """A tqdm bar with bytes, rate and time left."""

    def __init__(self, out: TextIO, on_finishing: Callable[[], None] = lambda: None) -> None:
        self._out = out
        self.finishing = on_finishing
        self._bar: tqdm[None] | None = None

    def start(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="B", unit_scale=True, file=self._out, dynamic_ncols=True)

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def say(self, line: str) -> None:
        tqdm.write(line, file=self._out)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Lines:
    """A line at most every ten seconds, for logs."""

    def __init__(self, out: TextIO, on_finishing: Callable[[], None] = lambda: None) -> None:
        self._out = out
        self.finishing = on_finishing
        self._total = self._done = 0
        self._started = self._last = time.monotonic()

    def start(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_S:
            self._last = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            self.say(f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left")

    def say(self, line: str) -> None:
        print(line, file=self._out, flush=True)

    def close(self) -> None: ...


def for_terminal(out: TextIO | None = None, *, on_finishing: Callable[[], None] = lambda: None) -> Progress:
    """A bar if `out` (stderr by default) is a terminal, else plain lines. on_finishing: see `Progress.finishing`."""
    out = out or sys.stderr
    return Bar(out, on_finishing) if out.isatty() else Lines(out, on_finishing)

"""How a long conversion tells how far it is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

from tqdm import tqdm

BYTES = "B"


def _nothing() -> None: ...


class Progress(Protocol):
    """What a long run tells of its work, in source bytes or in what `unit` says.

    `finishing`: from now on it is too late to stop.
    """

    def start(self, total: int, unit: str = BYTES) -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, line: str) -> None: ...
    def finishing(self) -> None: ...
    def close(self) -> None: ...


class Silent:
    """Tells nothing, neither progress nor notes: the library's default, and what `--quiet` asks for."""

    def __init__(self, on_start: Callable[[], None] = _nothing, on_finishing: Callable[[], None] = _nothing) -> None:
        self._on_start, self._on_finishing = on_start, on_finishing

    def start(self, total: int, unit: str = BYTES) -> None:
        self._on_start()

    def advance(self, count: int) -> None: ...
    def say(self, line: str) -> None: ...
    def close(self) -> None: ...

    def finishing(self) -> None:
        self._on_finishing()


class TakingTurns:
    """A progress that several threads tell of their work."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._turn = threading.Lock()

    def start(self, total: int, unit: str = BYTES) -> None:
        with self._turn:
            self._progress.start(total, unit)

    def advance(self, count: int) -> None:
        with self._turn:
            self._progress.advance(count)

    def say(self, line: str) -> None:
        with self._turn:
            self._progress.say(line)

    def finishing(self) -> None:
        self._progress.finishing()

    def close(self) -> None:
        with self._turn:
            self._progress.close()


class Bar(Silent):
    """A tqdm bar with what is done, rate and time left."""

    def __init__(
        self,
        out: TextIO,
        on_start: Callable[[], None] = _nothing,
        on_finishing: Callable[[], None] = _nothing,
        *,
        label: str | None = None,
    ) -> None:
        super().__init__(on_start, on_finishing)
        self._out, self._label = out, label
        self._bar: tqdm[None] | None = None

    def start(self, total: int, unit: str = BYTES) -> None:
        super().start(total, unit)
        of_bytes = unit == BYTES
        self._bar = tqdm(
            desc=self._label,
            total=total,
            unit=unit if of_bytes else f" {unit}",
            unit_scale=of_bytes,
            file=self._out,
            dynamic_ncols=True,
        )

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def say(self, line: str) -> None:
        tqdm.write(line, file=self._out)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Lines(Silent):
    """A line at most every `every_s` seconds, for logs."""

    def __init__(
        self,
        out: TextIO,
        on_start: Callable[[], None] = _nothing,
        on_finishing: Callable[[], None] = _nothing,
        *,
        every_s: float = 10.0,
    ) -> None:
        super().__init__(on_start, on_finishing)
        self._out, self._every_s = out, every_s
        self._total = self._done = 0
        self._unit = BYTES
        self._started = self._last = time.monotonic()

    def start(self, total: int, unit: str = BYTES) -> None:
        super().start(total, unit)
        self._total, self._done, self._unit = total, 0, unit
        self._started = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            if self._unit == BYTES:
                done = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
            else:
                done = f"{self._done} of {self._total} {self._unit}"
            self.say(f"{done}, {left:.0f} s left")

    def say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


def for_terminal(
    out: TextIO | None = None,
    *,
    quiet: bool = False,
    on_start: Callable[[], None] = _nothing,
    on_finishing: Callable[[], None] = _nothing,
) -> Progress:
    """A bar if `out` (stderr by default) is a terminal, else plain lines; quiet: nothing. Errors are not told here.

    on_start: called when work starts; on_finishing: when it is too late to stop, as `Progress.finishing`.
    """
    out = out or sys.stderr
    if quiet:
        return Silent(on_start, on_finishing)
    return Bar(out, on_start, on_finishing) if out.isatty() else Lines(out, on_start, on_finishing)


@contextlib.contextmanager
def bars_of_libraries(out: TextIO | None = None, *, quiet: bool = False) -> Iterator[None]:
    """Let the libraries draw their progress bars only if `out` (stderr by default) is a terminal, and not if quiet.

    It imports them: to be used where they are needed anyway.
    """
    if (out or sys.stderr).isatty() and not quiet:
        yield
        return
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    switches: list[tuple[bool, Callable[[], object], Callable[[], object]]] = [
        (log.is_progress_bar_enabled(), log.disable_progress_bar, log.enable_progress_bar)
        for log in (diffusers_logging, transformers_logging)
    ]
    # Last, since transformers switches the Hub's bars with its own.
    switches.append((not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF_HUB_DISABLE_PROGRESS_BARS may have decided already
        for _, disable, _ in switches:
            disable()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for was_on, disable, enable in switches:
                (enable if was_on else disable)()

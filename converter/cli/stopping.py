"""Ctrl-C and SIGTERM while a command runs: it stops cleanly, at once on a second signal, or not when it is too late."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType

_STOPPED = 130  # as shells count an interrupted command


class Stopping:
    """Turns signals into KeyboardInterrupt, and that into one sentence and exit code 130. A context manager.

    advice: what the user is to do after the stop. at_once: there is never anything to clean up.
    """

    def __init__(self, advice: str, *, at_once: bool = False) -> None:
        self._advice, self._at_once = advice, at_once
        self._working = self._stopping = self._too_late = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stopping:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # nohup, and the background of a script, ignore them
                self._before[number] = before
                signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._leave()
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def working(self) -> None:
        """From now on there is something to clean up.

        Before, a signal ends the process at once: an exception could be swallowed in the middle of somebody's import.
        """
        self._working = not self._at_once

    def finishing(self) -> None:
        """From now on signals change nothing: the work is as good as done."""
        self._too_late = True

    def _received(self, _number: int, _frame: FrameType | None) -> None:
        if self._too_late:
            return
        if self._stopping or not self._working:  # told twice, nobody waits for the cleanup; the next run takes over
            self._leave()
        self._stopping = True
        raise KeyboardInterrupt

    def _leave(self) -> None:
        with contextlib.suppress(RuntimeError):  # the signal may have come in the middle of a write
            sys.stdout.flush()
        os.write(2, f"stopped; {self._advice}.\n".encode())
        os._exit(_STOPPED)  # a download that is under way would hold up a normal exit

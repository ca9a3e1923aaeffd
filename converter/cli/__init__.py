"""The `fp8-convert` command. A process's first moment is here: signals, `--version`, and then the commands."""

from __future__ import annotations

import gc
import os
import signal
import sys
from importlib.metadata import version
from types import FrameType


def main() -> None:
    """Run the command line; a signal while its imports are under way stops it with one sentence too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup and in a script's background
            signal.signal(number, _stop)
    if sys.argv[1:] in (["--version"], ["-V"]):
        print(f"fp8-convert, version {version('fp8-convert')}")
        return
    from .commands import main

    try:
        main()
    finally:
        gc.freeze()  # the process ends: to walk all objects of PyTorch and its like once more would take a second


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # An exception could be swallowed in the middle of somebody's import, and there is nothing yet to clean up.
    os.write(2, b"stopped; run the same command again.\n")
    os._exit(130)

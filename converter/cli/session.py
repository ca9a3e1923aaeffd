"""How a command runs: errors become one sentence, signals stop it cleanly, and progress goes to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from ..telling.errors import Fp8Error
from ..telling.progress import Progress, for_terminal
from .stopping import Stopping


@contextlib.contextmanager
def errors(advice: str = "run the same command again", *, at_once: bool = False) -> Iterator[Stopping]:
    """Errors of the library become one sentence and exit code 1; signals stop cleanly; bugs show their traceback.

    advice: what to do after a signal. at_once: a signal ends the process without ado.
    """
    with Stopping(advice, at_once=at_once) as stopping:
        try:
            yield stopping
        except Fp8Error as error:
            click.echo(f"error: {' '.join(str(error).splitlines())}", err=True)  # one line, whatever a name holds
            sys.exit(1)


@contextlib.contextmanager
def progress_of(stopping: Stopping, quiet: bool) -> Iterator[Progress]:
    progress = for_terminal(quiet=quiet, on_start=stopping.working, on_finishing=stopping.finishing)
    with contextlib.closing(progress):
        yield progress

"""Weights on their way into the page cache, while the libraries that the plan needs are still imported."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from ..format.untrusted import open_regular
from ..telling.errors import ConvertError
from .describing import outline
from .files import Files, LocalFiles

_MOST_BYTES = 2 * 1024**3  # of memory that the system can take back at any time
_STEP = 16 * 1024 * 1024


@contextlib.contextmanager
def paging_in(files: Files) -> Iterator[None]:
    """Read the first shards of a folder meanwhile, in the background, where the system takes such a hint.

    It stops with the context: the conversion reads for itself, and drops what it has read.
    """
    stopped = threading.Event()
    if isinstance(files, LocalFiles) and hasattr(os, "posix_fadvise"):
        threading.Thread(target=_page_in, args=(files, stopped), name="fp8-page-in", daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


def _page_in(files: LocalFiles, stopped: threading.Event) -> None:
    left = _MOST_BYTES
    with contextlib.suppress(ConvertError, OSError):  # whoever needs the file says what is wrong with it
        for path in _shards(files):
            fd = open_regular(files.local(path), path)
            try:
                size = os.fstat(fd).st_size
                stop = min(size, left)
                for start in range(0, stop, _STEP):
                    if stopped.is_set():
                        return
                    os.posix_fadvise(fd, start, min(_STEP, stop - start), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)
            left -= size


def _shards(files: LocalFiles) -> Iterator[str]:
    """Weights in the order in which a conversion reads them."""
    for component in outline(files)[1]:
        prefix = f"{component}/" if component else ""
        for path in sorted(files.sizes()):
            if path.startswith(prefix) and "/" not in path.removeprefix(prefix) and path.endswith(".safetensors"):
                yield path

"""Where source shards come from while a conversion runs.

`FolderSupply` opens shards that lie on this machine: in a folder, or in the Hub cache once they were downloaded into
it. `StreamedSupply` downloads shard N + 1 of a Hub repository while shard N is converted and deletes each as soon as
its output is safe, so that at most two source shards take disk.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..snapshot.files import Files, LocalFiles, SourceFile, file_stat
from ..snapshot.snapshot import Shard

if TYPE_CHECKING:
    from ..snapshot.hub import HubFiles


class Supply(Protocol):
    """The source shards of a conversion. A context manager."""

    @property
    def files(self) -> Files:
        """The snapshot's other files."""

    @property
    def ahead(self) -> bool:
        """Whether a shard may be opened before the one before it is done."""

    def __enter__(self) -> Supply: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def want(self, shards: Sequence[Shard]) -> None:
        """Say which shards will be opened, and in which order."""

    def open(self, shard: Shard) -> SourceFile:
        """The shard's file on this machine, after waiting for it if need be."""

    def find(self, shard: Shard) -> SourceFile | None:
        """The shard's file, None if it is not here and not on its way."""

    def range(self, shard: Shard, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard that `find` does not find."""

    def discard(self, shard: Shard) -> str:
        """Give up a shard's file that was found to be corrupt; returns what the user is to do."""

    def done(self, shard: Shard) -> None:
        """Take note that the shard's output is safe: its source is needed no more."""


class FolderSupply:
    """Shards that lie on this machine."""

    ahead = True

    def __init__(self, files: LocalFiles) -> None:
        self.files = files

    def __enter__(self) -> FolderSupply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def want(self, shards: Sequence[Shard]) -> None:
        return

    def open(self, shard: Shard) -> SourceFile:
        return self.files.open(shard.path)

    def find(self, shard: Shard) -> SourceFile | None:
        return self.open(shard)

    def range(self, shard: Shard, start: int, stop: int) -> bytes:
        raise NotImplementedError(f"{shard.path} is here")

    def discard(self, shard: Shard) -> str:
        return f"delete {self.open(shard).path.resolve()} and run again"

    def done(self, shard: Shard) -> None:
        return


class StreamedSupply:
    """Downloads the shards that are wanted of a Hub repository into `folder`, in order, one ahead."""

    ahead = False  # its download would be the third that takes disk

    def __init__(self, files: HubFiles, folder: Path) -> None:
        self.files, self._folder = files, folder
        self._wanted: list[str] = []
        self._executor = ThreadPoolExecutor(1, "fp8-download")
        self._stopped = threading.Event()
        self._arriving: dict[str, Future[SourceFile]] = {}

    def __enter__(self) -> StreamedSupply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error nobody waits for gigabytes that are still arriving, and after Ctrl-C for nothing at all.
        if error is not None:
            from ..snapshot.hub import abort_downloads

            abort_downloads()
        self._stopped.set()
        self._executor.shutdown(wait=error is None or isinstance(error, Exception), cancel_futures=True)
        if error is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def want(self, shards: Sequence[Shard]) -> None:
        self._wanted = [shard.path for shard in shards]
        for partial in self._folder.rglob("*.incomplete"):  # the Hub's client begins anew beside it
            partial.unlink()
        present = {p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*.safetensors")}
        for path in present - set(self._wanted):
            (self._folder / path).unlink()  # its output was finished before an interruption

    def open(self, shard: Shard) -> SourceFile:
        self._order(shard.path)
        source = self._arriving[shard.path].result()
        following = self._wanted[self._wanted.index(shard.path) + 1 :]
        if following:
            self._order(following[0])
        return source

    def find(self, shard: Shard) -> SourceFile | None:
        arriving = self._arriving.get(shard.path)
        return None if arriving is None else arriving.result()

    def range(self, shard: Shard, start: int, stop: int) -> bytes:
        return self.files.range(shard.path, start, stop)

    def discard(self, shard: Shard) -> str:
        self.open(shard).path.unlink()
        return "run the same command again to fetch it anew"

    def done(self, shard: Shard) -> None:
        self._arriving.pop(shard.path).result().path.unlink()

    def _order(self, path: str) -> None:
        if path not in self._arriving:
            self._arriving[path] = self._executor.submit(self._download, path)

    def _download(self, path: str) -> SourceFile:
        local = self.files.download_into(path, self._folder, self._stopped)
        return SourceFile(local, path, file_stat(local))

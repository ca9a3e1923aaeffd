"""Where source shards come from while a conversion runs: they are here already, or arrive one ahead of their use.

`Supply` hands out shards that lie on this machine. `StreamedSupply` downloads shard N + 1 of a Hub repository while
shard N is converted and deletes each as soon as its output is safe, so that at most two source shards take disk.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from ..plan.plan import ShardPlan
from ..plan.schedule import SLOT_BYTES, scale_domain
from ..snapshot.source import file_stat
from .quantize import TORCH_DTYPES, amax
from .shard_stream import Engine, finite, measure

if TYPE_CHECKING:
    from ..snapshot.hub import HubFiles


class Supply:
    """Source shards that lie on this machine. A context manager, as its streaming sibling is.

    ahead: whether a shard may be taken before the one before it is finished.
    """

    ahead = True

    def __enter__(self) -> Supply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def take(self, shard: ShardPlan) -> ShardPlan:
        """The shard with its source on this machine."""
        return shard

    def measure(self, shards: Sequence[ShardPlan], groups: Sequence[str], engine: Engine) -> dict[str, float]:
        """max|w| of each of `groups` over its members in all `shards`, those of one component."""
        return measure(shards, groups, engine)

    def finished(self, shard: ShardPlan) -> None:
        """The shard's output is safe: its source is needed no more."""


class StreamedSupply(Supply):
    """Downloads the `wanted` shards of a Hub repository into `folder`, in order, one ahead."""

    ahead = False  # its download would be the third that takes disk

    def __init__(self, files: HubFiles, folder: Path, wanted: Sequence[ShardPlan]) -> None:
        self._files, self._folder = files, folder
        self._wanted = [shard.source.path for shard in wanted]
        self._executor = ThreadPoolExecutor(1, "fp8-download")
        self._stopped = threading.Event()
        self._arriving: dict[str, Future[Path]] = {}
        for partial in folder.rglob("*.incomplete"):  # the Hub's client begins anew beside it
            partial.unlink()
        for path in self._present() - set(self._wanted):
            (folder / path).unlink()  # its output was finished before an interruption

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

    def take(self, shard: ShardPlan) -> ShardPlan:
        self._order(shard.source.path)
        local = self._arriving[shard.source.path].result()
        following = self._wanted[self._wanted.index(shard.source.path) + 1 :]
        if following:
            self._order(following[0])
        return _at(shard, local)

    def measure(self, shards: Sequence[ShardPlan], groups: Sequence[str], engine: Engine) -> dict[str, float]:
        """As `Supply.measure`; members in shards that are not here are fetched by range."""
        found = dict.fromkeys(groups, 0.0)
        for shard in shards:
            here: Mapping[str, float]
            if shard.source.path in self._arriving:
                here = measure([self.take_here(shard)], groups, engine)
            else:
                here = self._measure_remote(shard, groups)
            for group, value in here.items():
                found[group] = max(found[group], value)
        return found

    def take_here(self, shard: ShardPlan) -> ShardPlan:
        """The shard once its download, which is under way, has arrived."""
        return _at(shard, self._arriving[shard.source.path].result())

    def finished(self, shard: ShardPlan) -> None:
        self._arriving.pop(shard.source.path).result().unlink()

    def _order(self, path: str) -> None:
        if path not in self._arriving:
            self._arriving[path] = self._executor.submit(self._files.download_into, path, self._folder, self._stopped)

    def _measure_remote(self, shard: ShardPlan, groups: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        data_start = shard.source.header.data_start
        for tensor in shard.tensors:
            domain = scale_domain(tensor)
            if domain is None or domain not in groups:
                continue
            start, stop = data_start + tensor.info.start, data_start + tensor.info.end
            for at in range(start, stop, SLOT_BYTES):
                data = bytearray(self._files.range(shard.source.path, at, min(at + SLOT_BYTES, stop)))
                x = torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.info.dtype])
                found[domain] = max(found.get(domain, 0.0), finite(amax(x), tensor, shard))
        return found

    def _present(self) -> set[str]:
        return {p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*.safetensors")}


def _at(shard: ShardPlan, local: Path) -> ShardPlan:
    """The shard with its source in a file of this machine."""
    return replace(shard, source=replace(shard.source, local=local, stat=file_stat(local)))

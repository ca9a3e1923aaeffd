"""Are the codes and scales in a converted snapshot those that its source gives? All of it, byte by byte."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..format.record import RecordedError
from ..plan.plan import ComponentPlan, Plan, ShardPlan
from ..plan.sharding import OutputFile
from ..stream.component_stream import ShardStream, convert_component
from ..stream.engine import Engine
from ..stream.reading import open_for_reading, read_exactly
from ..stream.shard_stream import Chunk
from ..stream.supply import Supply
from ..telling.errors import ConvertError
from .finding import Finding


@dataclass
class Read:
    """What reading source shards to their ends gave: their digests, and what the codes miss of their weights."""

    sha256: dict[str, str] = field(default_factory=dict)
    errors: dict[str, RecordedError] = field(default_factory=dict)

    def add(self, stream: ShardStream) -> None:
        self.sha256[stream.plan.source.path] = stream.sha256
        self.errors |= stream.errors


def compare_shard(
    root: Path, shard: ShardPlan, plan: Plan, supply: Supply, damaged: Collection[str]
) -> Generator[Finding, None, Read]:
    """Compare the files that a source shard gives; returns what the source gave, nothing if it was not read whole."""
    read = Read()
    component = next(c for c in plan.components if c.source.name == shard.component)
    with contextlib.ExitStack() as opened:
        files = []
        for file in shard.files:
            if (root / file.path).is_file():
                fd = open_for_reading(root / file.path, file.path)
                opened.callback(os.close, fd)
                problem = _header_problem(fd, file)
                if problem and file.path not in damaged:
                    yield Finding(file.path, problem)
                if problem is None or os.fstat(fd).st_size == file.size:  # else the data need not lie as planned
                    files.append((file, fd))
        try:  # with an engine for each shard, since an error leaves one without some of its buffers
            with Engine(workers=max(1, (os.cpu_count() or 2) - 1)) as engine:
                for stream in convert_component(
                    component, supply, engine, shards=[shard], hashed=True, with_errors=True
                ):
                    for path, name in dict.fromkeys(_differing(stream.chunks, files)):
                        yield Finding(path, f"{name} differs from what the source gives")
                    read.add(stream)
        except ConvertError as error:
            yield Finding(shard.files[0].path, f"cannot be compared with its source: {error}")
    return read


def compare_single(
    root: Path, component: ComponentPlan, supply: Supply, damaged: Collection[str]
) -> Generator[Finding, None, Read]:
    """Compare the one file that a component gives; returns what those source shards gave that were read whole."""
    assert component.single is not None
    single, (file,) = component.single, component.files
    read = Read()
    if not (root / file.path).is_file():
        return read
    with contextlib.ExitStack() as opened:
        fd = open_for_reading(root / file.path, file.path)
        opened.callback(os.close, fd)
        problem = _header_problem(fd, file)
        if problem and file.path not in damaged:
            yield Finding(file.path, problem)
        if problem is not None and os.fstat(fd).st_size != file.size:
            return read  # the data need not lie as planned
        differing: dict[str, None] = {}
        try:
            with Engine(workers=max(1, (os.cpu_count() or 2) - 1)) as engine:
                for stream in convert_component(component, supply, engine, hashed=True, with_errors=True):
                    for chunk in stream.chunks:
                        offset = len(file.header) + single.places[chunk.name] + chunk.offset
                        if not _is_there(chunk.data, fd, offset, file.path):
                            differing[chunk.name] = None
                    read.add(stream)
            for extra in single.extras:
                position = len(file.header) + single.start_of(extra)
                for piece in supply.files.pieces(extra.file) if extra.file else ():
                    if not _is_there(torch.frombuffer(bytearray(piece), dtype=torch.uint8), fd, position, file.path):
                        differing[extra.name] = None
                    position += len(piece)
        except ConvertError as error:
            yield Finding(file.path, f"cannot be compared with its source: {error}")
    for name in differing:
        yield Finding(file.path, f"{name} differs from what the source gives")
    return read


def _header_problem(fd: int, file: OutputFile) -> str | None:
    header = bytearray(min(os.fstat(fd).st_size, len(file.header)))
    read_exactly(fd, memoryview(header), 0, file.path)
    return None if header == file.header else "has another header than the source gives"


def _differing(chunks: Iterator[Chunk], files: Sequence[tuple[OutputFile, int]]) -> Iterator[tuple[str, str]]:
    """File and tensor of every chunk that is not what the open `files` hold in its place."""
    position = 0
    for chunk in chunks:
        start, position = position, position + chunk.data.numel()
        file, fd = next(((f, d) for f, d in files if f.start <= start and position <= f.stop), (None, -1))
        if file is None:
            continue
        if not _is_there(chunk.data, fd, len(file.header) + start - file.start, file.path):
            yield file.path, chunk.name


def _is_there(data: torch.Tensor, fd: int, offset: int, where: str) -> bool:
    """Whether an open file has the bytes at `offset`."""
    written = torch.empty(data.numel(), dtype=torch.uint8, device="cpu")
    if offset + len(written) > os.fstat(fd).st_size:
        return False
    read_exactly(fd, written.numpy().data, offset, where)
    return torch.equal(written, data)

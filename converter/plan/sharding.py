"""How the output of one source shard is cut into files: mostly into one, more where `max_shard_size` asks for it.

A file holds a run of the shard's output tensors, each FP8 weight together with its scales, behind a header of its own.
The bytes of the data are those of the uncut shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..format import layout
from ..format.header import TensorInfo, encode_header
from ..telling.notebook import Brief


@dataclass(frozen=True, repr=False)
class OutputFile(Brief):
    """One output file: its header and the tensors whose bytes follow it, with their offsets in the shard's output."""

    path: str
    header: bytes
    outputs: tuple[TensorInfo, ...]

    @property
    def start(self) -> int:
        """Where its data begin in the shard's output data."""
        return self.outputs[0].start if self.outputs else 0

    @property
    def stop(self) -> int:
        return self.outputs[-1].end if self.outputs else 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.stop - self.start


def cut_into_files(
    outputs: Sequence[TensorInfo],
    modules: Mapping[str, layout.WeightFormat],
    metadata: Mapping[str, str],
    max_bytes: int | None,
) -> tuple[OutputFile, ...]:
    """Cut output tensors, in the order of their bytes, into files of at most `max_bytes`, paths to be given later.

    A weight that is larger with its scales makes a larger file. modules: the FP8 modules among the tensors, with
    mode and scheme. metadata: of the source shard.
    """
    files: list[OutputFile] = []
    for tensors in _runs(outputs, max_bytes):
        start = tensors[0].start
        mine = {m: how for m, how in modules.items() if any(t.name == m + layout.WEIGHT for t in tensors)}
        stated = {"format": "pt", **metadata} if modules else dict(metadata)
        if mine:
            stated[layout.METADATA_KEY] = layout.encode_modules(mine)
        moved = [replace(t, start=t.start - start, end=t.end - start) for t in tensors]
        files.append(OutputFile("", encode_header(moved, stated), tuple(tensors)))
    return tuple(files)


def _runs(outputs: Sequence[TensorInfo], max_bytes: int | None) -> Iterator[list[TensorInfo]]:
    if max_bytes is None:
        yield list(outputs)
        return
    run: list[TensorInfo] = []
    size = 0
    for unit in _units(outputs):
        added = sum(len(encode_header([t], {})) + t.nbytes for t in unit)  # a header alone is longer than its entry
        if run and size + added > max_bytes:
            yield run
            run, size = [], 0
        run += unit
        size += added
    if run:
        yield run


def _units(outputs: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """What stays together: a weight and its scales, and whatever would not be aligned at the start of a file."""
    largest = [1] * (len(outputs) + 1)  # bytes of an element among the tensors from here on
    for number in range(len(outputs) - 1, -1, -1):
        largest[number] = max(largest[number + 1], outputs[number].itemsize)
    last = {_module(output): number for number, output in enumerate(outputs)}
    begin = open_until = 0
    for number, output in enumerate(outputs):
        if number > open_until and output.start % largest[number] == 0:
            yield list(outputs[begin:number])
            begin = number
        open_until = max(open_until, last[_module(output)])
    yield list(outputs[begin:])


def _module(output: TensorInfo) -> str:
    """What a weight and its scales have in common; the name itself for any other tensor."""
    suffix = next((s for s in (*layout.SCALE_SUFFIXES, layout.WEIGHT) if output.name.endswith(s)), None)
    return output.name.removesuffix(suffix) + layout.WEIGHT if suffix else output.name

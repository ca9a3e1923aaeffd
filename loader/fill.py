"""Bytes from files into a model's tensors, in bounded host memory.

`Filler` gives every checkpoint tensor its memory on the device when its first bytes arrive and puts it into
the model when the last one has. A converted component's shards are read into it as they are; an original
one's go through the converter's stream, which hands out the same bytes that it would write to disk.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..converter.format.header import TensorInfo
from ..converter.plan.plan import ComponentPlan
from ..converter.snapshot.snapshot import Shard
from ..converter.stream.component_stream import convert_component
from ..converter.stream.engine import Engine
from ..converter.stream.reading import BufferPool, Span, SpanReader, open_for_reading, read_exactly
from ..converter.stream.supply import Supply
from ..converter.telling.errors import LoadError
from ..converter.telling.progress import Progress
from .build import target_dtype
from .checkpoint import check_scale
from .parts import Part, in_place_of, shape_here
from .weights import SCALES, Fp8Weight

# Measured on an H100's host: fewer threads leave its page cache waiting, larger spans cost more to pin than they save.
_THREADS = 12
_SPAN_BYTES = 16 * 1024 * 1024
_COPIES = 4  # spans on their way to the device at once
_SPANS = 2 * _THREADS  # pinned buffers
_READ_BYTES = 16 * 1024 * 1024
_GAP_BYTES = 1024 * 1024  # what nobody wants is read along where it is shorter
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "F8_E4M3": torch.int8, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip


@dataclass
class _Arriving:
    """A tensor that is on its way: `memory` is uint8, or of the final dtype where chunks are cast as they come.

    part: what of the tensor the memory is for, None for all of it. missing: how many of the tensor's bytes are to come,
    of which a part may need some alone.
    """

    info: TensorInfo
    memory: Tensor
    part: Part | None
    missing: int


class Filler:
    """Takes checkpoint bytes in any order and sets the model's parameters and buffers.

    names: checkpoint tensor name to the model's. dtype: of unquantised floating-point tensors in the loaded
    model. label: how messages call the component. parts: what this rank holds of a tensor, by the model's name; all of
    it otherwise. Bytes are counted in the whole tensor all the same. Every scale that comes from a file is checked on
    its way, in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        dtype: torch.dtype,
        device: torch.device,
        label: str,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        self.model, self.names, self.dtype, self.device, self.label = model, names, dtype, device, label
        self.unexpected: list[str] = []
        self._modules = dict(model.named_modules())
        self._parts = parts or {}
        self._arriving: dict[str, _Arriving] = {}
        self._to_come: dict[str, int] = {}  # bytes of tensors that are not read as a whole
        self._host_scales: dict[str, bytearray] = {}
        self._scales: dict[str, Tensor] = {}  # those from files, in host memory

    def check_dtypes(self, infos: Iterable[TensorInfo]) -> None:
        """Raises LoadError for integers where the model computes in floating point."""
        for info in infos:
            place, source = self._place(info), _DTYPES.get(info.dtype)
            if place is None or source is None or source.is_floating_point:
                continue
            module, leaf = place
            expected = module._parameters.get(leaf)  # an FP8 weight's is an integer itself
            if expected is not None and expected.is_floating_point():
                raise LoadError(
                    f"{info.name} of {self.label} has the dtype {info.dtype}, and {type(module).__name__} needs a "
                    "floating-point one; give a snapshot with its BF16, FP16 or FP32 weight."
                )

    def wants(self, info: TensorInfo) -> bool:
        """Whether bytes of the tensor are wanted: none of one that the model does not have, which is then `unexpected`,
        and of an empty one, which is then set.
        """
        if self._place(info) is None:
            self.unexpected.append(info.name)
            return False
        part = self._part(info)
        if info.nbytes and (part is None or prod(part.shape)):
            return True
        arriving = self._expect(info)
        self._set(info, arriving.memory, arriving.part)
        del self._arriving[info.name]
        return False

    def to_read(self, info: TensorInfo) -> list[tuple[int, int]]:
        """The ranges of the tensor's bytes that are wanted of its file; these alone are then to come."""
        if not self.wants(info):
            return []
        part = None if self._is_scale(info) else self._part(info)  # a scale is checked whole
        ranges = [(0, info.nbytes)] if part is None else part.to_read(info.itemsize)
        self._to_come[info.name] = sum(stop - start for start, stop in ranges)
        return ranges

    def memory(self, info: TensorInfo) -> Tensor | None:
        """Memory for all bytes of a tensor to come, uint8 [nbytes] on the device; None where this rank holds a part."""
        arriving = self._expect(info)
        return arriving.memory if arriving.part is None else None

    def wrote(self, name: str, count: int) -> None:
        """Says that `count` more of the tensor's bytes are there; the last ones put it into the model."""
        arriving = self._arriving[name]
        arriving.missing -= count
        if arriving.missing == 0:
            del self._arriving[name]
            self._set(arriving.info, arriving.memory, arriving.part)

    def write(self, info: TensorInfo, offset: int, data: Tensor, non_blocking: bool = False) -> None:
        """Copies `data` (uint8), which are the tensor's bytes from `offset` on."""
        arriving = self._expect(info)
        apart = data.device != arriving.memory.device or arriving.part is not None
        if apart and data.device.type == "cpu" and self._is_scale(info):
            # A chunk may end within a number, so the bytes are gathered and checked once all are there; of a part, all.
            host = self._host_scales.setdefault(info.name, bytearray(info.nbytes))
            host[offset : offset + data.numel()] = data.numpy().data
        if arriving.part is None:
            arriving.memory[offset : offset + data.numel()].copy_(data, non_blocking=non_blocking)
        else:
            arriving.part.copy(info.itemsize, arriving.memory, offset, data, non_blocking)
        self.wrote(info.name, data.numel())

    def write_cast(self, info: TensorInfo, offset: int, data: Tensor) -> None:
        """As `write`, for chunks that hold whole elements: they are cast to the final dtype one by one, so that a
        tensor never exists in both dtypes.
        """
        final = self._final_dtype(info)
        if final is None or final == _DTYPES.get(info.dtype):
            self.write(info, offset, data)
            return
        arriving = self._expect(info, final)
        if data.data_ptr() % info.itemsize:
            data = data.clone()  # odd-sized neighbours in the file left it unaligned
        source, first = data.view(_DTYPES[info.dtype]), offset // info.itemsize
        if arriving.part is None:
            arriving.memory[first : first + source.numel()].copy_(source)
        else:
            memory, cast = arriving.memory.view(torch.uint8), source.to(final).view(torch.uint8)
            arriving.part.copy(final.itemsize, memory, first * final.itemsize, cast)
        self.wrote(info.name, data.numel())

    def _expect(self, info: TensorInfo, dtype: torch.dtype = torch.uint8) -> _Arriving:
        """A tensor whose first bytes arrive gets its memory. dtype: uint8 for the bytes as they are."""
        arriving = self._arriving.get(info.name)
        if arriving is None:
            if info.dtype not in _DTYPES:
                raise LoadError(f"{info.name} has the dtype {info.dtype}, which cannot be loaded.")
            part = self._part(info)
            numel = info.numel if part is None else prod(part.shape)
            count = numel * info.itemsize if dtype == torch.uint8 else numel
            memory = torch.empty(count, dtype=dtype, device=self.device)
            to_come = self._to_come.get(info.name, info.nbytes)
            arriving = self._arriving[info.name] = _Arriving(info, memory, part, to_come)
        return arriving

    def _part(self, info: TensorInfo) -> Part | None:
        part = self._parts.get(self.names[info.name])
        if part is not None and part.whole != info.shape:
            raise self._misfit(info, self._modules[self.names[info.name].rpartition(".")[0]], part.whole)
        return part

    def _misfit(self, info: TensorInfo, module: nn.Module, wanted: Sequence[int]) -> LoadError:
        return LoadError(
            f"{info.name} has the shape {list(info.shape)}, but {type(module).__name__} wants {list(wanted)}; the "
            "config does not fit the weights."
        )

    def finish(self) -> None:
        """Checks that nothing is missing, ties what the class ties, and moves what no checkpoint holds to the
        device.

        Raises LoadError for parameters that the checkpoint lacks, and for scales that cannot be.
        """
        if self._arriving:
            raise LoadError(f"{next(iter(self._arriving))} of {self.label} is incomplete; convert the snapshot again.")
        self._check_scales()
        tie_weights = getattr(self.model, "tie_weights", None)
        if callable(tie_weights):
            tie_weights()
        missing = [n for n, t in self.model.state_dict().items() if t.is_meta]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LoadError(f"{self.label} lacks {missing[0]}{more}; download or convert it again.")
        self.model.to(self.device)

    def _check_scales(self) -> None:
        """All at once: checking each as it came took a fifth of the time of a load."""
        values = [scale.flatten() for scale in self._scales.values()]
        if values and not bool(((every := torch.cat(values)).isfinite() & (every > 0)).all()):
            for name, scale in self._scales.items():
                check_scale(name, scale, self.label)

    def _place(self, info: TensorInfo) -> tuple[nn.Module, str] | None:
        path, _, leaf = self.names[info.name].rpartition(".")
        module = self._modules.get(path)
        if module is None or (leaf not in module._parameters and leaf not in module._buffers):
            return None
        return module, leaf

    def _is_scale(self, info: TensorInfo) -> bool:
        place = self._place(info)
        return place is not None and isinstance(place[0], Fp8Weight) and place[1] in SCALES

    def _final_dtype(self, info: TensorInfo) -> torch.dtype | None:
        """The tensor's dtype in the model; None for one that the model does not have."""
        place = self._place(info)
        source = _DTYPES.get(info.dtype)
        if place is None or source is None:
            return None
        module, leaf = place
        if isinstance(module, Fp8Weight) and leaf != "bias":
            return source
        return target_dtype(self.model, self.names[info.name], source, self.dtype)

    def _set(self, info: TensorInfo, memory: Tensor, held: Part | None) -> None:
        place, final = self._place(info), self._final_dtype(info)
        assert place is not None
        module, leaf = place
        tensor = memory.view(_DTYPES[info.dtype]).to(final) if memory.dtype == torch.uint8 else memory
        tensor = tensor.view(info.shape if held is None else held.shape)
        if self._is_scale(info):
            host = self._host_scales.pop(info.name, None)
            if host is not None:
                self._scales[info.name] = torch.frombuffer(host, dtype=tensor.dtype)
            elif tensor.device.type == "cpu":  # what was computed on the device comes from finite weights
                self._scales[info.name] = tensor
        old = module._parameters.get(leaf)
        expected = old if old is not None else module._buffers[leaf]
        wanted = None if expected is None else shape_here(expected)
        if wanted is not None and tensor.shape != wanted:
            if tensor.numel() != wanted.numel() or not isinstance(module, Fp8Weight):
                raise self._misfit(info, module, wanted)
            tensor = tensor.view(wanted)  # a scalar scale written as [1]
        if leaf in module._parameters:
            held_here = tensor if old is None else in_place_of(old, tensor)
            module._parameters[leaf] = nn.Parameter(held_here, requires_grad=old is not None and old.requires_grad)
        else:
            module._buffers[leaf] = tensor
        if isinstance(module, Fp8Weight) and module.shared is not None:
            module.shared.settle(leaf)


@dataclass(frozen=True)
class _Piece:
    """Bytes [start, stop) of a shard's data section that are wanted, all of one tensor."""

    info: TensorInfo
    start: int
    stop: int


@dataclass(frozen=True)
class _Wanted:
    """A shard, and what of it is wanted, in the order of the file."""

    shard: Shard
    pieces: Sequence[_Piece]

    @property
    def ranges(self) -> Iterator[tuple[int, int]]:
        """The pieces, joined where little or nothing lies between them."""
        joined: tuple[int, int] | None = None
        for piece in self.pieces:
            if joined is not None and piece.start - joined[1] > _GAP_BYTES:
                yield joined
                joined = None
            joined = joined[0] if joined else piece.start, piece.stop
        if joined is not None:
            yield joined


def fill_from_shards(filler: Filler, shards: Sequence[Shard], supply: Supply, progress: Progress) -> None:
    """Reads what is wanted of every tensor of the shards, as it is."""
    wanted = [_Wanted(shard, [*_pieces(filler, shard)]) for shard in shards]
    progress.start(sum(piece.stop - piece.start for shard in wanted for piece in shard.pieces))
    if filler.device.type == "cpu":
        _read_in_place(filler, wanted, supply, progress)
    else:
        _read_through_pinned(filler, wanted, supply, progress)


def _pieces(filler: Filler, shard: Shard) -> Iterator[_Piece]:
    for info in shard.header.tensors:
        for start, stop in filler.to_read(info):
            yield _Piece(info, info.start + start, info.start + stop)


def fill_from_stream(filler: Filler, plan: ComponentPlan, supply: Supply, engine: Engine, progress: Progress) -> None:
    """Converts the component on the way in; the bytes are those of the offline conversion."""
    progress.start(sum(info.nbytes for shard in plan.shards for info in shard.schedule.outputs))
    for stream in convert_component(plan, supply, engine):
        wanted = {info.name: info for info in stream.plan.schedule.outputs if filler.wants(info)}
        for chunk in stream.chunks:
            if chunk.name in wanted:
                filler.write_cast(wanted[chunk.name], chunk.offset, chunk.data)
            progress.advance(chunk.data.numel())


def _read_in_place(filler: Filler, shards: Iterable[_Wanted], supply: Supply, progress: Progress) -> None:
    """CPU: straight from the file into the parameter's memory; of a tensor's part, by way of memory of its own."""

    def memory(wanted: _Wanted) -> Iterator[tuple[TensorInfo, int, bool, Tensor]]:
        for piece in wanted.pieces:
            whole = filler.memory(piece.info)
            for offset in range(piece.start - piece.info.start, piece.stop - piece.info.start, _READ_BYTES):
                count = min(_READ_BYTES, piece.stop - piece.info.start - offset)
                raw = torch.empty(count, dtype=torch.uint8) if whole is None else whole[offset : offset + count]
                yield piece.info, offset, whole is None, raw

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "fp8-load") as executor:
        for wanted in shards:
            path, first = wanted.shard.path, wanted.shard.header.data_start
            fd = open_for_reading(supply.open(wanted.shard).path, path)
            try:
                reads: deque[tuple[TensorInfo, int, bool, Tensor, Future[None]]] = deque()
                for info, offset, apart, raw in memory(wanted):
                    start = first + info.start + offset
                    read = executor.submit(read_exactly, fd, memoryview(raw.numpy().data), start, path)
                    reads.append((info, offset, apart, raw, read))
                    if len(reads) > 2 * _THREADS:
                        _take(filler, *reads.popleft(), progress)
                while reads:
                    _take(filler, *reads.popleft(), progress)
            finally:
                os.close(fd)


def _take(
    filler: Filler, info: TensorInfo, offset: int, apart: bool, raw: Tensor, read: "Future[None]", progress: Progress
) -> None:
    read.result()
    if apart:
        filler.write(info, offset, raw)
    else:
        filler.wrote(info.name, raw.numel())
    progress.advance(raw.numel())


class _ShardBeingRead:
    """A shard whose spans are read ahead, in the order of the file."""

    def __init__(self, wanted: _Wanted, supply: Supply, pool: BufferPool) -> None:
        cut = [(at, min(at + _SPAN_BYTES, b)) for a, b in wanted.ranges for at in range(a, b, _SPAN_BYTES)]
        self.pieces = _Pieces(wanted.pieces)
        self.spans = deque(cut)
        first, path = wanted.shard.header.data_start, wanted.shard.path
        self._fd = open_for_reading(supply.open(wanted.shard).path, path)
        spans = [(first + start, first + stop) for start, stop in cut]
        self.reader = SpanReader(self._fd, spans, pool, where=path, threads=_THREADS, drop_behind=False)

    def close(self) -> None:
        self.reader.close()
        os.close(self._fd)


def _read_through_pinned(filler: Filler, shards: Iterable[_Wanted], supply: Supply, progress: Progress) -> None:
    """CUDA: threads read spans into pinned buffers, from which they are copied while others are read; the next shard's
    are begun before the last of one have arrived.
    """
    pool = BufferPool(_SPAN_BYTES, _SPANS, pinned=True)
    left = deque(shards)
    open_shards: deque[_ShardBeingRead] = deque()
    copying: deque[tuple[torch.cuda.Event, Span]] = deque()
    try:
        while left or open_shards:
            if left and (not open_shards or open_shards[-1].reader.begun()):
                open_shards.append(_ShardBeingRead(left.popleft(), supply, pool))
            first = open_shards[0]
            if not first.spans:
                open_shards.popleft().close()
                continue
            while copying and (len(copying) > _COPIES or not first.reader.waiting()):
                _release(copying)
                for shard in open_shards:
                    shard.reader.read_on()
            span, (start, stop) = first.reader.next(), first.spans.popleft()
            for info, low, high in first.pieces.in_span(start, stop):
                filler.write(info, low - info.start, span.data[low - start : high - start], non_blocking=True)
                progress.advance(high - low)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(filler.device))
            copying.append((event, span))
        while copying:
            _release(copying)
    finally:
        for shard in open_shards:
            shard.close()


def _release(copying: "deque[tuple[torch.cuda.Event, Span]]") -> None:
    event, span = copying.popleft()
    event.synchronize()
    span.release()


class _Pieces:
    """What is wanted of a shard in the order of its bytes, met span by span."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self._left = deque(pieces)

    def in_span(self, start: int, stop: int) -> Iterator[tuple[TensorInfo, int, int]]:
        """Tensors of which bytes in [start, stop) of the data section are wanted, and which. Each span lies behind the
        one before.
        """
        while self._left and self._left[0].start < stop:
            piece = self._left[0]
            yield piece.info, max(piece.start, start), min(piece.stop, stop)
            if piece.stop > stop:
                return
            self._left.popleft()

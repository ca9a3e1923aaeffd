"""Bytes from files into a model's tensors, in bounded host memory.

`Filler` gives every checkpoint tensor its memory on the device when its first bytes arrive and puts it into
the model when the last one has. A converted component's shards are read into it as they are; an original
one's go through the converter's stream, which hands out the same bytes that it would write to disk.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
from .weights import SCALES, Fp8Weight

# Measured on an H100's host: fewer threads leave its page cache waiting, larger spans cost more to pin than they save.
_THREADS = 12
_SPAN_BYTES = 16 * 1024 * 1024
_COPIES = 4  # spans on their way to the device at once
_SPANS = 2 * _THREADS  # pinned buffers
_READ_BYTES = 16 * 1024 * 1024
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "F8_E4M3": torch.int8, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip


@dataclass
class _Arriving:
    """A tensor that is on its way: `memory` is uint8, or of the final dtype where chunks are cast as they come."""

    info: TensorInfo
    memory: Tensor
    missing: int


class Filler:
    """Takes checkpoint bytes in any order and sets the model's parameters and buffers.

    names: checkpoint tensor name to the model's. dtype: of unquantised floating-point tensors in the loaded
    model. label: how messages call the component. Every scale that comes from a file is checked on its way, in host
    memory.
    """

    def __init__(
        self, model: nn.Module, names: Mapping[str, str], dtype: torch.dtype, device: torch.device, label: str
    ) -> None:
        self.model, self.names, self.dtype, self.device, self.label = model, names, dtype, device, label
        self.unexpected: list[str] = []
        self._parts = dict(model.named_modules())
        self._arriving: dict[str, _Arriving] = {}
        self._host_scales: dict[str, bytearray] = {}
        self._scales: dict[str, Tensor] = {}  # those from files, in host memory

    def check_dtypes(self, infos: Iterable[TensorInfo]) -> None:
        """Raises LoadError for integers where the model computes in floating point."""
        for info in infos:
            place, source = self._place(info), _DTYPES.get(info.dtype)
            if place is None or source is None or source.is_floating_point:
                continue
            part, leaf = place
            expected = part._parameters.get(leaf)  # an FP8 weight's is an integer itself
            if expected is not None and expected.is_floating_point():
                raise LoadError(
                    f"{info.name} of {self.label} has the dtype {info.dtype}, and {type(part).__name__} needs a "
                    "floating-point one; give a snapshot with its BF16, FP16 or FP32 weight."
                )

    def memory(self, info: TensorInfo) -> Tensor | None:
        """The bytes of a tensor to come, uint8 [nbytes] on the device; None for one that the model does not
        have.
        """
        arriving = self._arriving.get(info.name)
        if arriving is None:
            if self._place(info) is None:
                self.unexpected.append(info.name)
                return None
            if info.dtype not in _DTYPES:
                raise LoadError(f"{info.name} has the dtype {info.dtype}, which cannot be loaded.")
            raw = torch.empty(info.nbytes, dtype=torch.uint8, device=self.device)
            arriving = self._arriving[info.name] = _Arriving(info, raw, info.nbytes)
        return arriving.memory

    def wrote(self, name: str, count: int) -> None:
        """Says that `count` more bytes of the tensor are there; the last ones put it into the model."""
        arriving = self._arriving[name]
        arriving.missing -= count
        if arriving.missing == 0:
            del self._arriving[name]
            self._set(arriving.info, arriving.memory)

    def write(self, info: TensorInfo, offset: int, data: Tensor, non_blocking: bool = False) -> None:
        """Copies `data` (uint8) to byte `offset` of the tensor."""
        memory = self.memory(info)
        if memory is not None:
            if data.device != memory.device and data.device.type == "cpu" and self._is_scale(info):
                # A chunk may end within a number, so the bytes are gathered and checked once all are there.
                host = self._host_scales.setdefault(info.name, bytearray(info.nbytes))
                host[offset : offset + data.numel()] = data.numpy().data
            memory[offset : offset + data.numel()].copy_(data, non_blocking=non_blocking)
            self.wrote(info.name, data.numel())

    def write_cast(self, info: TensorInfo, offset: int, data: Tensor) -> None:
        """As `write`, for chunks that hold whole elements: they are cast to the final dtype one by one, so that a
        tensor never exists in both dtypes.
        """
        final = self._final_dtype(info)
        if final is None or final == _DTYPES.get(info.dtype):
            self.write(info, offset, data)
            return
        arriving = self._arriving.get(info.name)
        if arriving is None:
            memory = torch.empty(info.numel, dtype=final, device=self.device)
            arriving = self._arriving[info.name] = _Arriving(info, memory, info.nbytes)
        if data.data_ptr() % info.itemsize:
            data = data.clone()  # odd-sized neighbours in the file left it unaligned
        first = offset // info.itemsize
        arriving.memory[first : first + data.numel() // info.itemsize].copy_(data.view(_DTYPES[info.dtype]))
        self.wrote(info.name, data.numel())

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
        part = self._parts.get(path)
        if part is None or (leaf not in part._parameters and leaf not in part._buffers):
            return None
        return part, leaf

    def _is_scale(self, info: TensorInfo) -> bool:
        place = self._place(info)
        return place is not None and isinstance(place[0], Fp8Weight) and place[1] in SCALES

    def _final_dtype(self, info: TensorInfo) -> torch.dtype | None:
        """The tensor's dtype in the model; None for one that the model does not have."""
        place = self._place(info)
        source = _DTYPES.get(info.dtype)
        if place is None or source is None:
            return None
        part, leaf = place
        if isinstance(part, Fp8Weight) and leaf != "bias":
            return source
        return target_dtype(self.model, self.names[info.name], source, self.dtype)

    def _set(self, info: TensorInfo, memory: Tensor) -> None:
        place, final = self._place(info), self._final_dtype(info)
        assert place is not None
        part, leaf = place
        tensor = memory.view(_DTYPES[info.dtype]).to(final) if memory.dtype == torch.uint8 else memory
        tensor = tensor.view(info.shape)
        if self._is_scale(info):
            host = self._host_scales.pop(info.name, None)
            if host is not None:
                self._scales[info.name] = torch.frombuffer(host, dtype=tensor.dtype)
            elif tensor.device.type == "cpu":  # what was computed on the device comes from finite weights
                self._scales[info.name] = tensor
        old = part._parameters.get(leaf)
        expected = old if old is not None else part._buffers[leaf]
        if expected is not None and tensor.shape != expected.shape:
            if tensor.numel() != expected.numel() or not isinstance(part, Fp8Weight):
                raise LoadError(
                    f"{info.name} has the shape {list(tensor.shape)}, but {type(part).__name__} wants "
                    f"{list(expected.shape)}; the config does not fit the weights."
                )
            tensor = tensor.view(expected.shape)  # a scalar scale written as [1]
        if leaf in part._parameters:
            part._parameters[leaf] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
        else:
            part._buffers[leaf] = tensor
        if isinstance(part, Fp8Weight) and part.shared is not None:
            part.shared.settle(leaf)


def fill_from_shards(filler: Filler, shards: Sequence[Shard], supply: Supply, progress: Progress) -> None:
    """Reads every tensor of the shards as it is."""
    progress.start(sum(shard.header.file_size - shard.header.data_start for shard in shards))
    if filler.device.type == "cpu":
        _read_in_place(filler, shards, supply, progress)
    else:
        _read_through_pinned(filler, shards, supply, progress)


def fill_from_stream(filler: Filler, plan: ComponentPlan, supply: Supply, engine: Engine, progress: Progress) -> None:
    """Converts the component on the way in; the bytes are those of the offline conversion."""
    progress.start(sum(info.nbytes for shard in plan.shards for info in shard.schedule.outputs))
    for stream in convert_component(plan, supply, engine):
        infos = {info.name: info for info in stream.plan.schedule.outputs}
        for info in infos.values():
            if not info.nbytes:
                filler.write(info, 0, torch.empty(0, dtype=torch.uint8))
        for chunk in stream.chunks:
            filler.write_cast(infos[chunk.name], chunk.offset, chunk.data)
            progress.advance(chunk.data.numel())


def _read_in_place(filler: Filler, shards: Iterable[Shard], supply: Supply, progress: Progress) -> None:
    """CPU: straight from the file into the parameter's memory."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "fp8-load") as executor:
        for shard in shards:
            fd = open_for_reading(supply.open(shard).path, shard.path)
            try:
                reads = []
                for info in shard.header.tensors:
                    memory = filler.memory(info)
                    if memory is None:
                        continue
                    start = shard.header.data_start + info.start
                    for offset in range(0, info.nbytes, _READ_BYTES):
                        view = memoryview(memory.numpy().data)[offset : offset + _READ_BYTES]
                        read = executor.submit(read_exactly, fd, view, start + offset, shard.path)
                        reads.append((read, len(view)))
                for read, count in reads:
                    read.result()
                    progress.advance(count)
                for info in shard.header.tensors:
                    if info.name not in filler.unexpected:
                        filler.wrote(info.name, info.nbytes)
            finally:
                os.close(fd)


class _ShardBeingRead:
    """A shard whose spans are read ahead, from the first byte of its data on."""

    def __init__(self, shard: Shard, supply: Supply, pool: BufferPool) -> None:
        first, last = shard.header.data_start, shard.header.file_size
        spans = [(start, min(start + _SPAN_BYTES, last)) for start in range(first, last, _SPAN_BYTES)]
        spans = spans or [(first, first)]  # of tensors that are all empty
        self.tensors = _Tensors(shard)
        self.spans = deque((start - first, stop - first) for start, stop in spans)
        self._fd = open_for_reading(supply.open(shard).path, shard.path)
        self.reader = SpanReader(self._fd, spans, pool, where=shard.path, threads=_THREADS, drop_behind=False)

    def close(self) -> None:
        self.reader.close()
        os.close(self._fd)


def _read_through_pinned(filler: Filler, shards: Iterable[Shard], supply: Supply, progress: Progress) -> None:
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
            for info, low, high in first.tensors.in_span(start, stop):
                filler.write(info, low - info.start, span.data[low - start : high - start], non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(filler.device))
            copying.append((event, span))
            progress.advance(stop - start)
        while copying:
            _release(copying)
    finally:
        for shard in open_shards:
            shard.close()


def _release(copying: "deque[tuple[torch.cuda.Event, Span]]") -> None:
    event, span = copying.popleft()
    event.synchronize()
    span.release()


class _Tensors:
    """A shard's tensors in the order of their bytes, met span by span."""

    def __init__(self, shard: Shard) -> None:
        self._left = deque(shard.header.tensors)

    def in_span(self, start: int, stop: int) -> Iterator[tuple[TensorInfo, int, int]]:
        """Tensors with bytes in [start, stop) of the data section, and which; empty ones where they stand. Each span
        follows the one before.
        """
        while self._left:
            info = self._left[0]
            if info.start > stop or (info.start == stop and info.nbytes):
                return
            yield info, max(info.start, start), min(info.end, stop)
            if info.end > stop:
                return
            self._left.popleft()

"""Read -> quantise -> hand out: one source shard becomes a stream of output pieces, in bounded memory.

`stream_shard` yields the pieces of the output's data section front to back. The disk writer appends them to a
file; a loader copies them into parameters. On the CPU the arithmetic runs in a pool of threads while one thread
reads and hashes; with a CUDA device pieces are uploaded as they arrive and converted there. Codes and scales do
not depend on device, threads or who consumes them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from ..format.layout import INPUT_SCALE, W8A8
from ..plan.decide import PlannedTensor
from ..plan.plan import ShardPlan
from ..plan.schedule import POOL_BYTES, SLOT_BYTES, Segment, Slot, cut, scale_domain, split_unit
from ..telling.errors import ConvertError, ResumableError
from .quantize import TORCH_DTYPES, amax, quantize_blocks, quantize_tensor, tensor_scale
from .reading import BufferPool, Hasher, Span, SpanReader, open_for_reading, read_exactly

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Bytes of the output tensor `name` from byte `offset` on: uint8 [n].

    Codes and scales lie on the engine's device, kept bytes on the CPU. `data` is valid until the next chunk is taken.
    """

    name: str
    offset: int
    data: torch.Tensor


class Engine:
    """What conversions share: the device, the threads and the buffers. A context manager.

    device: where the arithmetic runs. workers: threads for it on the CPU. readers: threads that read.
    """

    def __init__(self, device: torch.device | str = "cpu", workers: int = 2, readers: int = 1) -> None:
        self.device = torch.device(device)
        self.readers = readers
        self.pool = BufferPool(pinned=self.device.type == "cuda")
        self._executor = ThreadPoolExecutor(workers, "fp8-quantize") if self.device.type == "cpu" else None
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Engine:
        if self._executor is not None:
            torch.set_num_threads(1)  # OpenMP over small chunks collapses under load; our own threads scale
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Run a task in a worker; on CUDA at once, since kernels queue up by themselves."""
        if self._executor is not None:
            return self._executor.submit(task)
        future: Future[T] = Future()
        future.set_result(task())
        return future


def stream_shard(
    shard: ShardPlan,
    engine: Engine,
    *,
    amaxes: Mapping[str, float] | None = None,
    input_scales: Mapping[str, float] | None = None,
    hasher: Hasher | None = None,
) -> Generator[Chunk, None, None]:
    """Yield the pieces of every output tensor, in the order and without the gaps of the output file.

    amaxes: for every group of `shard.schedule.measured` its amax, from `measure`. hasher: fed the whole source file
    in file order. Raises ConvertError for a weight with NaN or Inf, and where the file differs from its header.
    """
    assert shard.source.local is not None, "stream_shard reads local files"
    fd = open_for_reading(shard.source.local, shard.source.path)
    try:
        stream = _ShardStream(shard, engine, fd, amaxes or {}, input_scales or {}, hasher)
        yield from stream.copied() if shard.copied else stream.converted()
    finally:
        os.close(fd)


def measure(shards: Sequence[ShardPlan], groups: Sequence[str], engine: Engine) -> dict[str, float]:
    """max|w| of each scale domain in `groups`, over its members in all `shards`. Raises ConvertError for NaN or Inf."""
    found = dict.fromkeys(groups, 0.0)
    for shard in shards:
        members = [t for t in shard.tensors if scale_domain(t) in found]
        if not members:
            continue
        assert shard.source.local is not None
        pieces = [(i, t.info.start, t.info.nbytes, t.info.itemsize) for i, t in enumerate(members)]
        slots = cut(pieces, SLOT_BYTES)
        engine.pool.configure(SLOT_BYTES, POOL_BYTES // SLOT_BYTES)
        fd = open_for_reading(shard.source.local, shard.source.path)
        try:
            data_start = shard.source.header.data_start
            spans = [(data_start + s.start, data_start + s.stop) for s in slots]
            # The same bytes are read again soon: they may stay in the page cache.
            reader = SpanReader(
                fd, spans, engine.pool, where=shard.source.path, threads=engine.readers, drop_behind=False
            )
            with closing(reader):
                for slot in slots:
                    span = reader.next()
                    for segment in slot.segments:
                        tensor = members[segment.tensor]
                        x = _typed(_view(span, slot, segment, tensor), tensor).to(engine.device)
                        domain = scale_domain(tensor) or ""
                        found[domain] = max(found[domain], finite(amax(x), tensor, shard))
                    span.release()
        finally:
            os.close(fd)
    return found


@dataclass
class _Part:
    """A segment of a weight that waits for its scale; `span` is held until its codes are made."""

    segment: Segment
    x: torch.Tensor
    span: Span | None
    amax: Future[float]


@dataclass
class _Emit:
    """An output piece to come. `span` is released once the piece was taken."""

    name: str
    offset: int
    data: Future[torch.Tensor]
    span: Span | None = None


@dataclass
class _Blocks:
    """The scales of a block weight so far, row of blocks by row of blocks."""

    rows: list[Future[tuple[torch.Tensor, np.ndarray, bool]]] = field(default_factory=list)


class _ShardStream:
    def __init__(
        self,
        shard: ShardPlan,
        engine: Engine,
        fd: int,
        amaxes: Mapping[str, float],
        input_scales: Mapping[str, float],
        hasher: Hasher | None,
    ) -> None:
        self.shard, self.engine, self.fd, self.hasher = shard, engine, fd, hasher
        self.schedule = shard.schedule
        self.input_scales = input_scales
        self.data_start = shard.source.header.data_start
        self.last = {d: i for i, t in enumerate(shard.tensors) if (d := scale_domain(t)) is not None}
        self.scales = {domain: tensor_scale(amaxes[domain]) for domain in self.schedule.measured}
        self.waiting: dict[str, list[_Part]] = {}
        self.blocks: dict[int, _Blocks] = {}
        self.pending: deque[_Emit] = deque()

    # The two kinds of shard

    def copied(self) -> Iterator[Chunk]:
        """The data section as it is: nothing in this shard becomes FP8."""
        self._hash_header()
        with closing(self._spans(self.schedule.slots, hashed=True)) as spans:
            for slot, span in spans:
                for segment in slot.segments:
                    tensor = self.shard.tensors[segment.tensor]
                    yield Chunk(tensor.info.name, segment.start, _view(span, slot, segment, tensor))
                span.release()

    def converted(self) -> Iterator[Chunk]:
        self._hash_header()
        apart = {*self.schedule.early, *self.schedule.late}
        yield from self._pass(self._slots_of(self.schedule.early))
        yield from self._pass(self.schedule.slots, skip=apart, hashed=True)
        yield from self._late_scales()
        yield from self._pass(self._slots_of(self.schedule.late))

    # One pass over slots

    def _pass(self, slots: Sequence[Slot], skip: set[int] | None = None, hashed: bool = False) -> Iterator[Chunk]:
        """Convert the slots' segments and yield what is finished, keeping reader and workers busy."""
        with closing(self._spans(slots, hashed)) as spans:
            for slot, span in spans:
                for segment in slot.segments:
                    if skip is None or segment.tensor not in skip:
                        self._take(segment, slot, span, with_scale=skip is not None)
                span.release()
                yield from self._finished(wait=False)
            yield from self._finished(wait=True)

    def _spans(self, slots: Sequence[Slot], hashed: bool) -> Generator[tuple[Slot, Span], None, None]:
        self.engine.pool.configure(self.schedule.slot_bytes, self.schedule.pool_slots)
        spans = [(self.data_start + s.start, self.data_start + s.stop) for s in slots]
        reader = SpanReader(
            self.fd,
            spans,
            self.engine.pool,
            where=self.shard.source.path,
            hasher=self.hasher if hashed else None,
            threads=self.engine.readers,
        )
        self.reader = reader
        with closing(reader):
            for slot in slots:
                yield slot, reader.next()

    def _finished(self, wait: bool) -> Iterator[Chunk]:
        """Yield pending pieces that are done, or all of them; also wait where no buffer is free to read into."""
        while self.pending:
            if not (wait or self.pending[0].data.done() or not self.reader.waiting()):
                return
            emit = self.pending.popleft()
            yield Chunk(emit.name, emit.offset, emit.data.result())
            if emit.span is not None:
                emit.span.release()

    # One segment

    def _take(self, segment: Segment, slot: Slot, span: Span, with_scale: bool) -> None:
        tensor = self.shard.tensors[segment.tensor]
        view = _view(span, slot, segment, tensor)
        if not tensor.decision.fp8:
            self._emit(tensor.info.name, segment.start, _done(view), span.hold())
            return
        x = _typed(view, tensor)
        held: Span | None = None
        if self.engine.device.type == "cpu":
            held = span.hold()
        else:
            x = x.to(self.engine.device)  # from now on the device holds it, and the buffer is free
        if tensor.decision.block is not None:
            self._take_blocks(segment, tensor, x, held, with_scale)
        elif (domain := scale_domain(tensor) or "") in self.scales:
            self._emit_codes(segment, tensor, x, held, self.scales[domain], with_scale)
        else:
            parts = self.waiting.setdefault(domain, [])
            parts.append(_Part(segment, x, held, self.engine.submit(partial(amax, x))))
            if self.last[domain] == segment.tensor and segment.stop == tensor.info.nbytes:
                self._close_domain(domain, self.waiting.pop(domain))

    def _close_domain(self, domain: str, parts: list[_Part]) -> None:
        """Every member has arrived: their common scale is known, and their codes can be made."""
        largest = 0.0
        for part in parts:
            tensor = self.shard.tensors[part.segment.tensor]
            largest = max(largest, finite(part.amax.result(), tensor, self.shard))
        scale = tensor_scale(largest)
        for part in parts:
            tensor = self.shard.tensors[part.segment.tensor]
            self._emit_codes(part.segment, tensor, part.x, part.span, scale, with_scale=True)

    def _emit_codes(
        self,
        segment: Segment,
        tensor: PlannedTensor,
        x: torch.Tensor,
        span: Span | None,
        scale: np.float32,
        with_scale: bool,
    ) -> None:
        codes = self.engine.submit(partial(quantize_tensor, x, scale, _in_place(x)))
        self._emit(tensor.info.name, segment.start // tensor.info.itemsize, codes, span)
        if with_scale and segment.stop == tensor.info.nbytes:
            self._emit_scales(tensor, _done(_bytes(np.array(scale))))

    def _take_blocks(
        self, segment: Segment, tensor: PlannedTensor, x: torch.Tensor, span: Span | None, with_scale: bool
    ) -> None:
        assert tensor.decision.block is not None
        rows = x.view(-1, tensor.info.shape[1])
        quantized = self.engine.submit(partial(quantize_blocks, rows, tensor.decision.block, _in_place(x)))
        blocks = self.blocks.setdefault(segment.tensor, _Blocks())
        blocks.rows.append(quantized)
        codes = _then(quantized, lambda result: result[0])
        self._emit(tensor.info.name, segment.start // tensor.info.itemsize, codes, span)
        if segment.stop == tensor.info.nbytes:
            del self.blocks[segment.tensor]
            if with_scale:
                self._emit_scales(tensor, _Lazy(partial(self._block_scales, tensor, blocks)))

    def _block_scales(self, tensor: PlannedTensor, blocks: _Blocks) -> torch.Tensor:
        results = [row.result() for row in blocks.rows]
        if not all(ok for _, _, ok in results):
            raise _not_finite(tensor, self.shard)
        return _bytes(np.concatenate([scales for _, scales, _ in results]))

    def _emit_scales(self, tensor: PlannedTensor, data: Future[torch.Tensor]) -> None:
        assert tensor.decision.format is not None
        self._emit(tensor.decision.format.scale_key(tensor.module), 0, data)
        if tensor.module in self.input_scales:
            self._emit(
                tensor.module + INPUT_SCALE,
                0,
                _done(_bytes(np.array(self.input_scales[tensor.module], np.float32))),
            )

    def _emit(self, name: str, offset: int, data: Future[torch.Tensor], span: Span | None = None) -> None:
        self.pending.append(_Emit(name, offset, data, span))

    # What stands apart

    def _late_scales(self) -> Iterator[Chunk]:
        """The scales of weights that come last in the file, which stand before them."""
        for number in self.schedule.late:
            tensor = self.shard.tensors[number]
            if not tensor.decision.fp8:
                continue
            if tensor.decision.block is None:
                self._emit_scales(tensor, _done(_bytes(np.array(self.scales[scale_domain(tensor) or ""]))))
            else:
                blocks = _Blocks()
                for slot, span in self._spans(self._slots_of([number]), hashed=False):
                    for segment in slot.segments:
                        x = _typed(_view(span, slot, segment, tensor), tensor).to(self.engine.device)
                        rows = x.view(-1, tensor.info.shape[1])
                        blocks.rows.append(_done(quantize_blocks(rows, tensor.decision.block)))
                    span.release()
                self._emit_scales(tensor, _done(self._block_scales(tensor, blocks)))
            yield from self._finished(wait=True)

    def _slots_of(self, numbers: Sequence[int]) -> list[Slot]:
        tensors = [(i, self.shard.tensors[i]) for i in numbers]
        return cut([(i, t.info.start, t.info.nbytes, split_unit(t)) for i, t in tensors], self.schedule.slot_bytes)

    def _hash_header(self) -> None:
        """Hash the file's prefix and header, and see that they are those that the plan was made from."""
        raw = bytearray(self.data_start)
        read_exactly(self.fd, memoryview(raw), 0, self.shard.source.path)
        if raw[8:] != self.shard.source.header.raw:
            raise ResumableError(f"{self.shard.source.path} changed since it was planned; run again.")
        if self.hasher is not None:
            self.hasher.update(memoryview(raw))


class _Lazy(Future[torch.Tensor]):
    """A value that is computed by whoever takes it, in its turn."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> torch.Tensor:
        return self._compute()


def _then(future: Future[T], take: Callable[[T], torch.Tensor]) -> Future[torch.Tensor]:
    """The part of a result that `take` picks, done when the result is."""
    chained: Future[torch.Tensor] = Future()

    def pass_on(finished: Future[T]) -> None:
        if finished.cancelled():
            chained.cancel()
        elif error := finished.exception():
            chained.set_exception(error)
        else:
            chained.set_result(take(finished.result()))

    future.add_done_callback(pass_on)
    return chained


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _view(span: Span, slot: Slot, segment: Segment, tensor: PlannedTensor) -> torch.Tensor:
    """The segment's bytes in the span."""
    start = tensor.info.start + segment.start - slot.start
    return span.data[start : start + segment.stop - segment.start]


def _typed(view: torch.Tensor, tensor: PlannedTensor) -> torch.Tensor:
    """The bytes as elements of the source dtype; copied where odd-sized neighbours left them unaligned."""
    if view.data_ptr() % tensor.info.itemsize:
        view = view.clone()
    return view.view(TORCH_DTYPES[tensor.info.dtype])


def _in_place(x: torch.Tensor) -> torch.Tensor | None:
    """Where x's codes go: on the CPU over x itself, so that they need no memory of their own."""
    return None if x.is_cuda else x.view(-1).view(torch.uint8)[: x.numel()]


def _bytes(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).reshape(-1)).view(torch.uint8)


def finite(value: float, tensor: PlannedTensor, shard: ShardPlan) -> float:
    if not np.isfinite(value):
        raise _not_finite(tensor, shard)
    return value


def _not_finite(tensor: PlannedTensor, shard: ShardPlan) -> ConvertError:
    # --ignored-layers reaches the DiTs alone; any other component can only be left out whole.
    keep = f"keep its layer with --ignored-layers {tensor.module}"
    if tensor.decision.mode != W8A8:
        keep = "leave its component out by naming the others with --component"
    return ConvertError(
        f"{tensor.info.name} in {shard.source.path} holds NaN or Inf, which FP8 cannot scale; repair the weight or "
        f"{keep}."
    )

"""Read -> quantise -> hand out: one source shard becomes a stream of chunks of its output, in bounded memory.

`stream_shard` yields the chunks of the output's data section front to back. On the CPU the arithmetic runs in a pool of
threads while one thread reads and hashes; with a CUDA device what was read is uploaded as it arrives and converted
there. Codes and scales do not depend on device, threads or who consumes them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..format.layout import INPUT_SCALE
from ..format.record import RecordedError, measured_columns
from ..plan.decide import PlannedTensor
from ..plan.lora import LowRank
from ..plan.plan import ShardPlan
from ..plan.schedule import Segment, Slot, cut, scale_domain, split_unit
from ..snapshot.files import SourceFile
from ..snapshot.given_scale import GivenScale
from ..telling.errors import ResumableError
from .elements import finite, made_bf16, not_finite, segment_bytes, typed, without_nan
from .engine import Engine
from .merging import merge
from .quantize import amax, quantize_blocks, quantize_rows, quantize_tensor, tensor_scale
from .reading import BufferPool, Hasher, Span, SpanReader, open_for_reading, read_exactly
from .weight_error import Missed, Rows, weight_error


@dataclass(frozen=True)
class Chunk:
    """Bytes of the output tensor `name` from byte `offset` on: uint8 [n].

    Codes and scales lie on the engine's device, kept bytes on the CPU. `data` is valid until the next chunk is taken.
    """

    name: str
    offset: int
    data: torch.Tensor


def stream_shard(
    shard: ShardPlan,
    source: SourceFile,
    engine: Engine,
    *,
    amaxes: Mapping[str, float] | None = None,
    hasher: Hasher | None = None,
    errors: dict[str, RecordedError] | None = None,
) -> Generator[Chunk, None, None]:
    """Yield the chunks of every output tensor, in the order and without the gaps of the output file.

    amaxes: for every group of `shard.schedule.measured` its amax, from `measure`. hasher: fed the whole source file
    in file order. errors: takes, by module, what the codes miss of each weight, at its scale's chunk. Raises
    ConvertError for a weight with NaN or Inf, and where the file differs from its header.
    """
    schedule = shard.schedule
    fd = open_for_reading(source.path, source.where)
    try:
        with engine.pool(schedule.slot_bytes, schedule.least_slots, schedule.pool_slots) as pool:
            stream = _ShardStream(shard, engine, pool, fd, amaxes or {}, hasher, errors)
            yield from stream.copied() if shard.copied else stream.converted()
    finally:
        os.close(fd)


@dataclass
class _Unscaled:
    """A segment of a weight that waits for its scale; `span` is held until its codes are made."""

    segment: Segment
    x: torch.Tensor
    span: Span | None
    amax: Future[float]


@dataclass
class _Pending:
    """A chunk to come, which `take` gives once `work` is done. `span` is released when the chunk was taken."""

    name: str
    offset: int
    take: Callable[[], torch.Tensor]
    work: Future[Any] | None = None
    span: Span | None = None

    def ready(self) -> bool:
        return self.work is None or self.work.done()


@dataclass
class _Made:
    """What comes of some elements: codes until they are taken, what they miss, and scales that are of rows or blocks.

    finite: whether every element is; None where that is known before.
    """

    codes: torch.Tensor | None
    missed: Missed | Rows | None
    scales: np.ndarray | None = None
    finite: bool | None = None

    def take(self) -> torch.Tensor:
        """The codes, whose memory is free once they were used: the rest stays until the weight is done."""
        codes, self.codes = self.codes, None
        assert codes is not None
        return codes


class _ShardStream:
    """One shard on its way. `pending` has the chunks to come, in the order of the output."""

    def __init__(
        self,
        shard: ShardPlan,
        engine: Engine,
        pool: BufferPool,
        fd: int,
        amaxes: Mapping[str, float],
        hasher: Hasher | None,
        errors: dict[str, RecordedError] | None,
    ) -> None:
        self.shard, self.engine, self.pool, self.fd, self.hasher, self.errors = shard, engine, pool, fd, hasher, errors
        self.schedule = shard.schedule
        self.data_start = shard.source.header.data_start
        self.last = {d: i for i, t in enumerate(shard.tensors) if (d := scale_domain(t)) is not None}
        self.scales = {domain: tensor_scale(amaxes[domain]) for domain in self.schedule.measured}
        self.unscaled: dict[str, list[_Unscaled]] = {}
        self.made: list[Future[_Made]] = []  # of the weight whose codes are being made
        self.pending: deque[_Pending] = deque()

    # The two kinds of shard

    def copied(self) -> Iterator[Chunk]:
        """The data section as it is: nothing in this shard becomes FP8."""
        self._hash_header()
        with closing(self._spans(self.schedule.slots, hashed=True)) as spans:
            for slot, span in spans:
                for segment in slot.segments:
                    tensor = self.shard.tensors[segment.tensor]
                    data = segment_bytes(span, slot, segment, tensor)
                    data = self._merged_bytes(data, segment, tensor) if tensor.merges else data
                    yield Chunk(tensor.info.name, segment.start, data)
                span.release()

    def converted(self) -> Iterator[Chunk]:
        self._hash_header()
        apart = {*self.schedule.early, *self.schedule.late}
        yield from self._pass(self._slots_of(self.schedule.early))
        yield from self._pass(self.schedule.slots, skip=apart, hashed=True)
        yield from self._pass(self._slots_of(self.schedule.late))

    # One pass over slots

    def _pass(self, slots: Sequence[Slot], skip: Collection[int] = (), hashed: bool = False) -> Iterator[Chunk]:
        """Convert the slots' segments and yield what is finished, keeping reader and workers busy."""
        with closing(self._spans(slots, hashed)) as spans:
            for slot, span in spans:
                for segment in slot.segments:
                    if segment.tensor not in skip:
                        self._take(segment, slot, span)
                span.release()
                yield from self._finished(wait=False)
            yield from self._finished(wait=True)

    def _spans(self, slots: Sequence[Slot], hashed: bool) -> Generator[tuple[Slot, Span], None, None]:
        spans = [(self.data_start + s.start, self.data_start + s.stop) for s in slots]
        self.reader = SpanReader(
            self.fd,
            spans,
            self.pool,
            where=self.shard.source.path,
            hasher=self.hasher if hashed else None,
            threads=self.engine.readers,
        )
        with closing(self.reader):
            for slot in slots:
                yield slot, self.reader.next()

    def _finished(self, wait: bool) -> Iterator[Chunk]:
        """Yield pending chunks that are done, or all of them; also wait where no buffer is free to read into."""
        while self.pending:
            if not (wait or self.pending[0].ready() or not self.reader.waiting()):
                return
            chunk = self.pending.popleft()
            yield Chunk(chunk.name, chunk.offset, chunk.take())
            if chunk.span is not None:
                chunk.span.release()

    # One segment

    def _take(self, segment: Segment, slot: Slot, span: Span) -> None:
        tensor = self.shard.tensors[segment.tensor]
        if tensor.decision.dropped:
            return
        data = segment_bytes(span, slot, segment, tensor)
        if tensor.decision.given is not None:
            self._take_given(segment, tensor, tensor.decision.given, data, span.hold())
            return
        if not tensor.decision.fp8 and tensor.merges:
            work = self.engine.submit(partial(self._merged_bytes, data, segment, tensor))
            self.pending.append(_Pending(tensor.info.name, segment.start, work.result, work, span.hold()))
            return
        if not tensor.decision.fp8:
            self.pending.append(_Pending(tensor.info.name, segment.start, lambda: data, span=span.hold()))
            return
        x = typed(data, tensor)
        held: Span | None = None
        if self.engine.device.type == "cpu":
            held = span.hold()
        else:
            x = x.to(self.engine.device)  # from now on the device holds it, and the buffer is free
        first = segment.start // tensor.info.itemsize
        domain = scale_domain(tensor)
        if domain is None:
            self._take_rows(segment, tensor, x, held)
        elif domain in self.scales:
            self._quantize(segment, x, held, self.scales[domain], tensor.merges)
        else:
            largest = self.engine.submit(lambda: amax(merge(x, first, tensor.merges)))
            self.unscaled.setdefault(domain, []).append(_Unscaled(segment, x, held, largest))
            if self.last[domain] == segment.tensor and segment.stop == tensor.info.nbytes:
                self._scale(self.unscaled.pop(domain))

    def _scale(self, segments: list[_Unscaled]) -> None:
        """Every member of a domain has arrived: their common scale is known, and their codes can be made."""
        largest = 0.0
        for part in segments:
            tensor = self.shard.tensors[part.segment.tensor]
            largest = max(largest, finite(part.amax.result(), tensor, self.shard.source.path))
        for part in segments:
            self._quantize(part.segment, part.x, part.span, tensor_scale(largest))

    def _quantize(
        self,
        segment: Segment,
        x: torch.Tensor,
        span: Span | None,
        scale: np.float32,
        merges: Sequence[LowRank] = (),
    ) -> None:
        """merges: what is still to be added to x."""
        tensor = self.shard.tensors[segment.tensor]
        first = segment.start // tensor.info.itemsize

        def work() -> _Made:
            weights = merge(x, first, merges)
            missed = self._missed(weights, tensor, first)
            return _Made(quantize_tensor(weights, scale, _in_place(x), missed), missed)

        self._append_codes(segment, tensor, self.engine.submit(work), span, lambda _: _bytes(np.array(scale)))

    def _take_rows(self, segment: Segment, tensor: PlannedTensor, x: torch.Tensor, span: Span | None) -> None:
        """Some rows, of blocks or not: their scales come with their codes, and are handed out behind the last."""
        block, columns = tensor.decision.block, tensor.info.shape[1]
        first = segment.start // tensor.info.itemsize

        def work() -> _Made:
            weights = merge(x, first, tensor.merges).view(-1, columns)
            missed = self._missed(weights, tensor, first)
            if block is None:
                codes, scales, ok = quantize_rows(weights, _in_place(x), missed)
                return _Made(codes, missed.in_rows(scales) if missed and ok else None, scales, ok)
            codes, scales, ok = quantize_blocks(weights, block, _in_place(x), missed)
            by_row = np.repeat(scales, block[0], axis=0)[: len(weights)]
            return _Made(codes, missed.in_rows(by_row) if missed and ok else None, scales, ok)

        self._append_codes(segment, tensor, self.engine.submit(work), span, partial(self._scales_of_rows, tensor))

    def _append_codes(
        self,
        segment: Segment,
        tensor: PlannedTensor,
        made: Future[_Made],
        span: Span | None,
        scales: Callable[[Sequence[_Made]], torch.Tensor],
    ) -> None:
        """Codes to come; behind a weight's last ones its scales, which `scales` takes from all that was made."""
        self.made.append(made)
        offset = segment.start // tensor.info.itemsize
        self.pending.append(_Pending(tensor.info.name, offset, lambda: made.result().take(), made, span))
        if segment.stop == tensor.info.nbytes:
            self._append_scales(tensor, partial(self._finish, tensor, self.made, scales))
            self.made = []

    def _finish(
        self,
        tensor: PlannedTensor,
        made: Sequence[Future[_Made]],
        scales: Callable[[Sequence[_Made]], torch.Tensor],
    ) -> torch.Tensor:
        """The bytes of a weight's scales; its error goes where it is wanted."""
        results = [future.result() for future in made]  # all done: their codes stand before this chunk
        data = scales(results)
        missed = [m.in_rows() if isinstance(m := result.missed, Missed) else m for result in results]
        if self.errors is not None and (rows := [part for part in missed if part is not None]):
            self.errors[tensor.module] = weight_error(rows, tensor.info.numel)
        return data

    def _missed(self, x: torch.Tensor, tensor: PlannedTensor, first: int) -> Missed | None:
        """Where to sum up what the codes of x miss, if somebody asked for it."""
        columns = measured_columns(tensor.info.shape)
        if self.errors is None or columns is None:
            return None
        block = tensor.decision.block
        return Missed.of(x, first, columns, None if block is None else block[1])

    def _scales_of_rows(self, tensor: PlannedTensor, made: Sequence[_Made]) -> torch.Tensor:
        if not all(part.finite for part in made):
            raise not_finite(tensor, self.shard.source.path)
        return _bytes(np.concatenate([part.scales for part in made if part.scales is not None]))

    def _take_given(
        self, segment: Segment, tensor: PlannedTensor, given: GivenScale, codes: torch.Tensor, span: Span
    ) -> None:
        """Codes that another tool made: copied, their scale behind them, or made BF16 where they are not to be FP8."""
        where = self.shard.source.path
        if not tensor.decision.fp8:
            work = self.engine.submit(partial(made_bf16, codes, given.values, tensor, where))
            self.pending.append(_Pending(tensor.info.name, 2 * segment.start, work.result, work, span))
            return
        work = self.engine.submit(partial(without_nan, codes, tensor, where))
        self.pending.append(_Pending(tensor.info.name, segment.start, work.result, work, span))
        if segment.stop == tensor.info.nbytes:
            self._append_scales(tensor, lambda: _bytes(given.values))

    def _append_scales(self, tensor: PlannedTensor, take: Callable[[], torch.Tensor]) -> None:
        assert tensor.decision.format is not None
        self.pending.append(_Pending(tensor.decision.format.scale_key(tensor.module), 0, take))
        if (scale := tensor.decision.input_scale) is not None:
            key = tensor.module + INPUT_SCALE
            self.pending.append(_Pending(key, 0, lambda: _bytes(np.array(scale, np.float32))))

    def _merged_bytes(self, data: torch.Tensor, segment: Segment, tensor: PlannedTensor) -> torch.Tensor:
        """A kept weight's bytes with what LoRAs add to it."""
        x = typed(data, tensor).to(self.engine.device)
        merge(x, segment.start // tensor.info.itemsize, tensor.merges)
        finite(amax(x), tensor, self.shard.source.path)
        return x.cpu().view(torch.uint8)

    # What stands apart, and the header

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


def _in_place(x: torch.Tensor) -> torch.Tensor | None:
    """Where x's codes go: on the CPU over x itself, so that they need no memory of their own."""
    return None if x.is_cuda else x.view(-1).view(torch.uint8)[: x.numel()]


def _bytes(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).reshape(-1)).view(torch.uint8)

"""max|w| of weights that are measured before they are converted, since their codes do not wait for a common scale."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable
from contextlib import closing

import torch

from ..plan.decide import PlannedTensor
from ..plan.plan import ShardPlan
from ..plan.schedule import cut, scale_domain
from ..snapshot.files import SourceFile
from .elements import finite, segment_bytes, typed
from .engine import Engine
from .merging import merge
from .quantize import TORCH_DTYPES, amax
from .reading import SpanReader, open_for_reading
from .supply import Supply

_LEAST_SLOTS = 4


def measure(shards: Iterable[ShardPlan], groups: Collection[str], supply: Supply, engine: Engine) -> dict[str, float]:
    """max|w| of each scale domain in `groups`, over its members in all `shards`, those of one component.

    Members in shards that have not arrived are fetched by range. Raises ConvertError for NaN or Inf.
    """
    found = dict.fromkeys(groups, 0.0)
    for shard in shards:
        members = [t for t in shard.tensors if scale_domain(t) in found]
        if not members:
            continue
        source = supply.find(shard.source)
        elements = _far(shard, members, supply) if source is None else _near(shard, members, source, engine)
        with closing(elements):
            for tensor, x in elements:
                domain = scale_domain(tensor) or ""
                found[domain] = max(found[domain], finite(amax(x), tensor, shard.source.path))
    return found


def measured_bytes(shards: Iterable[ShardPlan], groups: Collection[str]) -> int:
    """Bytes that `measure` reads."""
    return sum(t.info.nbytes for s in shards for t in s.tensors if scale_domain(t) in groups)


def _near(
    shard: ShardPlan, members: list[PlannedTensor], source: SourceFile, engine: Engine
) -> Generator[tuple[PlannedTensor, torch.Tensor], None, None]:
    """The elements of the members, some at a time, on the engine's device, merged; read from a file that is here."""
    schedule, data_start = shard.schedule, shard.source.header.data_start
    slots = cut([(i, t.info.start, t.info.nbytes, t.info.itemsize) for i, t in enumerate(members)], schedule.slot_bytes)
    fd = open_for_reading(source.path, source.where)
    try:
        spans = [(data_start + s.start, data_start + s.stop) for s in slots]
        # The same bytes are read again soon: they may stay in the page cache.
        with (
            engine.pool(schedule.slot_bytes, _LEAST_SLOTS, schedule.pool_slots) as pool,
            closing(
                SpanReader(fd, spans, pool, where=source.where, threads=engine.readers, drop_behind=False)
            ) as reader,
        ):
            for slot in slots:
                span = reader.next()
                for segment in slot.segments:
                    tensor = members[segment.tensor]
                    x = typed(segment_bytes(span, slot, segment, tensor), tensor).to(engine.device)
                    yield tensor, merge(x, segment.start // tensor.info.itemsize, tensor.merges)
                span.release()
    finally:
        os.close(fd)


def _far(
    shard: ShardPlan, members: list[PlannedTensor], supply: Supply
) -> Generator[tuple[PlannedTensor, torch.Tensor], None, None]:
    """The same, fetched by range from where the shard lies, in host memory."""
    data_start, step = shard.source.header.data_start, shard.schedule.slot_bytes
    for tensor in members:
        start, stop = data_start + tensor.info.start, data_start + tensor.info.end
        for at in range(start, stop, step):
            data = bytearray(supply.range(shard.source, at, min(at + step, stop)))
            x = torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.info.dtype])
            yield tensor, merge(x, (at - start) // tensor.info.itemsize, tensor.merges)

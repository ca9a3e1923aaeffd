"""How one shard is read and the order of its output tensors: pure, from offsets and sizes alone.

Four words are used for bytes here and in `stream`. A *slot* is what is read at a time: at most `slot_bytes` of the
source's data section, cut where no element or row of blocks is split. A *segment* is one tensor's share of a slot. A
*span* is a slot whose bytes have been read, in a buffer that is held until nobody needs them. A *chunk* is what is
handed out: bytes of one output tensor.

The source is read once, front to back. Output tensors are laid out in the order in which they can be finished, so that
they are written front to back too, and every scale follows its weight. Two things stand apart:

- A fusion group whose slots do not fit into the pool together, or whose members lie in other shards too, is
  measured first (`measured`): its weights are read twice, once for their amax.
- Kept tensors of 8-byte elements come first (`early`), those whose bytes are no multiple of 4 come last (`late`),
  so that every offset stays a multiple of its dtype's size; both are read a second time, out of order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..format.header import DTYPE_BITS, TensorInfo
from ..format.layout import INPUT_SCALE
from ..telling.notebook import Brief
from .decide import PlannedTensor, scale_bytes

_FREE_SLOTS = 6  # slots that reading, converting and writing need beside those that a group holds
_LEAST_FREE_SLOTS = 3  # where several shards share the memory; with fewer each would wait for its own writing


@dataclass(frozen=True)
class Memory:
    """What the conversion of a shard may take: bytes of a slot, and of all slots that are held at once."""

    slot_bytes: int = 8 * 1024 * 1024
    pool_bytes: int = 192 * 1024 * 1024


MEMORY = Memory()


@dataclass(frozen=True)
class Segment:
    """Bytes [start, stop) of the shard's tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, repr=False)
class Slot(Brief):
    """Bytes [start, stop) of the data section and the segments of tensors in them."""

    start: int
    stop: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, repr=False)
class Schedule(Brief):
    """The reading and writing order of one shard. `outputs` have their offsets in the output's data section.

    pool_slots: how many slots may be held at once. least_slots: how many reading cannot do without.
    """

    outputs: tuple[TensorInfo, ...]
    slots: tuple[Slot, ...]
    slot_bytes: int
    pool_slots: int
    least_slots: int
    measured: tuple[str, ...]
    early: tuple[int, ...]
    late: tuple[int, ...]


def make_schedule(
    tensors: Sequence[PlannedTensor], spread_groups: Collection[str], memory: Memory = MEMORY
) -> Schedule:
    """Schedule the tensors (in data order) of one shard. spread_groups: fusion groups with members in others."""
    slot_bytes = max(memory.slot_bytes, *(split_unit(t) for t in tensors), 1)
    pool_slots = max(4, memory.pool_bytes // slot_bytes)
    wide = (i for i, t in enumerate(tensors) if not t.decision.fp8 and t.info.itemsize > 4)
    early = [i for i in wide if not tensors[i].decision.dropped]
    late = [i for i, t in enumerate(tensors) if i not in early and t.out_bytes % 4]
    late.sort(key=lambda i: -DTYPE_BITS[tensors[i].out_dtype])
    slots = cut([(i, t.info.start, t.info.nbytes, split_unit(t)) for i, t in enumerate(tensors)], slot_bytes)
    measured = {g for t in tensors if (g := scale_domain(t)) in spread_groups and g is not None}
    held = [*_held(tensors, slots, measured)]
    while (too_large := next((h for h in held if h.slots > max(1, pool_slots - _FREE_SLOTS)), None)) is not None:
        measured.add(too_large.largest)
        held = [*_held(tensors, slots, measured)]
    order = _order(tensors, measured, early, late)
    return Schedule(
        tuple(_lay_out([tensors[i] for i in order])),
        tuple(slots),
        slot_bytes,
        pool_slots,
        min(pool_slots, max((h.slots for h in held), default=0) + _LEAST_FREE_SLOTS),
        tuple(sorted(measured)),
        tuple(early),
        tuple(late),
    )


def cut(extents: Iterable[tuple[int, int, int, int]], slot_bytes: int) -> list[Slot]:
    """Cut (tensor, start, nbytes, unit) extents, adjacent or not, into slots; a tensor is split at its units only."""
    slots: list[Slot] = []
    segments: list[Segment] = []
    begin = position = 0

    def flush() -> None:
        nonlocal segments, begin
        if segments:
            slots.append(Slot(begin, position, tuple(segments)))
        segments, begin = [], position

    for tensor, start, nbytes, unit in extents:
        if start != position:
            flush()
            begin = position = start
        done = 0
        while done < nbytes:
            take = min(slot_bytes - (position - begin), nbytes - done)
            if done + take < nbytes:
                take -= take % unit
            if take:
                segments.append(Segment(tensor, done, done + take))
                done += take
                position += take
            if done < nbytes or position - begin == slot_bytes:
                flush()
    flush()
    return slots


def scale_domain(tensor: PlannedTensor) -> str | None:
    """What one per-tensor scale covers: the fusion group, else the tensor itself; None where none is to be found."""
    if not tensor.decision.per_tensor or tensor.decision.given is not None:
        return None
    return tensor.decision.group or tensor.info.name


def split_unit(tensor: PlannedTensor) -> int:
    """Bytes at whose multiples a tensor may be split: a row, a row of blocks, or an element."""
    how = tensor.decision.format
    if how is None or how.per_tensor:
        return tensor.info.itemsize
    rows = min(how.block[0], tensor.info.shape[0]) if how.block else 1
    return rows * tensor.info.shape[1] * tensor.info.itemsize


def _last_members(tensors: Sequence[PlannedTensor]) -> dict[str, int]:
    return {g: i for i, t in enumerate(tensors) if (g := scale_domain(t)) is not None}


class _Held(NamedTuple):
    """At one moment: how many slots wait for scales, and the scale domain that holds the most of them."""

    slots: int
    largest: str


def _held(tensors: Sequence[PlannedTensor], slots: Sequence[Slot], measured: Collection[str]) -> Iterator[_Held]:
    """What is held after each segment of a weight whose scale domain is not measured."""
    last = _last_members(tensors)
    held: dict[str, set[int]] = {}
    for number, slot in enumerate(slots):
        for segment in slot.segments:
            domain = scale_domain(tensors[segment.tensor])
            if domain is None or domain in measured:
                continue
            held.setdefault(domain, set()).add(number)
            yield _Held(len(set().union(*held.values())), max(held, key=lambda d: len(held[d])))
            if last[domain] == segment.tensor and segment.stop == tensors[segment.tensor].info.nbytes:
                del held[domain]


def _order(
    tensors: Sequence[PlannedTensor], measured: Collection[str], early: Sequence[int], late: Sequence[int]
) -> list[int]:
    """Tensor numbers in the order in which their output can be finished."""
    last = _last_members(tensors)
    apart = {*early, *late}
    order = list(early)
    waiting: dict[str, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if number in apart or tensor.decision.dropped:
            continue
        domain = scale_domain(tensor)
        if domain is None or domain in measured:
            order.append(number)
            continue
        waiting.setdefault(domain, []).append(number)
        if last[domain] == number:
            order += waiting.pop(domain)
    return order + list(late)


def _lay_out(tensors: Iterable[PlannedTensor]) -> list[TensorInfo]:
    """Tensors with their scales behind them, in the order given, without gaps."""
    outputs: list[TensorInfo] = []
    position = 0

    def place(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal position
        outputs.append(TensorInfo(name, dtype, shape, position, position + nbytes))
        position += nbytes

    for tensor in tensors:
        how, shape = tensor.decision.format, tensor.info.shape
        place(tensor.info.name, tensor.out_dtype, shape, tensor.out_bytes)
        if how is not None:
            place(how.scale_key(tensor.module), "F32", how.scale_shape(shape), scale_bytes(shape, how))
        if tensor.decision.input_scale is not None:
            place(tensor.module + INPUT_SCALE, "F32", (), 4)
    return outputs

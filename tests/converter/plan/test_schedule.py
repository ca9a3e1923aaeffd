"""The reading and writing order of a shard: nothing lost, nothing overlapping, everything aligned, groups bounded."""

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from shards import Weights, fp8, random_tensor, weights

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.converter.plan.schedule import (
    MEMORY,
    Memory,
    Schedule,
    Segment,
    Slot,
    cut,
    make_schedule,
    scale_domain,
    split_unit,
)

ITEM_BYTES = {"F8_E4M3": 1, "F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}


def scheduled(w: Weights, shard: int = 0, memory: Memory = MEMORY) -> Schedule:
    return make_schedule(w.planned(w.shards[shard]), w.spread, memory)


SMALL = Memory(slot_bytes=64, pool_bytes=512)


# Cutting into slots


def test_cutting_small_neighbours_share_a_slot() -> None:
    assert cut([(0, 0, 10, 2), (1, 10, 6, 1)], 16) == [Slot(0, 16, (Segment(0, 0, 10), Segment(1, 0, 6)))]


def test_cutting_a_large_tensor_at_its_units() -> None:
    assert cut([(0, 0, 10, 4)], 9) == [Slot(0, 8, (Segment(0, 0, 8),)), Slot(8, 10, (Segment(0, 8, 10),))]


def test_cutting_pieces_apart() -> None:
    assert cut([(3, 100, 4, 1), (1, 8, 4, 1)], 64) == [
        Slot(100, 104, (Segment(3, 0, 4),)),
        Slot(8, 12, (Segment(1, 0, 4),)),
    ]


def test_cutting_nothing() -> None:
    assert cut([], 8) == cut([(0, 0, 0, 1)], 8) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.integers(1, 9)), max_size=8), st.integers(9, 40))
def test_cutting_anything(drawn: list[tuple[int, int, int]], slot_bytes: int) -> None:
    pieces, position = [], 0
    for number, (gap, nbytes, unit) in enumerate(drawn):
        position += gap
        pieces.append((number, position, nbytes, unit))
        position += nbytes
    seen: dict[int, int] = {}
    for slot in cut(pieces, slot_bytes):
        assert 0 < slot.stop - slot.start <= slot_bytes
        place = slot.start
        for segment in slot.segments:
            _, start, nbytes, unit = pieces[segment.tensor]
            assert segment.start == seen.get(segment.tensor, 0)
            assert start + segment.start == place
            assert segment.stop % unit == 0 or segment.stop == nbytes
            seen[segment.tensor] = segment.stop
            place += segment.stop - segment.start
        assert place == slot.stop
    assert seen == {number: nbytes for number, _, nbytes, _ in pieces if nbytes}


# The output's layout


def check_layout(w: Weights, shard: int, memory: Memory) -> None:
    plan, planned = scheduled(w, shard, memory), w.planned(w.shards[shard])
    expected = w.expected()[shard]
    position = 0
    for output in plan.outputs:
        assert output.start == position
        assert output.start % ITEM_BYTES[output.dtype] == 0
        position = output.end
    assert {o.name: (o.dtype, o.shape, o.nbytes) for o in plan.outputs} == {
        name: (dtype, shape, len(data)) for name, (dtype, shape, data) in expected.items()
    }
    assert len(plan.outputs) == len(expected)
    assert all(slot.stop - slot.start <= plan.slot_bytes for slot in plan.slots)
    read = [(slot.start, slot.stop) for slot in plan.slots]
    assert [start for start, _ in read] == [0, *(stop for _, stop in read[:-1])][: len(read)]
    assert (read[-1][1] if read else 0) == sum(len(data) for _, _, data in w.shards[shard].values())
    assert all(split_unit(t) <= plan.slot_bytes for t in planned if t.info.nbytes)


@given(weights(), st.sampled_from([16, 64, 1024, MEMORY.slot_bytes]), st.sampled_from([1, 4, 9, 24]))
def test_any_layout(w: Weights, slot_bytes: int, slots: int) -> None:
    for shard in range(len(w.shards)):
        check_layout(w, shard, Memory(slot_bytes, slot_bytes * slots))


@given(weights(), st.sampled_from([16, 64, 1024]), st.sampled_from([1, 4, 9, 24]))
def test_what_waits_for_its_scale_fits_the_pool(w: Weights, slot_bytes: int, slots: int) -> None:
    """Walk through the slots: those held by weights whose scale is not known yet leave room for reading."""
    for tensors in w.shards:
        planned = w.planned(tensors)
        plan = make_schedule(planned, w.spread, Memory(slot_bytes, slot_bytes * slots))
        left = {d: sum(t.info.nbytes for t in planned if scale_domain(t) == d) for d in map(scale_domain, planned)}
        held: dict[str, set[int]] = {}
        for number, slot in enumerate(plan.slots):
            for segment in slot.segments:
                domain = scale_domain(planned[segment.tensor])
                if domain is None or domain in plan.measured:
                    continue
                left[domain] -= segment.stop - segment.start
                held.setdefault(domain, set()).add(number)
                assert len(set().union(*held.values())) < plan.least_slots <= plan.pool_slots
                if left[domain] == 0:
                    del held[domain]
        assert not held


def names(plan: Schedule) -> list[str]:
    return [o.name for o in plan.outputs]


def test_scales_follow_their_weights() -> None:
    decisions = {"a.weight": fp8(), "b.weight": fp8((4, 4))}
    shard = {n: random_tensor("BF16", (8, 4), i) for i, n in enumerate(["a.weight", "k", "b.weight"])}
    plan = scheduled(Weights([shard], decisions, {"a": 0.5}))
    assert names(plan) == ["a.weight", "a.weight_scale", "a.input_scale", "k", "b.weight", "b.weight_scale_inv"]
    assert WeightFormat("w8a8", (4, 4)).scale_key("b") == "b.weight_scale_inv"


def test_a_group_is_written_when_its_last_member_was_read() -> None:
    decisions = {"q.weight": fp8(group="g"), "k.weight": fp8(group="g")}
    shard = {n: random_tensor("BF16", (2, 2), i) for i, n in enumerate(["q.weight", "x", "k.weight", "y"])}
    plan = scheduled(Weights([shard], decisions))
    assert names(plan) == ["x", "q.weight", "q.weight_scale", "k.weight", "k.weight_scale", "y"]
    assert plan.measured == ()


def test_a_spread_group_is_measured_first() -> None:
    decisions = {"q.weight": fp8(group="g"), "k.weight": fp8(group="g")}
    tensor = random_tensor("BF16", (2, 2), 0)
    w = Weights([{"q.weight": tensor, "x": tensor}, {"k.weight": tensor}], decisions)
    assert scheduled(w, 0).measured == scheduled(w, 1).measured == ("g",)
    assert names(scheduled(w, 0)) == ["q.weight", "q.weight_scale", "x"]


@pytest.mark.parametrize(("rows", "measured"), [(8, ()), (24, ("a.weight",))])
def test_a_weight_larger_than_the_pool_is_measured_first(rows: int, measured: tuple[str, ...]) -> None:
    shard = {"a.weight": random_tensor("BF16", (rows, 8), 0)}  # 16 bytes a row; two slots may be held
    assert scheduled(Weights([shard], {"a.weight": fp8()}), memory=SMALL).measured == measured


def test_the_largest_of_overlapping_groups_is_measured() -> None:
    decisions = {f"{g}{i}.weight": fp8(group=g) for g in "ab" for i in (1, 2)}
    small, large = random_tensor("BF16", (2, 4), 0), random_tensor("BF16", (32, 8), 0)
    shard = {"a1.weight": small, "b1.weight": large, "a2.weight": small, "b2.weight": large}
    assert scheduled(Weights([shard], decisions), memory=SMALL).measured == ("b",)


def test_what_would_misalign_the_rest_stands_apart() -> None:
    """8-byte elements first, small odd tensors last, the widest of them first."""
    shard = {
        "flag": random_tensor("BOOL", (3,), 1),
        "half": random_tensor("F16", (3,), 2),
        "a.weight": random_tensor("BF16", (4, 4), 3),
        "count": random_tensor("I64", (), 4),
        "wide": random_tensor("F64", (3,), 5),
    }
    plan = scheduled(Weights([shard], {"a.weight": fp8()}))
    assert names(plan) == ["count", "wide", "a.weight", "a.weight_scale", "half", "flag"]
    assert plan.measured == ()


def test_a_block_taller_than_the_weight_needs_no_larger_slot() -> None:
    shard = {"a.weight": random_tensor("BF16", (8, 4), 0)}
    plan = scheduled(Weights([shard], {"a.weight": fp8((2**40, 4))}))
    assert plan.slot_bytes == MEMORY.slot_bytes


def test_a_row_of_blocks_is_never_split() -> None:
    shard = {"a.weight": random_tensor("BF16", (40, 8), 0)}
    plan = scheduled(Weights([shard], {"a.weight": fp8((16, 4))}), memory=SMALL)
    assert plan.slot_bytes == 16 * 8 * 2
    assert [(s.start, s.stop) for s in plan.slots] == [(0, 256), (256, 512), (512, 640)]
    assert reference.quantize_blocks(reference.floats("BF16", shard["a.weight"][2]).reshape(40, 8), (16, 4))[
        1
    ].shape == (3, 2)

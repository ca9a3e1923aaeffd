"""The buffers of shards that are under way at the same time: each has its own, and all stay within one budget."""

import contextlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import Tensor

from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.converter.plan.decide import Decision, PlannedTensor
from fp8_convert.converter.plan.schedule import make_schedule
from fp8_convert.converter.stream.engine import Engine
from fp8_convert.converter.stream.reading import BufferPool

MIB = 2**20
SLOT = 8 * MIB
WAIT_S = 30


def taken(pool: BufferPool) -> list[Tensor]:
    """All of its buffers, which it has again."""
    buffers = list(iter(pool.take, None))
    for buffer in buffers:
        pool.give_back(buffer)
    return buffers


def size(pool: BufferPool) -> int:
    return sum(buffer.numel() for buffer in taken(pool))


def places(pool: BufferPool) -> set[int]:
    return {buffer.data_ptr() for buffer in taken(pool)}


def test_a_shard_alone_has_all_that_it_may() -> None:
    with Engine().pool(SLOT, 6, 24) as pool:
        assert size(pool) == 24 * SLOT


@pytest.mark.parametrize(("least", "expected"), [(6, 16), (16, 16), (18, 18)])
def test_with_others_it_has_its_share_or_what_it_needs(least: int, expected: int) -> None:
    with Engine(shards=4).pool(SLOT, least, 24) as pool:
        assert size(pool) == expected * SLOT


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_all_shares_fit_the_budget(shards: int) -> None:
    engine = Engine(shards=shards)
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(engine.pool(SLOT, 6, 24)) for _ in range(shards)]
        assert sum(map(size, pools)) <= 192 * MIB + (shards - 1) * 128 * MIB
        assert len({id(pool) for pool in pools}) == shards


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_with_large_weights_do_not_wait_for_each_other(shards: int) -> None:
    """Qwen-Image's DiT has one of 113 MB in every block, which is held until its scale is known."""
    info = TensorInfo("a.weight", "BF16", (18_432, 3072), 0, 2 * 18_432 * 3072)
    weight = PlannedTensor(info, Decision("", "", format=WeightFormat("w8a8")))
    schedule = make_schedule([weight], ())
    engine = Engine(shards=shards)
    together = threading.Barrier(shards, timeout=WAIT_S)

    def convert(_: int) -> bool:
        with engine.pool(schedule.slot_bytes, schedule.least_slots, schedule.pool_slots):
            together.wait()
            return True

    with ThreadPoolExecutor(shards) as threads:
        assert all(threads.map(convert, range(shards)))


def test_a_shard_that_needs_more_waits_for_the_others() -> None:
    engine = Engine(shards=2)
    with engine.pool(SLOT, 24, 24):
        entered = threading.Event()

        def enter() -> None:
            with engine.pool(SLOT, 24, 24):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(WAIT_S)
    thread.join(WAIT_S)


def test_one_that_is_larger_than_the_budget_has_it_alone() -> None:
    with Engine(shards=2).pool(512 * MIB, 4, 4):
        pass


def test_buffers_are_used_again_by_one_shard_at_a_time() -> None:
    engine = Engine(shards=3)
    with engine.pool(SLOT, 4, 4) as first:
        used = places(first)
    with engine.pool(SLOT, 2, 24) as second, engine.pool(SLOT, 4, 4) as third:
        assert places(second) >= used
        assert not places(third) & used


def test_buffers_of_another_size_make_room() -> None:
    engine = Engine()
    with engine.pool(SLOT, 4, 4) as pool:
        freed = [weakref.ref(buffer) for buffer in taken(pool)]
    assert all(buffer() is not None for buffer in freed)
    with engine.pool(2 * SLOT, 4, 4) as other:
        assert size(other) == 8 * SLOT
        del pool
        assert all(buffer() is None for buffer in freed)


def test_buffers_that_an_error_left_in_use_are_not_used_again() -> None:
    engine = Engine(shards=2)

    def fail(pool: BufferPool) -> None:
        pool.take()
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), engine.pool(SLOT, 4, 4) as first:
        fail(first)
    with engine.pool(SLOT, 4, 4) as second:
        assert second is not first
        assert size(second) == 4 * SLOT

"""How many shards are under way, from what was asked for and what the machine has."""

import pytest

from fp8_convert.converter.output.capacity import Capacity, available_cores, capacity, total_memory
from fp8_convert.converter.output.work import Work

GB = 10**9


@pytest.mark.parametrize(
    ("cores", "memory", "expected"),
    [
        (1, 64 * GB, Capacity(1, 1)),
        (2, 64 * GB, Capacity(1, 2)),
        (4, 64 * GB, Capacity(2, 4)),
        (16, 64 * GB, Capacity(8, 16)),
        (128, 64 * GB, Capacity(8, 16)),
        (16, 2 * GB, Capacity(3, 16)),  # a quarter of it, 150 MiB each
        (16, GB // 4, Capacity(1, 16)),
    ],
)
def test_what_fits_the_machine(cores: int, memory: int, expected: Capacity) -> None:
    assert capacity(Work(), ahead=True, cores=cores, memory=memory) == expected


def test_what_was_asked_for_holds() -> None:
    assert capacity(Work(workers=1, shards=1), ahead=True, cores=64, memory=64 * GB) == Capacity(1, 1)
    assert capacity(Work(workers=3, shards=20), ahead=True, cores=2, memory=GB) == Capacity(20, 3)


def test_shards_that_come_one_by_one_are_converted_so() -> None:
    assert capacity(Work(shards=8), ahead=False, cores=16, memory=64 * GB).shards == 1


def test_this_machine() -> None:
    assert available_cores() >= 1
    assert 10**8 < total_memory() < 1 << 60

"""The part of a tensor that one of several ranks holds, and where its bytes are among those of the whole tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Ranges [start, stop) of rows (dim 0, of any tensor) or of columns (dim 1, of a matrix), joined in their order.

    whole: the shape of the whole tensor.
    """

    whole: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's own."""
        length = sum(stop - start for start, stop in self.ranges)
        return tuple(length if dim == self.dim else size for dim, size in enumerate(self.whole))

    def to_read(self, itemsize: int) -> list[tuple[int, int]]:
        """Which bytes of the whole tensor to read: rows alone, or for columns all of them, which share their pages."""
        if not prod(self.shape):
            return []
        return self._bytes(self._row(itemsize)) if self.dim == 0 else [(0, self.whole[0] * self._row(itemsize))]

    def copy(self, itemsize: int, memory: Tensor, offset: int, data: Tensor, non_blocking: bool = False) -> None:
        """Copy to `memory`, the part's bytes, what belongs to it of `data`: the whole tensor's bytes from `offset` on.

        Both uint8 [n]; `data` may end within a row or a number.
        """
        row = self._row(itemsize)
        if self.dim == 0:
            _copy(self._bytes(row), memory, offset, data, non_blocking)
            return
        if data.device != memory.device:
            data = data.to(memory.device, non_blocking=non_blocking)  # whole rows at once, and of these the columns
        columns = self._bytes(itemsize)
        rows = memory.view(self.whole[0], itemsize * self.shape[1])
        for first, count, start, stop in _rectangles(offset, offset + data.numel(), row):
            source = data[first * row + start - offset :][: count * (stop - start)].view(count, -1)
            _copy(columns, rows[first : first + count].T, start, source.T, non_blocking)

    def _row(self, itemsize: int) -> int:
        """Bytes of a row of the whole tensor."""
        return itemsize * prod(self.whole[1:])

    def _bytes(self, size: int) -> list[tuple[int, int]]:
        return [(start * size, stop * size) for start, stop in self.ranges]


def shape_here(tensor: Any) -> torch.Size:
    """The shape of what this rank holds of a tensor that may be spread over several (a DTensor)."""
    local: torch.Size = tensor.to_local().shape if hasattr(tensor, "to_local") else tensor.shape
    return local


def in_place_of(old: Tensor, held: Tensor) -> Tensor:
    """`held` as what this rank holds of a tensor that is spread as `old` is; itself where that is whole."""
    if not hasattr(old, "to_local"):
        return held
    from torch.distributed.tensor import DTensor

    assert isinstance(old, DTensor)
    return DTensor.from_local(
        held, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )


def _copy(ranges: Sequence[tuple[int, int]], memory: Tensor, offset: int, data: Tensor, non_blocking: bool) -> None:
    """Copy the ranges of `data`, which begins at `offset`, to `memory`, along the first dimension."""
    place = 0
    for low, high in ranges:
        start, stop = max(low, offset), min(high, offset + len(data))
        if start < stop:
            to = place + start - low
            memory[to : to + stop - start].copy_(data[start - offset : stop - offset], non_blocking=non_blocking)
        place += high - low


def _rectangles(start: int, stop: int, row: int) -> Iterator[tuple[int, int, int, int]]:
    """The bytes [start, stop) of a matrix as rectangles: first row, rows, and bytes [low, high) within each of them."""
    while start < stop:
        first, low = divmod(start, row)
        count = 1 if low else max(1, (stop - start) // row)
        high = min(row, low + stop - start)
        yield first, count, low, high
        start += count * (high - low)

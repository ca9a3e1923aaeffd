"""What E4M3 codes miss of their weights: exact sums of pieces as they stream by, and what they say of a whole weight.

A code is made of y = w * (1 / scale) and has the value q. With e = y - q, exact in float32:

SQNR         = 10 log10(sum (y scale)^2 / sum (e scale)^2)   dB, over all of a weight
SQNR by row  = -10 log10 of the mean of sum (e scale)^2 / sum (y scale)^2 over each row, an output channel
row error    = the root of the largest of these

|y|, at most 448, and e are rounded to multiples of 2^-14, and their squares are summed as integers for each row under
each scale. So the sums do not depend on how a weight is cut, on threads, lanes or device; only then are they weighted
with the scales' squares, in float64 and in one order. By that rounding a number of decibels is off by less than 0.001
where most codes are normal, and by less than 0.05 where most are subnormal or zero. Weights below half a unit, 2^-24 of
the largest under their scale, count as zero, but a row in which any vanish misses a unit at least: where all do it is
0 dB, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from ..format.record import RecordedError

_UNITS = 2.0**14
_Y_BASE, _E_BASE = 512.0, 768.0  # floats from 512 to 1024 are a unit apart, and base + y and base + e are among them

Sums = npt.NDArray[Any]  # int64, or float64 once weighted


@dataclass(frozen=True)
class Missed:
    """What the codes of a piece miss, on the piece's device; the functions of `quantize` fill it.

    first: the number of the piece's first element in its weight. columns: elements of a row, within which a piece may
    begin and end. width: of them under one scale. sums: int64 [rows, scales of a row, 3], of y^2 and e^2 in units of
    2^-28, and how many codes are zero whose weights are not. counts: int64 [2], codes that are +-448 and subnormal.
    """

    first: int
    columns: int
    width: int
    sums: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, first: int, columns: int, width: int | None = None) -> Missed:
        """For the piece x, with nothing in it yet. width: None for whole rows."""
        width = columns if width is None else min(width, columns)
        rows = -(-(first % columns + x.numel()) // columns)
        sums = x.new_zeros((rows, -(-columns // width), 3), dtype=torch.int64)
        return cls(first, columns, width, sums, x.new_zeros(2, dtype=torch.int64))

    def parts(self, count: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The piece's elements and their sums: the end of a row, whole rows, and the beginning of another."""
        head = min(-self.first % self.columns, count)
        tail = max(head, count - (self.first + count) % self.columns)
        row = 0
        for start, stop in ((0, head), (head, tail), (tail, count)):
            rows = -(-(stop - start) // self.columns)
            if rows:
                yield slice(start, stop), self.sums[row : row + rows]
            row += rows

    def add(self, y: torch.Tensor, codes: torch.Tensor, nonzero: torch.Tensor, start: int = 0) -> None:
        """Add elements from number `start` of the piece on.

        y: float32 in [-448, 448], which is lost. codes: uint8. nonzero: whether w is not zero. All of one shape.
        """
        magnitude = codes & 0x7F
        kinds = magnitude == 0x7E, (magnitude > 0) & (magnitude < 8)
        self.counts.add_(torch.stack([kind.sum() for kind in kinds]))
        e = y - codes.view(torch.float8_e4m3fn).float()
        squares = (_in_units(values, base).square_() for values, base in ((y.abs_(), _Y_BASE), (e, _E_BASE)))
        at = self.first % self.columns + start
        for number, values in enumerate((*squares, (magnitude == 0) & nonzero)):
            sums = self._by_scale(values.view(-1), at % self.columns)
            top = at // self.columns
            self.sums[top : top + len(sums), :, number].add_(sums)

    def _by_scale(self, values: torch.Tensor, lead: int) -> torch.Tensor:
        """Sums [rows, scales of a row] of numbers that begin `lead` elements after the beginning of a row."""
        rows = pad(values, (lead, -(lead + len(values)) % self.columns)).view(-1, self.columns)
        return pad(rows, (0, -self.columns % self.width)).view(len(rows), -1, self.width).sum(dim=2)

    def in_rows(self, scales: npt.NDArray[np.float32] | None = None) -> Rows:
        """The same by rows, on the host. scales: [rows, scales of a row], float32; None where all share one."""
        sums: Sums = np.ascontiguousarray(self.sums.cpu().numpy().T)  # long runs, which numpy is fast at
        rows = sums[:, 0] if scales is None else _weighted(_some_noise(sums), np.square(scales.T.astype(np.float64)))
        return Rows(self.first // self.columns, rows, self.counts.cpu().numpy())


def _in_units(values: torch.Tensor, base: float) -> torch.Tensor:
    """Float32 values in units, rounded to nearest, int64; the values are lost."""
    return values.add_(base).sub_(base).mul_(_UNITS).long()


def _some_noise(sums: Sums) -> Sums:
    """Integer sums [3, ...] with a unit of noise, and of what it is noise of, where weights vanished at least."""
    if sums[2].any():
        np.maximum(sums[:2], np.minimum(sums[2], 1), out=sums[:2])
    return sums


def _weighted(sums: Sums, weights: npt.NDArray[np.float64]) -> Sums:
    """Sums [3, rows] in float64 of those under each scale, [3, scales of a row, rows], one after the other."""
    total = np.zeros((3, sums.shape[2]))
    total[2] = sums[2].sum(axis=0)
    for number, factors in enumerate(weights):
        total[:2] += sums[:2, number] * factors
    return total


@dataclass(frozen=True)
class Rows:
    """What the codes of some rows miss, from row `top` on: sums [3, rows] and counts [2], of `Missed`."""

    top: int
    sums: Sums
    counts: npt.NDArray[np.int64]


def weight_error(parts: Sequence[Rows], weights: int) -> RecordedError:
    """The error of a weight of so many elements from all its rows, in pieces of any order; two may share a row."""
    sums = np.zeros((3, max(part.top + part.sums.shape[1] for part in parts)), parts[0].sums.dtype)
    for part in parts:
        sums[:, part.top : part.top + part.sums.shape[1]] += part.sums
    if sums.dtype == np.int64:  # else each scale's sums had it
        sums = _some_noise(sums)
    saturated, subnormal = map(int, np.sum([part.counts for part in parts], axis=0))
    signals, noises = sums[:2].astype(np.float64)
    shares = noises[signals > 0] / signals[signals > 0]
    return RecordedError(
        sqnr_db=_decibels(_sum(signals), _sum(noises)),
        row_sqnr_db=_decibels(len(shares), _sum(shares)),
        row_error=round(math.sqrt(shares.max(initial=0)), 5),
        weights=weights,
        saturated=saturated,
        subnormal=subnormal,
        vanished=int(sums[2].sum()),
    )


def _sum(values: npt.NDArray[np.float64]) -> float:
    """The sum, one after the other: the same on every machine."""
    return float(np.add.accumulate(values)[-1]) if len(values) else 0.0


def _decibels(signal: float, noise: float) -> float | None:
    """The ratio in dB to two places, None without noise."""
    return round(10 * math.log10(signal / noise), 2) + 0.0 if noise else None  # no -0.0

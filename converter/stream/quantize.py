"""The arithmetic of the conversion: float tensors in, E4M3 codes and float32 scales out. No names, no files.

Per tensor:  scale = fp32(max|w|) / 448            (1 for an all-zero tensor, never below 2^-126)
Per row:     the same of each row                  (1 for an all-zero row)
Per block:   scale = max(max|block|, 1e-4) / 448
Codes:       q = e4m3_rne(clamp(fp32(w) * (1 / scale), -448, 448))

The per-tensor formula is that of vLLM's online FP8 (`ops.scaled_fp8_quant`), bit for bit: the multiplication by
the reciprocal matters, true division gives other codes in about one weight of 6,000. Scales are always computed
with numpy on the CPU, because torch on CUDA divides by a scalar through its reciprocal.

Codes are returned as uint8 tensors (the bits of float8_e4m3fn). What they miss is summed up on the way where it is
asked for (`weight_error`). On the CPU the work is done by `compiled` code where that was built, else by torch, to the
same bits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from ..format.layout import Block
from . import compiled
from .weight_error import Missed

E4M3_MAX = 448.0
MIN_SCALE = float(np.finfo(np.float32).tiny)  # 2^-126: the smallest scale whose reciprocal is finite
MIN_BLOCK_AMAX = 1e-4
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_CHUNK = 512 * 1024  # elements: smaller ones make threads wait for the interpreter, larger ones leave the cache


class _Scratch(threading.local):
    """Per-thread memory that the CPU paths reuse: fresh allocations cost more than the arithmetic."""

    def __init__(self) -> None:
        self._memory = torch.empty(_CHUNK, dtype=torch.int32, device="cpu")

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of a dtype of at most 4 bytes; the next call gives the same memory."""
        numel = math.prod(shape)
        if numel > self._memory.numel():
            self._memory = torch.empty(numel, dtype=torch.int32, device="cpu")
        return self._memory.view(dtype)[:numel].view(shape)


_scratch = _Scratch()


def amax(x: torch.Tensor) -> float:
    """max|x| of a float tensor of any shape on any device; NaN where x holds one, 0 for an empty tensor."""
    if x.numel() == 0:
        return 0.0
    if compiled.serves(x):
        return float(compiled.amax(x.reshape(1, -1), x.numel()))
    low, high = torch.aminmax(x)
    return float(torch.maximum(low.float().abs(), high.float().abs()))


def tensor_scale(amax: float) -> np.float32:
    """The scale of a tensor (or fusion group) whose largest magnitude is `amax`, which must be finite."""
    if amax == 0:
        return np.float32(1)
    return np.float32(max(np.float32(amax) / np.float32(E4M3_MAX), np.float32(MIN_SCALE)))


def row_scales(amax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The scales of rows from their largest magnitudes, float32 of any shape, finite: `tensor_scale` of each."""
    scales = np.maximum(amax / np.float32(E4M3_MAX), np.float32(MIN_SCALE))
    return np.where(amax == 0, np.float32(1), scales)


def block_scales(amax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The scales of blocks from their largest magnitudes, float32 of any shape, finite."""
    return (np.maximum(amax, np.float32(MIN_BLOCK_AMAX)) / np.float32(E4M3_MAX)).astype(np.float32, copy=False)


def quantize_tensor(
    x: torch.Tensor, scale: np.float32, out: torch.Tensor | None = None, missed: Missed | None = None
) -> torch.Tensor:
    """uint8 codes [numel], on x's device, of a contiguous float tensor of any shape under one scale.

    out: where to put them, uint8 [numel]; on the CPU it may be the first bytes of x itself, which is then lost. missed:
    of x, takes what the codes miss.
    """
    x = x.reshape(-1)
    out = _new_codes(x) if out is None else out
    reciprocal = np.float32(1) / scale
    if compiled.serves(x):
        factor = torch.from_numpy(np.array([reciprocal]))
        if missed is None:
            compiled.codes(x.view(1, -1), factor, max(1, x.numel()), out)
            return out
        for part, sums in missed.parts(x.numel()):
            rows = x[part].view(len(sums), -1)
            compiled.codes(rows, factor, rows.shape[1], out[part], sums, missed.counts)
        return out
    for start in range(0, x.numel(), step := _step(x)):
        part = slice(start, start + step)
        _encode(x[part], float(reciprocal), out[part], missed, start)
    return out


def quantize_blocks(
    x: torch.Tensor, block: Block, out: torch.Tensor | None = None, missed: Missed | None = None
) -> tuple[torch.Tensor, npt.NDArray[np.float32], bool]:
    """Codes and scales of rows that start at a block's first row.

    x: float [R, K], contiguous. Returns uint8 codes [R * K] on x's device, float32 scales [ceil(R/bn), ceil(K/bk)]
    and whether every element is finite. Edge blocks count as padded with zeros. out, missed: as in quantize_tensor.
    """
    height, width = block[0], min(block[1], x.shape[1])
    largest = _block_amax(x, height, width)
    scales = block_scales(largest)
    factors = torch.from_numpy(np.float32(1) / scales)
    out = _new_codes(x) if out is None else out
    codes = out.view(x.shape)
    if compiled.serves(x):
        for number, top in enumerate(range(0, x.shape[0], height)):
            rows = slice(top, top + height)
            taken = () if missed is None else (missed.sums[rows], missed.counts)
            compiled.codes(x[rows], factors[number], width, codes[rows], *taken)
    else:
        by_column = factors.repeat_interleave(width, dim=1)[:, : x.shape[1]].to(x.device)
        for number, rows in _strips(x, height):
            _encode(x[rows], by_column[number], codes[rows], missed, rows.start * x.shape[1])
    return out, scales, bool(np.isfinite(largest).all())


def quantize_rows(
    x: torch.Tensor, out: torch.Tensor | None = None, missed: Missed | None = None
) -> tuple[torch.Tensor, npt.NDArray[np.float32], bool]:
    """Codes and scales of rows with a scale each.

    x: float [R, K], contiguous. Returns uint8 codes [R * K] on x's device, float32 scales [R, 1] and whether every
    element is finite. out, missed: as in quantize_tensor.
    """
    largest = _row_amax(x)
    scales = row_scales(largest)
    factors = torch.from_numpy(np.float32(1) / scales)
    out = _new_codes(x) if out is None else out
    if compiled.serves(x):  # to which rows are runs of columns of a single one
        taken = () if missed is None else (missed.sums, missed.counts)
        compiled.codes(x.view(1, -1), factors.view(-1), x.shape[1], out, *taken)
    else:
        codes, by_row = out.view(x.shape), factors.to(x.device)
        for _, rows in _strips(x, x.shape[0]):
            _encode(x[rows], by_row[rows], codes[rows], missed, rows.start * x.shape[1])
    return out, scales, bool(np.isfinite(largest).all())


def _encode(
    x: torch.Tensor, factors: torch.Tensor | float, codes: torch.Tensor, missed: Missed | None, start: int
) -> None:
    """Put the codes of x * factors into `codes`, which may lie over x; x begins at the piece's element `start`."""
    bits, magnitude = _bits(x)
    nonzero = None if missed is None else (bits & magnitude) != 0  # before codes lie over x
    y = _floats(x).mul_(factors).clamp_(-E4M3_MAX, E4M3_MAX)
    codes.view(torch.float8_e4m3fn).copy_(y)
    if missed is not None and nonzero is not None:
        missed.add(y, codes, nonzero, start)


def _row_amax(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """max|w| of every row of x [R, K], float32 [R, 1]; NaN where a row holds one."""
    if compiled.serves(x):
        largest = compiled.amax(x.view(1, -1), x.shape[1])
    else:
        low, high = torch.aminmax(x, dim=1)
        largest = torch.maximum(low.abs(), high.abs())
    values: npt.NDArray[np.float32] = largest.float().cpu().numpy().reshape(-1, 1)
    return values


def _block_amax(x: torch.Tensor, height: int, width: int) -> npt.NDArray[np.float32]:
    """max|w| of every block of x, float32; NaN where a block holds one."""
    if compiled.serves(x):
        blocks = torch.stack([compiled.amax(x[top : top + height], width) for top in range(0, x.shape[0], height)])
    else:
        blocks = _torch_block_amax(x, height, width)
    values: npt.NDArray[np.float32] = blocks.float().cpu().numpy()
    return values


def _torch_block_amax(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Magnitudes of floats order as their bits do, NaN last, and the maximum of integers is the faster one."""
    rows, columns = x.shape
    bits, magnitude = _bits(x)
    largest = bits.new_zeros(-(-rows // height), -(-columns // width) * width)
    for number, part in _strips(x, height):
        magnitudes = torch.bitwise_and(bits[part], magnitude, out=_scratch_like(bits[part], bits.dtype))
        row = largest[number, :columns]
        torch.maximum(row, magnitudes.amax(dim=0), out=row)
    return largest.view(largest.shape[0], -1, width).amax(dim=2).view(x.dtype)


def _strips(x: torch.Tensor, height: int) -> Iterator[tuple[int, slice]]:
    """x [R, K] in strips of at most `height` rows and about a step's elements: (number of its row of blocks, rows)."""
    rows, columns = x.shape
    step = max(1, _step(x) // columns)
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        for row in range(top, bottom, step):
            yield top // height, slice(row, min(row + step, bottom))


def _bits(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x's bits as integers, and the mask of those that are its magnitude."""
    return (x.view(torch.int16), 0x7FFF) if x.itemsize == 2 else (x.view(torch.int32), 0x7FFFFFFF)


def _step(x: torch.Tensor) -> int:
    """How many elements to work on at a time: what fits the cache on the CPU, all of them on a GPU."""
    return max(1, x.numel()) if x.is_cuda else _CHUNK


def _new_codes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel(), dtype=torch.uint8, device=x.device)


def _floats(x: torch.Tensor) -> torch.Tensor:
    """x in float32, in memory that may be written."""
    return _scratch_like(x, torch.float32).copy_(x)


def _scratch_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory of x's shape on x's device."""
    return x.new_empty(x.shape, dtype=dtype) if x.is_cuda else _scratch.take(tuple(x.shape), dtype)

"""The arithmetic of the conversion: float tensors in, E4M3 codes and float32 scales out. No names, no files.

Per tensor:  scale = fp32(max|w|) / 448            (1 for an all-zero tensor, never below 2^-126)
Per block:   scale = max(max|block|, 1e-4) / 448
Codes:       q = e4m3_rne(clamp(fp32(w) * (1 / scale), -448, 448))

The per-tensor formula is that of vLLM's online FP8 (`ops.scaled_fp8_quant`), bit for bit: the multiplication by
the reciprocal matters, true division gives other codes in about one weight of 6,000. Scales are always computed
with numpy on the CPU, because torch on CUDA divides by a scalar through its reciprocal.

Codes are returned as uint8 tensors (the bits of float8_e4m3fn). 16-bit sources have only 65,536 values: with a
scale known, their codes come from a table of that size, which the same formula fills.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

E4M3_MAX = 448.0
MIN_SCALE = float(np.finfo(np.float32).tiny)  # 2^-126: the smallest scale whose reciprocal is finite
MIN_BLOCK_AMAX = 1e-4
SOURCE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_CHUNK = 256 * 1024  # elements: 1 MiB of float32 scratch stays in the L2 cache
_TABLE_FROM = 65_536  # elements from which building a table pays
_TILE_COLUMNS = 2048

Block = tuple[int, int]


class _Scratch(threading.local):
    """Per-thread buffers that the CPU paths reuse: fresh allocations cost more than the arithmetic."""

    def __init__(self) -> None:
        self.floats = torch.empty(_CHUNK, dtype=torch.float32)
        self.indices = torch.empty(_CHUNK, dtype=torch.int32)

    def tile(self, rows: int, columns: int) -> torch.Tensor:
        if rows * columns > self.floats.numel():
            self.floats = torch.empty(rows * columns, dtype=torch.float32)
        return self.floats[: rows * columns].view(rows, columns)


_scratch = _Scratch()


def amax(x: torch.Tensor) -> float:
    """max|x| of a float tensor of any shape on any device; NaN where x holds one, 0 for an empty tensor."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    return float(torch.maximum(low.float().abs(), high.float().abs()))


def tensor_scale(amax: float) -> np.float32:
    """The scale of a tensor (or fusion group) whose largest magnitude is `amax`, which must be finite."""
    if amax == 0:
        return np.float32(1)
    return np.float32(max(np.float32(amax) / np.float32(E4M3_MAX), np.float32(MIN_SCALE)))


def block_scales(amax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The scales of blocks from their largest magnitudes, float32 of any shape, finite."""
    return (np.maximum(amax, np.float32(MIN_BLOCK_AMAX)) / np.float32(E4M3_MAX)).astype(np.float32, copy=False)


class TensorQuantizer:
    """Codes of one tensor's elements under one scale; thread-safe, so its pieces can be converted in parallel.

    `numel` is the whole tensor's, which decides whether a table is built.
    """

    def __init__(self, scale: np.float32, dtype: torch.dtype, numel: int, device: torch.device) -> None:
        self._reciprocal = float(np.float32(1) / scale)
        self._table: torch.Tensor | None = None
        if dtype.itemsize == 2 and numel >= _TABLE_FROM:
            every_value = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)
            self._table = self._arithmetic(every_value).to(device)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 codes [numel] of a contiguous float tensor x, on its device."""
        x = x.reshape(-1)
        return self._arithmetic(x) if self._table is None else self._look_up(x, self._table)

    def _arithmetic(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return (x.float() * self._reciprocal).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        out = torch.empty(x.numel(), dtype=torch.float8_e4m3fn)
        for start in range(0, x.numel(), _CHUNK):
            piece = x[start : start + _CHUNK]
            floats = _scratch.floats[: piece.numel()]
            floats.copy_(piece).mul_(self._reciprocal).clamp_(-E4M3_MAX, E4M3_MAX)
            out[start : start + _CHUNK].copy_(floats)
        return out.view(torch.uint8)

    def _look_up(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.uint16)
        if x.is_cuda:
            return torch.index_select(table, 0, bits.to(torch.int32))
        out = torch.empty(bits.numel(), dtype=torch.uint8)
        for start in range(0, bits.numel(), _CHUNK):
            piece = bits[start : start + _CHUNK]
            indices = _scratch.indices[: piece.numel()].copy_(piece)
            torch.index_select(table, 0, indices, out=out[start : start + _CHUNK])
        return out


def quantize_blocks(x: torch.Tensor, block: Block) -> tuple[torch.Tensor, npt.NDArray[np.float32], bool]:
    """Codes and scales of rows that start at a block's first row.

    x: float [R, K], contiguous. Returns uint8 codes [R * K] on x's device, float32 scales [ceil(R/bn), ceil(K/bk)]
    and whether every element is finite. Edge blocks count as padded with zeros.
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = np.empty((-(-rows // block[0]), -(-columns // block[1])), dtype=np.float32)
    finite = True
    tile_columns = columns if x.is_cuda else max(block[1], _TILE_COLUMNS // block[1] * block[1])
    for row in range(0, rows, block[0]):
        for column in range(0, columns, tile_columns):
            part = (slice(row, row + block[0]), slice(column, min(column + tile_columns, columns)))
            tile_amax = _quantize_tile(x[part], codes[part], block[1])
            finite &= bool(np.isfinite(tile_amax).all())
            first = column // block[1]
            scales[row // block[0], first : first + tile_amax.size] = block_scales(tile_amax)
    return codes.view(torch.uint8).reshape(-1), scales, finite


def _quantize_tile(x: torch.Tensor, codes: torch.Tensor, width: int) -> npt.NDArray[np.float32]:
    """Fill `codes` (float8 [r, c]) from x (float [r, c]), one row of blocks; returns the blocks' amax, float32."""
    rows, columns = x.shape
    padded = -(-columns // width) * width
    tile = x.new_empty(rows, padded, dtype=torch.float32) if x.is_cuda else _scratch.tile(rows, padded)
    tile[:, :columns].copy_(x)
    tile[:, columns:] = 0
    blocks = tile.view(rows, -1, width)
    low, high = blocks.amin(dim=(0, 2)), blocks.amax(dim=(0, 2))
    tile_amax: npt.NDArray[np.float32] = torch.maximum(low.abs(), high.abs()).cpu().numpy()
    reciprocals = torch.from_numpy(np.float32(1) / block_scales(tile_amax)).to(x.device)
    blocks.mul_(reciprocals.view(1, -1, 1)).clamp_(-E4M3_MAX, E4M3_MAX)
    codes.copy_(tile[:, :columns])
    return tile_amax

# ruff: noqa: N803  (Triton's compile-time arguments are written in capitals)
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton forms of `kernels.py`, for CUDA devices that convert E4M3 in hardware (compute capability 8.9 and
newer).

Same formulas, same bits: divisions are `div_rn`, NaN propagates through every maximum and clamp, and the
conversion rounds to nearest even. Memory-bound: each element of an activation is read once and its code
written once.
"""

import functools
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import current_stream, launch

_E4M3 = torch.float8_e4m3fn


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _encode(x, inverse):
    scaled = tl.clamp(x * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(tl.float8e4nv)


@triton.jit
def _rows(x, codes, scales, factor, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    amax = tl.reduce(tl.abs(value), 0, _nan_max)
    # 2^-126, MIN_SCALE of the converter
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes + row * width + column, _encode(value, tl.div_rn(1.0, scale)), mask=inside)
    tl.store(scales + row, scale * tl.load(factor))


@triton.jit(do_not_specialize=["rows", "padded"])
def _groups(x, codes, scales, rows, padded, width, stride, ROWS: tl.constexpr, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    amax = tl.reduce(tl.abs(value), 1, _nan_max)
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)
    tl.store(codes + row[:, None] * width + column[None, :], _encode(value, inverse[:, None]), mask=inside)
    tl.store(scales + tl.program_id(1).to(tl.int64) * padded + row, scale, mask=row < rows)


@triton.jit
def _static(x, codes, input_scale, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(input_scale))
    tl.store(codes + row * width + column, _encode(value, inverse), mask=inside)


@triton.jit
def _dequantize_tensor(codes, weight, scale, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(codes + index, mask=index < count, other=0.0).to(tl.float32)
    tl.store(weight + index, (value * tl.load(scale)).to(weight.dtype.element_ty), mask=index < count)


@triton.jit
def _dequantize_block(codes, weight, scale, n, k, wide, bn, bk, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < k)[None, :]
    value = tl.load(codes + row[:, None] * k + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale + (row // bn)[:, None] * wide + (column // bk)[None, :], mask=inside, other=0.0)
    tl.store(weight + row[:, None] * k + column[None, :], (value * factor).to(weight.dtype.element_ty), mask=inside)


def _row_strided(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


# A few hundred tokens are bound by the host, and two allocations cost it as much as half a launch (23 us against 15 on
# a slow host): their codes go into memory that is kept for each thread and stream, whose own order makes reuse safe.
_KEPT_BYTES = 8 * 1024 * 1024
_kept: dict[tuple[int, int, int], tuple[Tensor, dict[tuple[int, int], tuple[Tensor, Tensor]]]] = {}


def _kept_outputs(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales to overwrite: valid until the next call for this thread and stream."""
    index = device.index
    key = (threading.get_ident(), index, current_stream(index))
    kept = _kept.get(key)
    if kept is None:
        memory = torch.empty(_KEPT_BYTES, dtype=torch.uint8, device=device)
        kept = _kept[key] = (memory, {})
    memory, views = kept
    made = views.get((rows, width))
    if made is None:
        if len(views) > 64:
            views.clear()
        after = -(-rows * width // 16) * 16
        codes = memory[: rows * width].view(_E4M3).view(rows, width)
        made = views[rows, width] = (codes, memory[after : after + 4 * rows].view(torch.float32).view(rows, 1))
    return made


def quantize_rows(x: Tensor, factor: Tensor, kept: bool = False) -> tuple[Tensor, Tensor]:
    x = _row_strided(x)
    rows, width = x.shape
    if kept and rows * (width + 4) + 16 <= _KEPT_BYTES and not torch.cuda.is_current_stream_capturing():
        codes, scales = _kept_outputs(rows, width, x.device)
    else:
        codes = torch.empty((rows, width), dtype=_E4M3, device=x.device)
        scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if x.numel():
        stride = x.stride(0)
        block = _next_power_of_2(width)
        warps = 4 if block <= 4096 else 8 if block <= 8192 else 16
        tensors = (x, codes, scales, factor)
        launch(_rows, (x.dtype, width, stride), (rows, 1, 1), tensors, width, stride, block, warps=warps)
    return codes, scales


@functools.cache
def _next_power_of_2(width: int) -> int:
    return int(triton.next_power_of_2(width))


def quantize_groups(x: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    x = _row_strided(x)
    rows, width = x.shape
    groups, padded = -(-width // 128), -(-rows // multiple) * multiple
    codes = torch.empty((padded, width), dtype=_E4M3, device=x.device)
    scales = torch.empty((groups, padded), dtype=torch.float32, device=x.device)
    if x.numel():
        stride = x.stride(0)
        grid = (-(-rows // 32), groups, 1)
        launch(_groups, (x.dtype, width, stride), grid, (x, codes, scales), rows, padded, width, stride, 32, 128)
    return codes, scales.t()


def quantize_static(x: Tensor, input_scale: Tensor) -> Tensor:
    x = _row_strided(x)
    rows, width = x.shape
    codes = torch.empty((rows, width), dtype=_E4M3, device=x.device)
    if x.numel():
        stride = x.stride(0)
        block = min(4096, triton.next_power_of_2(width))
        grid = (rows, -(-width // block), 1)
        launch(_static, (x.dtype, width, stride), grid, (x, codes, input_scale), width, stride, block)
    return codes


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] | None) -> Tensor:
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    count = codes.numel()
    if not count:
        return weight
    if block is None and scale.dim():  # [N, 1]
        block = 1, codes.shape[1]
    if block is None:
        grid = (-(-count // 4096), 1, 1)
        launch(_dequantize_tensor, (dtype, count), grid, (codes, weight, scale), count, 4096)
    else:
        (n, k), (bn, bk) = codes.shape, block
        grid = (-(-n // 16), -(-k // 256), 1)
        facts = (dtype, n, k, bn, bk)
        launch(_dequantize_block, facts, grid, (codes, weight, scale), n, k, scale.shape[1], bn, bk, 16, 256)
    return weight

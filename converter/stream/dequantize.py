"""The arithmetic back: E4M3 codes and float32 scales in, BF16 or FP16 weights out. No names, no files.

w = dtype(float32(code) * scale), rounded once. In BF16 the largest magnitude of what a scale covers comes back exactly
where it was a BF16 number, so that converting the result again gives the same scale and the same codes. For that one
more rule is needed: in a block whose scale is the smallest that there is, no weight may round to more than the amax
that this scale stands for, or the block would get a larger scale the next time.
"""

from __future__ import annotations

import numpy as np
import torch

from ..format.layout import Block
from .quantize import E4M3_MAX, MIN_BLOCK_AMAX, TORCH_DTYPES

_SMALLEST_BLOCK_SCALE = float(np.float32(MIN_BLOCK_AMAX) / np.float32(E4M3_MAX))


def dequantize(codes: torch.Tensor, scale: torch.Tensor, block: Block | None, dtype: str) -> torch.Tensor:
    """The weights that codes stand for, contiguous in `dtype` (as safetensors spells it) and in the shape of `codes`.

    codes: uint8, of any shape under a scale of one element; [R, K] under block scales [ceil(R/bn), ceil(K/bk)] or
    under one scale a row, [R, 1], from a block's first row on. scale: float32.
    """
    floats = codes.view(torch.float8_e4m3fn).float()
    if scale.numel() == 1:
        return floats.mul_(scale.reshape(())).to(TORCH_DTYPES[dtype])
    if block is None:
        return floats.mul_(scale).to(TORCH_DTYPES[dtype])
    rows = torch.repeat_interleave(scale, block[0], 0)[: codes.shape[0]]
    each = torch.repeat_interleave(rows, min(block[1], codes.shape[1]), 1)[:, : codes.shape[1]]
    weights = floats.mul_(each).to(TORCH_DTYPES[dtype])
    smallest = each == _SMALLEST_BLOCK_SCALE
    if bool(smallest.any()):
        most = _largest_below(MIN_BLOCK_AMAX, dtype)
        weights = torch.where(smallest, weights.clamp(-most, most), weights)
    return weights


def _largest_below(value: float, dtype: str) -> float:
    """The largest number of the dtype that is not above float32(value)."""
    rounded = torch.tensor(value, dtype=TORCH_DTYPES[dtype])
    if float(rounded) > float(np.float32(value)):
        rounded = (rounded.view(torch.int16) - 1).view(TORCH_DTYPES[dtype])
    return float(rounded)

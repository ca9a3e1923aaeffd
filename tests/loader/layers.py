"""Plain layers and their FP8 forms, filled by the contract's formula written out here once more."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader.install import install
from fp8_convert.loader.weights import Fp8Weight

Block = int | Literal["channel"] | None  # what a scale covers: a square of this edge, a row, or all
BLOCKS: dict[str, Block] = {"tensor": None, "channel": "channel", "block": 128}


def quantized(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Codes and scale of `weight`: the contract's formula, in float32, without any of the project's code."""
    wide = weight.float()
    if block is None:
        scale = wide.abs().max() / 448
        full = scale
    elif block == "channel":
        scale = wide.abs().amax(1, keepdim=True) / 448
        full = scale
    else:
        n, k = wide.shape
        rows, columns = -(-n // block), -(-k // block)
        padded = torch.zeros(rows * block, columns * block, device=wide.device)
        padded[:n, :k] = wide
        tiles = padded.view(rows, block, columns, block)
        scale = tiles.abs().amax((1, 3)).clamp(min=1e-4) / 448
        full = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    return (wide * (1 / full)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def fp8_twin(layer: nn.Module, mode: str, block: Block = None, **options: object) -> Fp8Weight:
    """A copy of `layer` as an FP8 layer that holds its quantised weight, on the same device."""
    codes, scale = quantized(layer.weight.data, block)
    how = WeightFormat(mode, (block, block) if isinstance(block, int) else None, block == "channel")
    twin = install(copy.deepcopy(layer), how, dtype=layer.weight.dtype, device=layer.weight.device, **options)
    twin.codes.copy_(codes)
    twin.scale.copy_(scale)
    return twin


def dequantized_twin(layer: nn.Module, fp8: Fp8Weight) -> nn.Module:
    """A plain copy of `layer` holding the weight that `fp8`'s codes and scale stand for, rounded once."""
    scale = fp8.scale
    if fp8.block:
        n, k = fp8.codes.shape
        scale = scale.repeat_interleave(fp8.block[0], 0).repeat_interleave(fp8.block[1], 1)[:n, :k]
    plain = copy.deepcopy(layer)
    plain.weight.data = (fp8.codes.float() * scale).to(layer.weight.dtype)
    return plain

"""A LoRA added to a weight, piece by piece: the weights that diffusers' `fuse_lora` gives on the CPU, bit for bit.

    W' = W + delta,  delta = factor * (B @ A)      W [N, K], A [rank, K], B [N, rank]

A and B are first rounded to W's dtype, as diffusers casts a LoRA that it loads. Each element of B @ A is a sum over
the rank from the first to the last, in float32 with one rounding a step (a fused multiply-add): what a matrix product
does whose rank is not split. Written out here, it does not depend on how rows are cut, on threads, or on the machine.
delta is rounded to W's dtype, and so is the sum. Several LoRAs are added one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plan.lora import LowRank
from . import compiled

_STEP = 128 * 1024  # elements worked on at a time: sums in float32 and float64 that stay in the cache


def merge(x: torch.Tensor, first: int, merges: Sequence[LowRank]) -> torch.Tensor:
    """Add the LoRAs to x in place, and return it.

    x: elements `first` and following of a contiguous weight [N, K], float [n], on any device.
    """
    for change in merges:
        _add(x, first, change)
    return x


def _add(x: torch.Tensor, first: int, change: LowRank) -> None:
    columns = change.a.shape[1]
    a = change.a.to(x.dtype).to(x.device, torch.float32)
    last = first + x.numel()
    step = max(1, _STEP // columns) if x.device.type == "cpu" else max(1, -(-x.numel() // columns))
    for top in range(first // columns, -(-last // columns), step):
        bottom = min(top + step, -(-last // columns))
        b = change.b[top:bottom].to(x.dtype).to(x.device, torch.float32)
        delta = product(b, a).mul_(change.factor).to(x.dtype).view(-1)
        start, stop = max(first, top * columns), min(last, bottom * columns)
        x[start - first : stop - first].add_(delta[start - top * columns : stop - top * columns])


def product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """b @ a in float32, summed over the rank in order; b [R, rank] and a [rank, K] are float32 and contiguous."""
    if compiled.serves(a):
        return compiled.product(b.contiguous(), a.contiguous())
    return _torch_product(b, a)


def _torch_product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A product of two float32 numbers is exact in float64, so that its sum with a third is rounded once there."""
    total = a.new_zeros(b.shape[0], a.shape[1])
    wide = torch.empty_like(total, dtype=torch.float64)
    b, a = b.double(), a.double()
    for k in range(a.shape[0]):
        torch.mul(b[:, k : k + 1], a[k : k + 1], out=wide)
        total.copy_(wide.add_(total))
    return total

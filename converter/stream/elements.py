"""A weight's elements in the bytes that were read, and the error for those that FP8 cannot hold."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..format.layout import W8A8
from ..plan.decide import PlannedTensor
from ..plan.schedule import Segment, Slot
from ..telling.errors import ConvertError
from .dequantize import dequantize
from .quantize import TORCH_DTYPES
from .reading import Span


def segment_bytes(span: Span, slot: Slot, segment: Segment, tensor: PlannedTensor) -> torch.Tensor:
    """The segment's bytes in the span of its slot, uint8 [n]."""
    start = tensor.info.start + segment.start - slot.start
    return span.data[start : start + segment.stop - segment.start]


def typed(data: torch.Tensor, tensor: PlannedTensor) -> torch.Tensor:
    """The bytes as elements of the source dtype; copied where odd-sized neighbours left them unaligned."""
    if data.data_ptr() % tensor.info.itemsize:
        data = data.clone()
    return data.view(TORCH_DTYPES[tensor.info.dtype])


def finite(amax: float, tensor: PlannedTensor, where: str) -> float:
    """The amax itself. Raises ConvertError if it is NaN or Inf; `where` names the source file."""
    if not math.isfinite(amax):
        raise not_finite(tensor, where)
    return amax


def not_finite(tensor: PlannedTensor, where: str) -> ConvertError:
    """The error for a weight with NaN or Inf."""
    if tensor.merges:
        return ConvertError(
            f"{tensor.info.name} in {where} holds NaN or Inf once its LoRA is merged; check the weight, or give "
            "the LoRA a smaller scale."
        )
    # --ignored-layers reaches the DiTs alone; any other component can only be left out whole.
    keep = f"keep its layer with --ignored-layers {tensor.module}"
    if tensor.decision.mode != W8A8:
        keep = "leave its component out by naming the others with --component"
    return ConvertError(
        f"{tensor.info.name} in {where} holds NaN or Inf, which FP8 cannot scale; repair the weight or {keep}."
    )


def without_nan(codes: torch.Tensor, tensor: PlannedTensor, where: str) -> torch.Tensor:
    """E4M3 codes themselves, uint8. Raises ConvertError if one stands for NaN; `where` names the source file."""
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise ConvertError(f"{tensor.info.name} in {where} holds NaN codes; the file is damaged: download it again.")
    return codes


def made_bf16(codes: torch.Tensor, scale: np.ndarray, tensor: PlannedTensor, where: str) -> torch.Tensor:
    """What E4M3 codes [n] under one float32 scale stand for, as the bytes of BF16 numbers. Raises ConvertError."""
    return dequantize(without_nan(codes, tensor, where), torch.from_numpy(scale), None, "BF16").view(torch.uint8)

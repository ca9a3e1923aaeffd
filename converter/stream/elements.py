"""A weight's elements in the bytes that were read, and the error for those that FP8 cannot hold."""

from __future__ import annotations

import math

import torch

from ..format.layout import W8A8
from ..plan.decide import PlannedTensor
from ..plan.schedule import Segment, Slot
from ..telling.errors import ConvertError
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

"""Activations of few tokens times an E4M3 weight, which is read once and never written in another dtype.

    y = x @ dtype(float32(codes) * scale).T + bias

For few tokens a linear costs what its weight's bytes cost, so that dequantising it first (a byte read, two written, two
read again) takes several times as long as BF16 and this takes less. The result is that of a plain linear with the
dequantised weight but for the order in which products are added up.

In compiled code it is the operator `fp8_convert::few_tokens`, whose kernel the graph starts by itself.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import kernels

# What was measured on an H100: up to 32 tokens this is about as fast as quantising the activations and an FP8 product,
# or faster, for weights of any shape and most exact; up to 256 it is faster than dequantising the weight.
W8A8_TOKENS = 32
STORAGE_TOKENS = 256


def multiply(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, block: tuple[int, int] | None) -> Tensor:
    """`x` [M, K], bf16 or fp16, times the weight of `codes` [N, K] float8_e4m3fn, plus `bias` [N]: [M, N] in x's dtype.

    `scale` is float32, () or [N, 1] or, with `block`, [ceil(N / bn), ceil(K / bk)].
    """
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.fp8_convert.few_tokens(x, codes, scale, bias, [*(block or ())])
        return out
    if not x.shape[0] or kernels.fast(x) is None:
        return linear(x, kernels.dequantize(codes, scale, x.dtype, block), bias)
    return _kernel()(x, codes, scale, bias, block)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    """The kernel; with it torch learns of the operator."""
    from .triton_few_tokens import multiply

    return multiply


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def can_multiply(device_type: str, device_index: int | None, dtype: torch.dtype, block: tuple[int, int] | None) -> bool:
    """Whether a device has the kernel, for activations of this dtype and scales of these blocks."""
    if device_type != "cuda" or device_index is None or dtype not in (torch.bfloat16, torch.float16):
        return False
    if not kernels.has_triton(device_index) or (block is not None and block[1] % 128):
        return False
    _kernel()  # for the operator to be known
    return True

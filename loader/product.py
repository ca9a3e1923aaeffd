"""FP8 matrix products: activations quantised, codes times codes, scales applied. One function, three kinds.

rows     a scale for each token, one for the weight or for each of its rows
groups   a scale for each 1x128 group of a token, one for each 128x128 block of the weight
tensor   one static scale for the activations, one for the weight
"""

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import kernels

_GROUP_ROWS = 16  # cuBLAS multiplies groups for multiples of four tokens only

Product = Literal["rows", "groups", "tensor", "dequantize"]


def scaled_product(
    product: Product, x: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Quantise `x` [M, K] as `product` says and multiply it with `codes` [N, K]; the result is [M, N] in x's dtype.

    `scale` is float32, () for "tensor", () or [N, 1] for "rows", [ceil(N / 128), ceil(K / 128)] for "groups". `bias`
    is in x's dtype. Raises RuntimeError where torch has no such product for the device.
    """
    if not x.shape[0]:
        return x.new_empty(0, codes.shape[0])
    if product == "tensor":
        assert input_scale is not None
        quantized = kernels.quantize_static(x, input_scale)
        return _static(quantized, codes, input_scale, scale, bias, x.dtype)
    if product == "groups":
        return _groups(x, codes, scale, bias)
    return _rows(x, codes, scale, bias)


def _rows(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # One scale for the weight goes into the token's: the product then needs a vector of ones that every layer shares.
    columns = scale.view(1, -1) if scale.dim() else _ones(codes.shape[0], x.device)
    quantized, row_scale = kernels.quantize_rows(x, _one(x.device) if scale.dim() else scale, kept=True)
    if x.is_cuda and x.dtype != torch.bfloat16:
        # torch's row-wise product writes bf16 alone; a float32 result scaled afterwards keeps fp16 and fp32 exact.
        one = _one(x.device)
        out = torch._scaled_mm(quantized, codes.t(), one, one, out_dtype=torch.float32) * row_scale
        out = out * columns if scale.dim() else out
        return (out if bias is None else out + bias).to(x.dtype)
    return torch._scaled_mm(
        quantized, codes.t(), row_scale, columns, bias=bias, out_dtype=x.dtype, use_fast_accum=x.is_cuda
    )


def _static(
    x: Tensor, codes: Tensor, input_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    inside = bias if dtype != torch.float32 else None  # the product adds 16-bit biases alone
    out = torch._scaled_mm(
        x,
        codes.t(),
        input_scale,
        scale,
        bias=inside,
        out_dtype=dtype,
        use_fast_accum=x.is_cuda and dtype == torch.bfloat16,
    )
    return out if bias is None or inside is not None else out + bias


def _groups(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.shape[0]
    if x.is_cuda and rows % _GROUP_ROWS:
        x = pad(x, (0, 0, 0, -rows % _GROUP_ROWS))
    quantized, group_scale = kernels.quantize_groups(x)
    if not x.is_cuda:
        return _groups_by_columns(quantized, group_scale, codes, scale, bias, x.dtype)
    padding = -scale.shape[1] % block_scale_step(x.device.index)
    if padding:
        scale = pad(scale, (0, padding))[:, : scale.shape[1]]
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    out = torch._scaled_mm(quantized, codes.t(), group_scale, scale.t(), out_dtype=wide)[:rows]
    return (out if bias is None else out + bias).to(x.dtype)


def _groups_by_columns(
    x: Tensor, group_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The block product as a sum of row-wise ones over 128 columns each: torch has no other on the CPU."""
    out = torch.zeros(x.shape[0], codes.shape[0], device=x.device)
    for group in range(group_scale.shape[1]):
        columns = slice(group * kernels.GROUP, (group + 1) * kernels.GROUP)
        out += torch._scaled_mm(
            x[:, columns].contiguous(),
            codes[:, columns].contiguous().t(),
            group_scale[:, group].contiguous()[:, None],
            scale[:, group].repeat_interleave(kernels.GROUP)[None, : codes.shape[0]].contiguous(),
            out_dtype=torch.float32,
        )
    return (out if bias is None else out + bias).to(dtype)


def _one(device: torch.device) -> Tensor:
    """float32 one, ()."""
    return _ones(1, device).view(())


def _ones(count: int, device: torch.device) -> Tensor:
    """float32 ones [1, count]."""
    if torch.compiler.is_compiling():
        return torch.ones(1, count, device=device)
    return _kept_ones(count, device)


@functools.cache
def _kept_ones(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, count, device=device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def block_scale_step(device_index: int) -> int:
    """The multiple that torch wants a row of block scales padded to: 1 up to some release of it, then 4."""
    return _probe_block_scale_step(device_index)


@functools.cache
def _probe_block_scale_step(device_index: int) -> int:
    device = torch.device("cuda", device_index)
    codes = torch.zeros(256, 256, device=device).to(kernels.E4M3)
    groups, blocks = torch.ones(2, 256, device=device).t(), torch.ones(2, 2, device=device).t()
    try:
        torch._scaled_mm(codes, codes.t(), groups, blocks, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return 4
    return 1

"""FP8 matrix products: activations quantised, codes times codes, scales applied. Three kinds of one thing.

rows     a scale for each token, one for the weight or for each of its rows
groups   a scale for each 1x128 group of a token, one for each 128x128 block of the weight
tensor   one static scale for the activations, one for the weight
"""

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import kernels

_GROUP_ROWS = 16  # cuBLAS multiplies groups for multiples of four tokens only
_SCALE_STEP = 4  # and reads a row of block scales as if it were padded to a multiple of this

Product = Literal["rows", "groups", "tensor", "dequantize"]


class Quantized(NamedTuple):
    """Activations [M, K] in E4M3. `codes` may have rows beyond M, which mean nothing.

    scale: float32, () for "tensor", [M, 1] for "rows" (a single scale of the weight is in it), [M, ceil(K / 128)] for
    "groups".
    """

    codes: Tensor
    scale: Tensor
    rows: int
    dtype: torch.dtype


def scaled_product(
    product: Product, x: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Quantise `x` [M, K] as `product` says and multiply it with `codes` [N, K]; the result is [M, N] in x's dtype.

    `scale` is float32, () for "tensor", () or [N, 1] for "rows", [ceil(N / 128), ceil(K / 128)] for "groups". `bias`
    is in x's dtype. Raises RuntimeError where torch has no such product for the device.
    """
    return multiply(product, quantize(product, x, scale, input_scale, kept=True), codes, scale, bias)


def quantize(
    product: Product, x: Tensor, scale: Tensor | None, input_scale: Tensor | None, kept: bool = False
) -> Quantized:
    """The activations as `product` wants them, for a weight of this scale; None leaves a single one to come.

    With `kept` they may lie in memory that the next such call of this thread, on this stream, writes over.
    """
    rows, dtype = x.shape[0], x.dtype
    if product == "tensor":
        assert input_scale is not None
        return Quantized(kernels.quantize_static(x, input_scale), input_scale, rows, dtype)
    if product == "groups":
        return Quantized(*kernels.quantize_groups(x, _GROUP_ROWS if x.is_cuda else 1), rows, dtype)
    # One scale for the weight goes into the token's: the product then needs a vector of ones that every layer shares.
    factor = _one(x.device) if scale is None or scale.dim() else scale
    return Quantized(*kernels.quantize_rows(x, factor, kept), rows, dtype)


def multiply(product: Product, x: Quantized, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What `scaled_product` does with activations that are quantised already."""
    if not x.rows:
        return torch.empty(0, codes.shape[0], dtype=x.dtype, device=codes.device)
    if product == "tensor":
        return _static(x, codes, scale, bias)
    if product == "groups":
        return _groups(x, codes, scale, bias)
    return _rows(x, codes, scale, bias)


def _rows(x: Quantized, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    columns = scale.view(1, -1) if scale.dim() else _ones(codes.shape[0], codes.device)
    if codes.is_cuda and x.dtype != torch.bfloat16:
        # torch's row-wise product writes bf16 alone; a float32 result scaled afterwards keeps fp16 and fp32 exact.
        one = _one(codes.device)
        out = torch._scaled_mm(x.codes, codes.t(), one, one, out_dtype=torch.float32) * x.scale
        out = out * columns if scale.dim() else out
        return (out if bias is None else out + bias).to(x.dtype)
    inside = bias if takes_bias(x.rows, *codes.shape) else None
    out = torch._scaled_mm(
        x.codes, codes.t(), x.scale, columns, bias=inside, out_dtype=x.dtype, use_fast_accum=codes.is_cuda
    )
    return out if bias is None or inside is not None else out + bias


def takes_bias(rows: int, n: int, k: int) -> bool:
    """Whether a product of [rows, k] and [n, k] may be given a bias. cuBLAS divides long sums of few tokens among
    blocks, and then refuses one: seen up to 33 tokens where k is twice n.
    """
    return k <= n or rows >= 128


def _static(x: Quantized, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not codes.is_cuda:  # where torch's product with single scales takes a hundred times as long as the other
        return _rows(x._replace(scale=x.scale.repeat(x.rows, 1)), codes, scale.repeat(codes.shape[0], 1), bias)
    inside = bias if x.dtype != torch.float32 and takes_bias(x.rows, *codes.shape) else None  # only 16-bit biases
    fast = codes.is_cuda and x.dtype == torch.bfloat16
    out = torch._scaled_mm(x.codes, codes.t(), x.scale, scale, bias=inside, out_dtype=x.dtype, use_fast_accum=fast)
    return out if bias is None or inside is not None else out + bias


def _groups(x: Quantized, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not codes.is_cuda:
        return _groups_by_columns(x, codes, scale, bias)
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    inside = bias if x.dtype == torch.bfloat16 else None  # only 16-bit biases
    hidden = torch.compiler.is_compiling() and scale.shape[1] % _SCALE_STEP
    product = _hidden_block_product if hidden else _block_product
    out = product(x.codes, x.scale, codes, scale, inside, wide)[: x.rows]
    return (out if bias is None or inside is not None else out + bias).to(x.dtype)


def _block_product(
    x: Tensor, group_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(x, codes.t(), group_scale, _as_read(scale).t(), bias=bias, out_dtype=dtype)


# For compiled code, which may lay out anew what `_as_read` makes, and of that the memory behind its end matters.
@torch.library.custom_op("fp8_convert::block_product", mutates_args=())
def _hidden_block_product(
    x: Tensor, group_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _block_product(x, group_scale, codes, scale, bias, dtype)


@_hidden_block_product.register_fake
def _(x: Tensor, _: Tensor, codes: Tensor, __: Tensor, ___: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)


def _as_read(scale: Tensor) -> Tensor:
    """Block scales [N, K] whose rows lie apart by a multiple of four in memory, which is how cuBLAS reads them.

    torch 2.11 takes no stride but the compact one, and hands on the pointer alone.
    """
    width = scale.shape[1]
    if width % _SCALE_STEP == 0:
        return scale
    padded = pad(scale, (0, -width % _SCALE_STEP))
    if block_scale_step(scale.device.index) == 1:
        return padded.as_strided(scale.shape, (width, 1))
    return padded[:, :width]


def _groups_by_columns(x: Quantized, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The block product as a sum of row-wise ones over 128 columns each: torch has no other on the CPU."""
    out = torch.zeros(x.rows, codes.shape[0], device=codes.device)
    for group in range(x.scale.shape[1]):
        columns = slice(group * kernels.GROUP, (group + 1) * kernels.GROUP)
        out += torch._scaled_mm(
            x.codes[:, columns].contiguous(),
            codes[:, columns].contiguous().t(),
            x.scale[:, group].contiguous()[:, None],
            scale[:, group].repeat_interleave(kernels.GROUP)[None, : codes.shape[0]].contiguous(),
            out_dtype=torch.float32,
        )
    return (out if bias is None else out + bias).to(x.dtype)


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


@functools.cache
def block_scale_step(device_index: int) -> int:
    """The multiple that torch wants a row of block scales padded to: 1 up to some release of it, then 4."""
    device = torch.device("cuda", device_index)
    codes = torch.zeros(256, 256, device=device).to(kernels.E4M3)
    groups, blocks = torch.ones(2, 256, device=device).t(), torch.ones(2, 2, device=device).t()
    try:
        torch._scaled_mm(codes, codes.t(), groups, blocks, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return 4
    return 1

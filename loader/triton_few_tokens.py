# ruff: noqa: N803  (Triton's compile-time arguments are written in capitals)
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernels of `few_tokens.py`: activations times an E4M3 weight that is widened in registers.

Bound by the weight's bytes, of which E4M3 has half of BF16's. A weight's value is code times scale, rounded once to the
activations' dtype, as `kernels.dequantize` has it; products are added up in float32.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch

# How the scales lie: one for all, or `scale[n // rows_of_a_scale, k // columns_of_a_scale]`.
_ONE, _MANY = 0, 1


@triton.jit
def _one_token(
    x, codes, out, scale, bias, n, k, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = tl.where(row < n, row, 0).to(tl.int64)
    factor = tl.load(scale)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k, COLUMNS):
        inside = start + column < k
        value = tl.load(codes + here[:, None] * k + (start + column)[None, :], mask=inside[None, :], other=0.0)
        weight = (value.to(tl.float32) * factor).to(x.dtype.element_ty)
        token = tl.load(x + start + column, mask=inside, other=0.0)
        total += weight.to(tl.float32) * token.to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + here).to(tl.float32)
    tl.store(out + here, result.to(out.dtype.element_ty), mask=row < n)


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens(
    x, codes, out, scale, bias, tokens, n, k, stride, wide, bn, bk, SCALES: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    # out.T = W x.T: as the left operand of the product the weight goes through registers, where it is widened.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    here = tl.where(row < n, row, 0).to(tl.int64)
    there = tl.where(token < tokens, token, 0).to(tl.int64)
    if SCALES == 0:
        factor = tl.load(scale)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, k, COLUMNS):
        inside = start + column < k
        value = tl.load(codes + here[:, None] * k + (start + column)[None, :], mask=inside[None, :], other=0.0)
        wanted = tl.load(x + there[None, :] * stride + (start + column)[:, None], mask=inside[:, None], other=0.0)
        if SCALES == 1:  # COLUMNS divides bk, or there is one scale for a row
            factor = tl.load(scale + (here // bn) * wide + start // bk)[:, None]
        weight = (value.to(tl.float32) * factor).to(x.dtype.element_ty)
        total = tl.dot(weight, wanted, total)
    if BIAS:
        total += tl.load(bias + here).to(tl.float32)[:, None]
    inside = (row < n)[:, None] & (token < tokens)[None, :]
    tl.store(out + there[None, :] * n + here[:, None], total.to(out.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block: tuple[int, int] | None,
    *,
    traced: bool = False,
) -> Tensor:
    """See `few_tokens.multiply`. traced: whether torch is to see the kernel, as in what it makes a graph of."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, k), n = x.shape, codes.shape[0]
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if block is None and scale.dim():  # [N, 1]
        block = 1, k
    many = _ONE if block is None else _MANY
    bn, bk = block or (n, k)
    wide = scale.shape[1] if many else 1
    tensors = (x, codes, out, scale, out if bias is None else bias)
    facts = (x.dtype, n, k, bn, bk, bias is not None, many)
    start = _traced if traced else launch
    if tokens == 1 and not many:  # gathering scales for each element would take longer than the kernel below
        start(_one_token, facts, (-(-n // 8), 1, 1), tensors, n, k, bias is not None, 8, 512)
        return out
    room = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    rows, columns = 32 if room == 16 else 64, 128 if bk % 256 and bk < k else 256
    stride, grid = x.stride(0), (-(-n // rows), -(-tokens // room), 1)
    start(
        _few_tokens,
        (*facts, stride, room),
        grid,
        tensors,
        tokens,
        n,
        k,
        stride,
        wide,
        bn,
        bk,
        many,
        bias is not None,
        room,
        rows,
        columns,
        stages=4,
    )
    return out


# torch sees what it consists of: the kernel becomes a part of compiled code, where a call of an operator that is opaque
# takes the host 150 us.
@torch.library.triton_op("fp8_convert::few_tokens", mutates_args=())
def _operator(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, block: list[int]) -> Tensor:
    return multiply(x, codes, scale, bias, (block[0], block[1]) if block else None, traced=True)


def _traced(
    kernel: Any, facts: Hashable, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], *rest: int, stages: int = 3
) -> None:
    """`launch` in sight of torch."""
    torch.library.wrap_triton(kernel)[grid](*tensors, *rest, num_warps=4, num_stages=stages)

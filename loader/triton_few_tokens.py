# ruff: noqa: N803  (Triton's compile-time arguments are written in capitals)
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernels of `few_tokens.py`: activations times an E4M3 weight that is widened in registers.

Bound by the weight's bytes, of which E4M3 has half of BF16's. A weight's value is code times scale, rounded once to the
activations' dtype, as `kernels.dequantize` has it; products are added up in float32.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import current_stream, launch

# How the scales lie: one for all, or `scale[n // rows_of_a_scale, k // columns_of_a_scale]`.
_ONE, _MANY = 0, 1

# What was the fastest on an H100 of some hundred configurations, for 16 to 256 tokens and weights of many shapes, or
# within a tenth of it: tiles of this size for at most as many tokens, and sums divided until there are about as many
# programs as its multiprocessors hold at once, two or three each.
_ROWS, _COLUMNS = 64, 128
_PROGRAMS = {16: 396, 32: 396, 64: 264}


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
    x, codes, out, scale, bias, parts, arrived, tokens, n, k, stride, wide, bn, bk, SCALES: tl.constexpr,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    # out.T = W x.T: as the left operand of the product the weight goes through registers, where it is widened.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    here = tl.where(row < n, row, 0).to(tl.int64)
    asked = token < tokens
    there = tl.where(asked, token, 0).to(tl.int64)
    if SCALES == 0:
        factor = tl.load(scale)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    share = tl.cdiv(tl.cdiv(k, COLUMNS), SPLIT) * COLUMNS
    first = tl.program_id(2) * share
    for start in range(first, tl.minimum(k, first + share), COLUMNS):
        inside = start + column < k
        value = tl.load(codes + here[:, None] * k + (start + column)[None, :], mask=inside[None, :], other=0.0)
        given = inside[:, None] & asked[None, :]  # were one token read for all that are absent, all would wait for it
        wanted = tl.load(x + there[None, :] * stride + (start + column)[:, None], mask=given, other=0.0)
        if SCALES == 1:  # COLUMNS divides bk, or there is one scale for a row
            factor = tl.load(scale + (here // bn) * wide + start // bk)[:, None]
        weight = (value.to(tl.float32) * factor).to(x.dtype.element_ty)
        total = tl.dot(weight, wanted, total)
    place = there[None, :] * n + here[:, None]
    inside = (row < n)[:, None] & asked[None, :]
    last = 0
    if SPLIT > 1:
        # Parts of the sums over k are left in memory; who is the last to come adds them up, always in one order.
        size = tl.cast(tokens, tl.int64) * n
        tl.store(parts + tl.program_id(2) * size + place, total, mask=inside)
        tl.debug_barrier()
        counter = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") - (SPLIT - 1)
        if last == 0:
            total = tl.zeros((ROWS, TOKENS), tl.float32)
            for part in range(SPLIT):
                total += tl.load(parts + part * size + place, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if last == 0:
        if BIAS:
            total += tl.load(bias + here).to(tl.float32)[:, None]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


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
    absent = scale  # never `out`: a tensor that is written is to stand in one place
    tensors = (x, codes, out, scale, absent if bias is None else bias)
    facts = (x.dtype, n, k, bn, bk, bias is not None, many)
    start = _traced if traced else launch
    if tokens == 1 and not many:  # gathering scales for each element would take longer than the kernel below
        start(_one_token, facts, (-(-n // 8), 1, 1), tensors, n, k, bias is not None, 8, 512)
        return out
    room = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    programs = -(-n // _ROWS) * -(-tokens // room)
    split = max(1, min(4, _PROGRAMS[room] // programs))
    parts, arrived = absent, absent
    if split > 1:
        parts = torch.empty((split, tokens, n), dtype=torch.float32, device=x.device)
        if traced or torch.cuda.is_current_stream_capturing():
            arrived = torch.zeros(programs, dtype=torch.int32, device=x.device)
        else:
            arrived = _arrived(x.device, current_stream(x.device.index))
    stride, wide = x.stride(0), scale.shape[1] if many else 1
    grid = -(-n // _ROWS), -(-tokens // room), split
    constants = many, bias is not None, room, _ROWS, _COLUMNS, split
    start(
        _few_tokens,
        (*facts, stride, room, split),
        grid,
        (*tensors, parts, arrived),
        tokens,
        n,
        k,
        stride,
        wide,
        bn,
        bk,
        *constants,
    )
    return out


@functools.cache
def _arrived(device: torch.device, stream: int) -> Tensor:
    """Counters, int32 zeros, which each call leaves at zero: a stream's order makes it safe to use them again."""
    return torch.zeros(max(_PROGRAMS.values()), dtype=torch.int32, device=device)


# torch sees what it consists of: the kernel becomes a part of compiled code, where a call of an operator that is opaque
# takes the host 150 us.
@torch.library.triton_op("fp8_convert::few_tokens", mutates_args=())
def _operator(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, block: list[int]) -> Tensor:
    return multiply(x, codes, scale, bias, (block[0], block[1]) if block else None, traced=True)


def _traced(kernel: Any, facts: Hashable, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], *rest: int) -> None:
    """`launch` in sight of torch."""
    torch.library.wrap_triton(kernel)[grid](*tensors, *rest)

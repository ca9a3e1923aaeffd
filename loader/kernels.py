"""Numeric kernels of the loader: activations to E4M3, E4M3 weights back to the compute dtype.

Per token:        scale[m] = max(max|x[m, :]| / 448, 2^-126);  codes = e4m3_rne(clamp(x * (1 / scale[m]), -448, 448))
Per 1x128 group:  the same over x[m, 128g : 128g + 128], scales column-major (what cuBLAS wants)
Static:           codes = e4m3_rne(clamp(x * (1 / input_scale), -448, 448))
Weights:          w = dtype(float32(codes) * scale), one rounding, per tensor, per row or per block

The floor keeps a row of zeros at zero: its codes are 0 and its scale is finite. NaN and Inf stay visible,
they poison their own row and no other. Each function has a torch form, which is the definition, and a Triton
form with the same bits for CUDA devices of compute capability 8.9 and newer. Under `torch.compile` the torch
form is used everywhere: there it fuses with its neighbours.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..converter.stream.quantize import E4M3_MAX, MIN_SCALE

E4M3 = torch.float8_e4m3fn
GROUP = 128

_PLAIN = (Tensor, torch.nn.Parameter)

# Elements that one step of a plain dequantisation holds in float32.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}


@functools.cache
def _triton(device_index: int) -> ModuleType | None:
    """The Triton kernels, where the device converts E4M3 in hardware and Triton is installed."""
    if torch.version.hip or torch.cuda.get_device_capability(device_index) < (8, 9):
        return None
    try:
        from . import triton_kernels
    except ImportError:  # torch without Triton, as on Windows
        return None
    return triton_kernels


def has_triton(device_index: int) -> bool:
    """Whether a CUDA device runs the Triton forms."""
    return _triton(device_index) is not None


def fast(x: Tensor) -> ModuleType | None:
    """The Triton forms, where `x` can be handed to them: by pointer, so that no subclass, mode or trace sees it."""
    if not x.is_cuda or type(x) not in _PLAIN or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    return _triton(x.device.index)


def quantize_rows(x: Tensor, factor: Tensor, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Per-token codes of `x` [M, K] (bf16, fp16 or fp32; rows may be strided), and the scales times `factor`.

    `factor` is float32 of shape (): the weight's scale, or one. Returns codes [M, K] float8_e4m3fn, scales [M, 1]
    float32. With `kept` they may lie in memory that the next such call of this thread, on this stream, writes over.
    """
    triton = fast(x)
    if triton is not None:
        codes, scale = triton.quantize_rows(x, factor, kept)
        return codes, scale
    wide = x.float()
    scale = _scale_of(wide)
    return (wide * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale * factor


def quantize_groups(x: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Codes of `x` [M, K] with one scale for each 1x128 group of a row.

    Returns codes [P, K] float8_e4m3fn and scales [P, ceil(K / 128)] float32 with strides (1, P), where P is M raised to
    a multiple of `multiple`; what the rows beyond M hold means nothing.
    """
    triton = fast(x)
    if triton is not None:
        codes, scale = triton.quantize_groups(x, multiple)
        return codes, scale
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % multiple))
    rows, width = x.shape
    groups = -(-width // GROUP)
    wide = torch.nn.functional.pad(x.float(), (0, groups * GROUP - width)).view(rows, groups, GROUP)
    scale = _scale_of(wide)
    codes = (wide * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    columns = scale.view(rows, groups).t().reshape(-1).view(groups, rows)
    return codes.view(rows, groups * GROUP)[:, :width].contiguous(), columns.t()


def quantize_static(x: Tensor, input_scale: Tensor) -> Tensor:
    """Codes [M, K] of `x` [M, K] under one given scale (float32, shape ()); values beyond 448 scales saturate."""
    triton = fast(x)
    if triton is not None:
        codes: Tensor = triton.quantize_static(x, input_scale)
        return codes
    return (x.float() * input_scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _scale_of(x: Tensor) -> Tensor:
    """The scale of each row of `x` [..., K], float32: [..., 1]."""
    amax = x.abs().amax(dim=-1, keepdim=True)
    # By a tensor, since CUDA multiplies with the reciprocal of a number, which has other bits.
    return (amax / torch.full((), E4M3_MAX, device=x.device)).clamp(min=MIN_SCALE)


def expand_scale(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A block scale [ceil(N / bn), ceil(K / bk)] repeated to `shape` [N, K]; edge blocks are cut."""
    (bn, bk), (n, k) = block, shape
    tall, wide = scale.shape
    return scale[:, None, :, None].expand(tall, bn, wide, bk).reshape(tall * bn, wide * bk)[:n, :k]


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None) -> Tensor:
    """The weight that `codes` and `scale` stand for, in `dtype`, as a new tensor of the codes' shape.

    `codes` is float8_e4m3fn, contiguous, of two or more dimensions; `scale` float32, shape (), [N, 1] or, with
    `block`, [ceil(N / bn), ceil(K / bk)]. Besides the result at most a few MiB (CPU) or 64 MiB (CUDA) of
    float32 exist at a time.
    """
    if torch.compiler.is_compiling():
        full = scale if block is None else expand_scale(scale, block, codes.shape)
        return (codes.float() * full).to(dtype)
    triton = fast(codes)
    if triton is not None:
        weight: Tensor = triton.dequantize(codes, scale, dtype, block)
        return weight
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel() == 0 or codes.is_meta:
        return out
    flat_codes, flat_out = codes.flatten(1), out.flatten(1)
    height = block[0] if block else max(1, _CHUNK.get(codes.device.type, 1 << 20) // flat_codes.shape[1])
    wide = torch.empty(min(height, len(flat_codes)), flat_codes.shape[1], device=codes.device)
    for index, start in enumerate(range(0, len(flat_codes), height)):
        strip = flat_codes[start : start + height]
        held = wide[: len(strip)].copy_(strip)
        if block is not None:
            factor = scale[index].repeat_interleave(block[1])[: strip.shape[1]]
        else:
            factor = scale[start : start + height] if scale.dim() else scale
        torch.mul(held, factor, out=flat_out[start : start + height])
    return out

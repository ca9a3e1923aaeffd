"""The arithmetic of `quantize` on the CPU as compiled code (_e4m3.c), where a C compiler was there at install time.

It gives the bits that torch gives, in one pass and without the interpreter's lock, in half the time or less.
"""

from __future__ import annotations

import ctypes
import importlib.util

import torch

_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def _load() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec(f"{__package__}._e4m3")
    if spec is None or spec.origin is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    try:
        library = ctypes.CDLL(spec.origin)
        for name in _NAMES.values():
            function = getattr(library, f"codes_{name}")
            function.argtypes, function.restype = [pointer, pointer, size, size, size, pointer, pointer, pointer], None
        for width in (16, 32):
            function = getattr(library, f"amax_{width}")
            function.argtypes, function.restype = [pointer, size, size, size, pointer], None
        library.product_f32.argtypes, library.product_f32.restype = [pointer, pointer, pointer, size, size, size], None
    except (OSError, AttributeError):  # built for another machine, or from other sources
        return None
    return library


_library = _load()


def available() -> bool:
    """Whether the package was installed with its compiled code."""
    return _library is not None


def serves(x: torch.Tensor) -> bool:
    """Whether the functions below take x: it lies on the CPU, and they were compiled."""
    return available() and x.device.type == "cpu"


def codes(
    x: torch.Tensor,
    factors: torch.Tensor,
    width: int,
    out: torch.Tensor,
    sums: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """Put the E4M3 codes of x[r, c] * factors[c // width] into out.

    x: bfloat16, float16 or float32 [R, K], contiguous, without NaN. factors: float32 [ceil(K / width)]. out:
    uint8, R * K elements, contiguous; it may be the first bytes of x itself. sums, counts: as in
    `weight_error.Missed`, int64 [R * ceil(K / width) * 3], contiguous, and [2], to which is added what the codes miss.
    """
    assert _library is not None
    assert x.is_contiguous()
    assert factors.is_contiguous()
    missed = (sums, counts)
    for tensor in missed:
        assert tensor is None or tensor.is_contiguous()
    function = getattr(_library, f"codes_{_NAMES[x.dtype]}")
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in missed)
    function(x.data_ptr(), out.data_ptr(), *x.shape, width, factors.data_ptr(), *pointers)


def amax(x: torch.Tensor, width: int) -> torch.Tensor:
    """max|x| over the rows and every `width` columns: [ceil(K / width)] in x's dtype; NaN where a NaN is among them.

    x: bfloat16, float16 or float32 [R, K], contiguous.
    """
    assert _library is not None
    assert x.is_contiguous()
    largest = x.new_empty(-(-x.shape[1] // width))
    function = getattr(_library, f"amax_{8 * x.itemsize}")
    function(x.data_ptr(), *x.shape, width, largest.data_ptr())
    return largest


def product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """b [R, rank] @ a [rank, K], contiguous float32: each element a sum over the rank in order, rounded once a step."""
    assert _library is not None
    assert b.is_contiguous()
    assert a.is_contiguous()
    out = a.new_empty(b.shape[0], a.shape[1])
    _library.product_f32(b.data_ptr(), a.data_ptr(), out.data_ptr(), b.shape[0], b.shape[1], a.shape[1])
    return out

"""Which matrix product a W8A8 linear uses on which device, and why. The one seam between layers and hardware.

    rows        codes x codes through torch's scaled matmul, a scale for each token
    groups      the same with 1x128 activation groups and 128x128 weight blocks
    tensor      the same with one static activation scale
    dequantize  the weight in the activations' dtype, for this layer's forward alone; activations stay as they are

"auto" takes the scaled matmul on CUDA devices of compute capability 8.9 and newer and `dequantize` elsewhere.
"scaled_mm" takes it wherever torch can run it, the CPU included (slow; it is how its numerics are tested).
"""

import functools
import logging
from typing import Literal, NamedTuple

import torch

from .kernels import GROUP
from .product import Product, scaled_product

Backend = Literal["auto", "scaled_mm", "dequantize"]

logger = logging.getLogger(__name__)


class ChosenProduct(NamedTuple):
    """A matrix product and the reason for it, one clause of plain text."""

    product: Product
    reason: str


@functools.cache
def choose(
    backend: Backend, wanted: Product, device_type: str, device_index: int | None, rows: int, columns: int
) -> ChosenProduct:
    """The product for a weight [`rows`, `columns`] on a device, and the reason.

    `wanted` is the product that the layer's scales call for; the answer is that or "dequantize".
    """
    if backend == "dequantize":
        return ChosenProduct("dequantize", "asked for")
    odd = wanted == "groups" and -(-columns // GROUP) % 4 != 0
    if device_type == "cpu":
        if backend != "scaled_mm":
            return ChosenProduct("dequantize", "the CPU has no FP8 matrix units")
        missing = _missing(torch.device("cpu"), wanted, odd)
        return ChosenProduct("dequantize", missing) if missing else ChosenProduct(wanted, "asked for")
    if device_type != "cuda" or device_index is None:
        return ChosenProduct("dequantize", f"no FP8 matrix product on device type {device_type}")
    if rows % 16 or columns % 16:
        return ChosenProduct("dequantize", f"a weight of {rows}x{columns} is not a multiple of 16x16")
    device = torch.device("cuda", device_index)
    missing = _without_fp8_units(device) or _missing(device, wanted, odd)
    if missing:
        return ChosenProduct("dequantize", missing)
    return ChosenProduct(wanted, f"{torch.cuda.get_device_name(device_index)} has FP8 matrix units")


def _without_fp8_units(device: torch.device) -> str | None:
    """Why a CUDA device has no FP8 matrix units that are used; None where it has."""
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip:
        return "ROCm is not supported"
    return f"compute capability {major}.{minor} is below 8.9" if (major, minor) < (8, 9) else None


@functools.cache
def _missing(device: torch.device, wanted: Product, odd: bool) -> str | None:
    """Why this torch cannot run `wanted` on the device; None where it can. Runs a product of 16 tokens to be sure.

    odd: with rows of block scales that are no multiple of four, which some releases of torch mistake.
    """
    blocks = 3 if odd else 4
    x = torch.ones(16, blocks * GROUP, dtype=torch.bfloat16, device=device)
    codes = torch.ones(256, blocks * GROUP, device=device).to(torch.float8_e4m3fn)
    one, bias = torch.ones((), device=device), torch.ones(256, dtype=torch.bfloat16, device=device)
    scale, expected = one, torch.tensor(blocks * GROUP + 1.0, device=device)
    if wanted == "groups":
        scale = torch.arange(1.0, 2 * blocks + 1, device=device).view(2, blocks)
        expected = (GROUP * scale.sum(1)).repeat_interleave(GROUP) + 1
    try:
        out = scaled_product(wanted, x, codes, scale, one, bias).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, ValueError) as error:
        return f"torch {torch.__version__} cannot run it there ({str(error).splitlines()[0][:120]})"
    if not torch.allclose(out, expected.expand_as(out), rtol=0.01):
        said = f" for block scales of {blocks} columns" if odd else ""
        return f"torch {torch.__version__} computes it wrongly there{said}"
    return None


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("FP8 linears dequantise their weight in each forward: %s", reason)


def announce(chosen: ChosenProduct) -> None:
    """Log, once for each reason, that a layer does without the FP8 matrix product it could have used."""
    if chosen.product == "dequantize" and chosen.reason != "asked for":
        _say_once(chosen.reason)

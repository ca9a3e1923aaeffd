"""A linear with an E4M3 weight and activations as they are: FP8 storage, and what W8A8 does where it does no more."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import few_tokens
from .weights import Fp8Weight


def weight_only_linear(layer: Fp8Weight, x: Tensor) -> Tensor:
    """`x` [..., K] times the weight of `layer`, plus its bias: what a plain layer with the dequantised weight gives.

    Few tokens multiply the codes as they are; otherwise the weight is dequantised, a local of this forward.
    """
    dtype = layer.dtype_for(x)
    x = x if x.dtype == dtype else x.to(dtype)
    bias = layer.bias_in(dtype)
    if multiplies_codes(layer, x, few_tokens.STORAGE_TOKENS):
        out = few_tokens.multiply(x.reshape(-1, x.shape[-1]), layer.codes, layer.scale, bias, layer.block)
        return out.view(*x.shape[:-1], out.shape[1])
    return linear(x, layer.dequantized(dtype), bias)


def multiplies_codes(layer: Fp8Weight, x: Tensor, most: int) -> bool:
    """Whether `x` [..., K] has at most `most` tokens, wants no gradient, and there is a kernel for such."""
    if not 0 < x.numel() <= most * x.shape[-1] or wants_gradient(x):
        return False
    can: bool = few_tokens.can_multiply(x.device.type, x.device.index, x.dtype, layer.block)
    return can


def wants_gradient(x: Tensor) -> bool:
    """Whether the result for `x` is to be differentiable."""
    return x.requires_grad and torch.is_grad_enabled()

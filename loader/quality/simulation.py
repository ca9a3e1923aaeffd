"""FP8 of a single linear as the GPU's products compute it, in float32 and on any device.

    weights      W' = codes(W) * scale(W)
    activations  x' = codes(x) * scale(x), by the product that the weight's scales call for (`linear.py`)
    both         y' = x' @ W'.T + bias, rounded once to x's dtype

Codes and scales are those of the converter and of the loader's kernels; only the sum's order differs from theirs. Where
the product would dequantise its weight, and in FP8 storage, activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from ...converter.format.layout import W8A8
from ...converter.stream import quantize
from .. import kernels
from .original import Layer

Weights = Callable[[Layer], Tensor]  # what a layer's FP8 weight stands for: float32 [N, K], on the layer's device

_UNIT = torch.ones(())


def rounded_inputs(x: Tensor, layer: Layer) -> Tensor:
    """What the codes and scales of x [M, K] stand for, float32."""
    how = layer.format
    rows, columns = layer.module.weight.shape
    fits = how.block in (None, (kernels.GROUP, kernels.GROUP)) and not (rows % 16 or columns % 16)
    if how.mode != W8A8 or not fits:
        return x.float()
    if how.block:
        codes, scale = kernels.quantize_groups(x)
        return codes.float() * scale.repeat_interleave(kernels.GROUP, 1)[:, :columns]
    if layer.input_scale is not None:
        given = torch.tensor(layer.input_scale, device=x.device)
        return kernels.quantize_static(x, given).float() * given
    codes, scale = kernels.quantize_rows(x, _UNIT.to(x.device))
    return codes.float() * scale


class PlannedWeights:
    """The weights that converting gives: the layers of a domain share their per-tensor scale, all of them `layers`."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._largest: dict[tuple[str, str], float] = {}
        for layer in layers:
            if layer.format.per_tensor:
                largest = quantize.amax(layer.module.weight.detach())
                self._largest[layer.domain] = max(largest, self._largest.get(layer.domain, 0.0))

    def __call__(self, layer: Layer) -> Tensor:
        weight, how = layer.module.weight.detach().contiguous(), layer.format
        if how.block is not None:
            codes, scales, _ = quantize.quantize_blocks(weight, how.block)
        elif how.channel:
            codes, scales, _ = quantize.quantize_rows(weight)
        else:
            scale = quantize.tensor_scale(self._largest[layer.domain])
            codes, scales = quantize.quantize_tensor(weight, scale), np.asarray(scale)
        stored = codes.view(weight.shape).view(kernels.E4M3)
        return kernels.dequantize(stored, torch.from_numpy(scales).to(weight.device), torch.float32, how.block)


@contextmanager
def simulated(layers: Iterable[Layer], weights: Weights | None, *, keep: bool = False) -> Iterator[None]:
    """Run the layers in FP8 for the while; without `weights`, as they are, but in float32.

    keep: hold on to their weights in float32 between calls.
    """
    layers = list(layers)
    held: dict[Layer, Tensor] = {}

    def forward(layer: Layer, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if weights is None:
            weight, flat = layer.module.weight.float(), flat.float()
        else:
            weight = held[layer] if layer in held else weights(layer)
            if keep:
                held[layer] = weight
            flat = rounded_inputs(flat, layer)
        bias = layer.module.bias
        out = linear(flat, weight, None if bias is None else bias.float())
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    for layer in layers:
        layer.module.forward = partial(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward

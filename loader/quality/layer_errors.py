"""What FP8 does to each layer's own output, on the inputs that it meets while the original pipeline runs.

For y = x @ W.T + bias and its FP8 form, the squared error over the squared output, ||y' - y||^2 / ||y||^2, with weights
in FP8 alone, activations alone, and both. Of a call at most ROWS tokens are looked at, evenly spread, so that a layer
holds a few sums for each step and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .original import Layer
from .simulation import Weights, rounded_inputs

ROWS = 256


@dataclass(frozen=True)
class LayerError:
    """Squared errors over the squared output. expected: of weights as the converter rounds them, where those of
    `weights` are a snapshot's."""

    weights: float
    activations: float
    both: float
    expected: float | None = None


@dataclass
class Listener:
    """Sums up the errors of layers, by layer and step. expected: weights to compare with, if any.

    `step` is set from outside, as the pipeline goes on.
    """

    weights: Weights
    expected: Weights | None = None
    step: int = 0
    sums: dict[Layer, dict[int, Tensor]] = field(default_factory=dict)

    @contextmanager
    def on(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Listen to the layers for the while."""
        handles = [layer.module.register_forward_pre_hook(partial(self._hear, layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = _some_rows(inputs[0].detach())
        weight = layer.module.weight.detach().float()
        bias = layer.module.bias
        plain = x.float()
        output = linear(plain, weight, None if bias is None else bias.float())
        rounded, change = rounded_inputs(x, layer), self.weights(layer) - weight
        by_activations = linear(rounded - plain, weight)
        found = [output, linear(plain, change), by_activations, by_activations + linear(rounded, change)]
        if self.expected is not None:
            found.append(linear(plain, self.expected(layer) - weight))
        energies = torch.stack([values.square().sum(dtype=torch.float64) for values in found])
        steps = self.sums.setdefault(layer, {})
        steps[self.step] = steps[self.step] + energies if self.step in steps else energies

    @property
    def steps(self) -> list[int]:
        """Those in which a layer ran."""
        return sorted({step for steps in self.sums.values() for step in steps})

    def error(self, layers: Iterable[Layer], step: int | None = None) -> LayerError | None:
        """Of the layers' outputs, in one step or in all: the mean of their errors; None if none of them ran there."""
        found = []
        for layer in layers:
            energies = [e for at, e in self.sums.get(layer, {}).items() if step in (None, at)]
            if energies:
                output, *errors = torch.stack(energies).sum(0).tolist()
                found.append([_ratio(error, output) for error in errors])
        return LayerError(*(sum(values) / len(values) for values in zip(*found, strict=True))) if found else None


def decibels(error: float) -> float:
    """The signal-to-noise ratio of a squared error over a squared signal, in dB; infinite without an error."""
    return math.inf if error == 0 else -10 * math.log10(error)


def _ratio(error: float, output: float) -> float:
    if output == 0:
        return 0.0 if error == 0 else math.inf
    return error / output


def _some_rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= ROWS:
        return flat
    return flat[torch.arange(ROWS, device=flat.device) * len(flat) // ROWS]

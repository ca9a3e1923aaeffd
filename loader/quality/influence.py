"""What FP8 of some layers does to the output of their whole model, on inputs that it met while the pipeline ran.

While the pipeline runs, a few calls of the model are kept, spread over all steps and cases. Then the model runs on them
again, with some of its layers in FP8: the squared error over the squared output, ||f'(x) - f(x)||^2 / ||f(x)||^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .original import Layer
from .simulation import Weights, simulated

_MOST = 6  # calls that are kept of a model
_STRIDE = 3  # odd: calls with and without guidance, which alternate, are both met


@dataclass
class Calls:
    """Inputs of a model: every n-th call's, n growing threefold as more come than are kept. In host memory."""

    model: nn.Module
    kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    @contextmanager
    def kept_while(self) -> Iterator[None]:
        """Keep calls for the while."""
        handle = self.model.register_forward_pre_hook(self._hear, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._seen % self._every == 0:
            self.kept.append((_moved(args, "cpu"), _moved(kwargs, "cpu")))
        self._seen += 1
        if len(self.kept) > _MOST:
            self.kept = self.kept[::_STRIDE]
            self._every *= _STRIDE


class OutputError:
    """Compares a model's outputs with those of its layers as they are."""

    def __init__(self, calls: Calls, device: torch.device) -> None:
        self._calls, self._device = calls, device
        self._plain = [*self._outputs()]
        self.energy = sum(_energy(output) for output in self._plain)

    def of(self, layers: Sequence[Layer], weights: Weights | None) -> float:
        """With the layers in FP8; without `weights`, as they are, but in float32: then what is left is rounding."""
        if not layers or not self.energy:
            return 0.0
        few = len({layer.domain for layer in layers}) == 1
        with simulated(layers, weights, keep=few):
            errors = [
                _energy(a - b for a, b in zip(output, plain, strict=True))
                for output, plain in zip(self._outputs(), self._plain, strict=True)
            ]
        total = sum(errors) / self.energy
        return total if math.isfinite(total) else math.inf

    @torch.no_grad()
    def _outputs(self) -> Iterator[list[Tensor]]:
        for args, kwargs in self._calls.kept:
            output = self._calls.model(*_moved(args, self._device), **_moved(kwargs, self._device))
            yield [tensor.float().cpu() for tensor in _tensors(output)]


def _energy(tensors: Any) -> float:
    return sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in tensors)


def _moved(value: Any, device: torch.device | str) -> Any:
    """A value with its tensors on the device, copied: a scheduler may write over those that it gave."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors([*output.values()])
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)

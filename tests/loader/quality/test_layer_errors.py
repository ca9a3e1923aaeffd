"""Errors of layers against the same in float64, without any of the project's code."""

from __future__ import annotations

import math

import pytest
import torch
from layers import quantized
from test_simulation import layer_of
from torch import Tensor, nn

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader.quality.layer_errors import ROWS, Listener, decibels
from fp8_convert.loader.quality.simulation import PlannedWeights

W8A8 = WeightFormat("w8a8")


def relative(error: Tensor, output: Tensor) -> float:
    return float(error.square().sum() / output.square().sum())


def test_each_error_is_the_formulas() -> None:
    torch.manual_seed(0)
    module = nn.Linear(96, 64)
    x = torch.randn(3, 20, 96)
    layer = layer_of(module, W8A8)
    listener = Listener(PlannedWeights([layer]))
    with torch.no_grad(), listener.on([layer]):
        module(x)
    module(10 * x)  # not listened to any more
    w, flat = module.weight.detach().double(), x.view(-1, 96).double()
    codes, scale = quantized(module.weight.detach(), None)
    wq = codes.double() * scale.double()
    token_scales = flat.float().abs().amax(1, keepdim=True) / 448
    xq = (flat.float() * (1 / token_scales)).to(torch.float8_e4m3fn).double() * token_scales.double()
    y = flat @ w.T + module.bias.detach().double()
    found = listener.error([layer])
    assert found is not None
    assert found.weights == pytest.approx(relative(flat @ (wq - w).T, y), rel=1e-4)
    assert found.activations == pytest.approx(relative((xq - flat) @ w.T, y), rel=1e-4)
    assert found.both == pytest.approx(relative(xq @ wq.T - flat @ w.T, y), rel=1e-4)
    assert found.expected is None


def test_steps_are_apart_and_add_up() -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(32, 32), nn.Linear(32, 32)]
    layers = [layer_of(module, W8A8) for module in modules]
    listener = Listener(PlannedWeights(layers))
    x = torch.randn(4, 32)
    with torch.no_grad(), listener.on(layers):
        for listener.step in (0, 1):
            modules[0](x * (1 + 100 * listener.step))
    assert listener.steps == [0, 1]
    assert listener.error([layers[1]]) is None
    assert listener.error([layers[0]], 7) is None
    first, second, whole = (listener.error([layers[0]], step) for step in (0, 1, None))
    assert first is not None
    assert second is not None
    assert whole is not None
    assert min(first.both, second.both) <= whole.both <= max(first.both, second.both)
    assert whole.both == pytest.approx(second.both, rel=0.05), "the larger step weighs more"


def test_a_snapshots_weights_are_held_against_rounding() -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 64)
    layer = layer_of(module, W8A8)
    planned = PlannedWeights([layer])
    listener = Listener(lambda one: 2 * planned(one), planned)
    with torch.no_grad(), listener.on([layer]):
        module(torch.randn(16, 64))
    found = listener.error([layer])
    assert found is not None
    assert found.expected is not None
    assert decibels(found.weights) == pytest.approx(0, abs=0.5), "twice the weight is an error as large as the output"
    assert decibels(found.expected) > 28


def test_of_many_tokens_some_are_looked_at_evenly() -> None:
    """The last tokens alone are large: were the first taken, their error would not be seen."""
    module = nn.Linear(16, 16, bias=False)
    layer = layer_of(module, W8A8)
    x = torch.ones(1, 10 * ROWS, 16)
    x[:, -ROWS:] *= 1e3
    listener = Listener(PlannedWeights([layer]))
    with torch.no_grad(), listener.on([layer]):
        module(x)
    (energies,) = listener.sums[layer].values()
    seen = float(energies[0]) / float((module.weight.detach().sum(1) ** 2).sum())
    assert seen == pytest.approx(ROWS * (0.9 + 0.1 * 1e6), rel=0.05)


def test_decibels() -> None:
    assert decibels(0.01) == pytest.approx(20)
    assert decibels(0) == math.inf


def test_an_output_of_zeros() -> None:
    module = nn.Linear(16, 16, bias=False)
    layer = layer_of(module, W8A8)
    listener = Listener(PlannedWeights([layer]))
    with torch.no_grad(), listener.on([layer]):
        module(torch.zeros(4, 16))
    found = listener.error([layer])
    assert found is not None
    assert found.both == 0


def test_of_several_layers_each_counts_alike() -> None:
    """One whose output is a million times larger would hide the others, were their outputs pooled."""
    torch.manual_seed(0)
    modules = [nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)]
    layers = [layer_of(module, W8A8) for module in modules]
    listener = Listener(PlannedWeights(layers))
    with torch.no_grad(), listener.on(layers):
        modules[0](torch.randn(8, 64))
        modules[1](1e6 * torch.randn(8, 64))
    one, other, both = listener.error(layers[:1]), listener.error(layers[1:]), listener.error(layers)
    assert one is not None
    assert other is not None
    assert both is not None
    assert both.both == pytest.approx((one.both + other.both) / 2)

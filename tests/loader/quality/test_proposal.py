"""Proposals for a model of two linears, whose weights and inputs are made for the case."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_influence import Model
from test_simulation import layer_of

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.converter.plan.manifest import load_manifest
from fp8_convert.converter.plan.recipe import Recipe
from fp8_convert.loader.quality.choosing import Budget
from fp8_convert.loader.quality.influence import Calls, OutputError
from fp8_convert.loader.quality.layer_errors import Listener, decibels
from fp8_convert.loader.quality.measuring import Run
from fp8_convert.loader.quality.original import Layer
from fp8_convert.loader.quality.proposal import Proposal, propose
from fp8_convert.loader.quality.simulation import PlannedWeights
from fp8_convert.loader.quality.units import Unit

W8A8 = WeightFormat("w8a8")


class Wide(Model):
    def __init__(self, a: torch.nn.Linear, b: torch.nn.Linear) -> None:
        super().__init__()
        self.a, self.b = a, b


def run_of(model: Model, x: torch.Tensor, static: bool = False) -> tuple[Run, list[Unit], list[float]]:
    """What a run of the model on x is, its two layers as units, and the error of each alone."""
    layers = [named(layer_of(module, W8A8), name) for name, module in (("a", model.a), ("b", model.b))]
    weights, calls = PlannedWeights(layers), Calls(model)
    with torch.no_grad(), calls.kept_while():
        model([x.clone()])
    recipe = Recipe(load_manifest("z-image"), activation_scheme="static" if static else "dynamic")
    original: Any = SimpleNamespace(plan=SimpleNamespace(recipe=recipe))
    outputs = {"dit": OutputError(calls, torch.device("cpu"))}
    run = Run(original, weights, tuple(layers), (), Listener(weights), outputs, ())
    parts = [Unit("dit", name, name, (layer,)) for name, layer in zip("ab", layers, strict=True)]
    return run, parts, [outputs["dit"].of(part.layers, weights) for part in parts]


def named(layer: Layer, name: str) -> Layer:
    """The layer under another name, which decides what shares its scale."""
    return Layer(layer.component, layer.module, layer.tensor, name)


def linear(columns: int = 256) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(columns, 256)


def uneven() -> tuple[Model, torch.Tensor]:
    """Small weights on large inputs in one half: one scale for the whole tensor rounds them to zero."""
    model, x = Wide(linear(), linear()), torch.randn(16, 256)
    model.a.weight.data[:, :128] *= 1e-6
    x[:, :128] *= 1e6
    return model, x


def test_block_scales_are_proposed_where_they_are_enough() -> None:
    run, parts, alone = run_of(*uneven())
    assert decibels(run.plain["dit"]) < 10
    found = propose(run, parts, alone, Budget(decibels=20))
    assert found.blocks
    assert found.met
    assert found.kept == ()
    assert 0 < found.cost < 64
    assert decibels(found.measured["dit"]) > 20


@pytest.mark.parametrize(("budget", "static"), [(Budget(decibels=20), True), (Budget(bytes=10**6), False)])
def test_but_not_with_static_activations_nor_for_bytes(budget: Budget, static: bool) -> None:
    run, parts, alone = run_of(*uneven(), static=static)
    found = propose(run, parts, alone, budget)
    assert not found.blocks
    assert found.kept[0] == "dit.a"
    assert decibels(found.measured["dit"]) > 20
    assert decibels(found.in_blocks["dit"]) > 20, "though they are measured"


def test_where_plain_fp8_is_enough_nothing_is_kept() -> None:
    run, parts, alone = run_of(Wide(linear(), linear()), torch.randn(16, 256))
    found = propose(run, parts, alone, Budget(decibels=20))
    assert (found.kept, found.blocks, found.met, found.cost) == ((), False, True, 0)
    assert found.measured == run.plain


def test_storage_is_measured_beside_keeping() -> None:
    """Activations with one huge value lose all others: FP8 storage of the weight is as good as none."""
    x = torch.randn(16, 256)
    x[:, 7] = 3e5
    model = Wide(linear(), linear())
    model.a.weight.data[:, 7] = 0
    run, parts, alone = run_of(model, x)
    found = propose(run, parts, alone, Budget(decibels=30))
    assert found.kept[0] == "dit.a"
    assert decibels(run.plain["dit"]) < 20
    assert decibels(found.stored["dit"]) > 25
    assert found.stored_cost < 64


def test_an_estimate_that_promised_too_much_is_corrected_and_said() -> None:
    run, parts, alone = run_of(Wide(linear(), linear()), torch.randn(16, 256))
    assert alone[1] > alone[0] / 10
    wished = Budget(decibels=decibels(run.plain["dit"]) + 6)
    found = propose(run, parts, [1.0, 0.2], wished)  # as if nearly all were the first layer's
    assert found.met
    assert decibels(found.measured["dit"]) >= wished.decibels
    assert found.kept == ("dit.a", "dit.b"), "what was kept first did not suffice as measured"
    missed = propose(run, parts, [1.0, 0.0], wished)
    assert missed.kept == ("dit.a",)
    assert not missed.met
    assert missed.wrong


@pytest.mark.parametrize(
    ("estimated", "measured", "off", "wrong"),
    [(1e-3, 1e-3, 0.0, False), (1e-3, 2e-3, 3.0, True), (2e-3, 1e-3, -3.0, True), (1e-3, 0.0, 0.0, False)],
)
def test_how_wrong_an_estimate_was(estimated: float, measured: float, off: float, wrong: bool) -> None:
    errors = {"dit": 0.0}
    found = Proposal("40 dB", (), False, 0, {"dit": estimated}, {"dit": measured}, errors, 0, errors, True)
    assert found.off_db == pytest.approx(off, abs=0.02)
    assert found.wrong == wrong

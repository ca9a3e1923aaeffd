"""Which calls are kept, and what FP8 of some layers does to a model's output on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layers import dequantized_twin, fp8_twin
from test_simulation import layer_of
from torch import Tensor, nn

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader.quality.influence import Calls, OutputError
from fp8_convert.loader.quality.simulation import PlannedWeights

STORED = WeightFormat("storage")
CPU = torch.device("cpu")


class Model(nn.Module):
    """Takes what DiTs take: lists, keywords, None; gives what they give: a tuple with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, xs: list[Tensor], scale: Tensor | None = None, *, flag: bool = True) -> tuple[list[Tensor]]:
        out = [self.b(torch.tanh(self.a(x))) * (1 if scale is None else scale) for x in xs]
        xs[0].zero_()  # what it was given is its own
        return (out,)


@pytest.mark.parametrize(("calls", "kept"), [(1, [0]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 3, 6]), (20, [0, 9, 18])])
def test_calls_are_kept_from_all_over_the_run(calls: int, kept: list[int]) -> None:
    model = Model()
    found = Calls(model)
    with torch.no_grad(), found.kept_while():
        for number in range(calls):
            model([torch.full((1, 32), float(number))], flag=False)
    model([torch.zeros(1, 32)])
    assert [int(args[0][0][0, 0]) for args, _ in found.kept] == kept
    assert found.kept[0][1] == {"flag": False}


def test_the_error_is_that_of_the_model_with_such_layers() -> None:
    torch.manual_seed(0)
    model = Model()
    inputs = [[torch.randn(5, 32), torch.randn(3, 32)], [torch.randn(4, 32)]]
    scale = torch.tensor(3.0)
    found = Calls(model)
    with torch.no_grad(), found.kept_while():
        for xs in copy.deepcopy(inputs):
            model(xs, scale=scale)
    layer = layer_of(model.b, STORED)
    error = OutputError(found, CPU)
    measured = error.of([layer], PlannedWeights([layer]))
    other = copy.deepcopy(model)
    other.b = dequantized_twin(model.b, fp8_twin(model.b, "storage"))
    with torch.no_grad():
        pairs = [
            (m, o) for xs in inputs for m, o in zip(*(run(xs, scale)[0] for run in twice(model, other)), strict=True)
        ]
    expected = sum(float((m - o).square().sum()) for m, o in pairs) / sum(float(m.square().sum()) for m, _ in pairs)
    assert measured == pytest.approx(expected, rel=1e-4)
    assert error.of([], PlannedWeights([])) == 0
    assert error.of([layer], None) < 1e-10


def twice(*models: Model) -> list[Any]:
    return [lambda xs, scale, model=model: model(copy.deepcopy(xs), scale) for model in models]


def test_a_model_that_breaks_has_an_infinite_error() -> None:
    model = Model()
    found = Calls(model)
    with torch.no_grad(), found.kept_while():
        model([torch.randn(2, 32)])
    layer = layer_of(model.b, STORED)
    assert OutputError(found, CPU).of([layer], lambda _: torch.full((32, 32), float("nan"))) == float("inf")

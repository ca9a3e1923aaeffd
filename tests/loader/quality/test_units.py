"""Layers taken together: by fusion group, block and pattern, each with a pattern that matches it and no other."""

from __future__ import annotations

import pytest
from torch import nn

from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.converter.plan.decide import Decision, PlannedTensor
from fp8_convert.converter.plan.pattern import matches
from fp8_convert.loader.quality.original import Layer
from fp8_convert.loader.quality.units import By, units

GROUP = "attention.(to_q|to_k|to_v)"


def layer(name: str, component: str = "transformer", mode: str = "w8a8", dtype: str = "BF16") -> Layer:
    size = 2 if dtype == "BF16" else 4
    info = TensorInfo(f"{name}.weight", dtype, (16, 32), 0, size * 512)
    parent, _, last = name.rpartition(".")
    group = f"{parent}.(to_q|to_k|to_v)" if last in ("to_q", "to_k", "to_v") else None
    decision = Decision("all", "a test", "Linear", WeightFormat(mode))
    return Layer(component, nn.Linear(32, 16), PlannedTensor(info, decision), group)


NAMES = [
    f"{block}.{part}"
    for block in ("layers.0", "layers.1", "layers.10", "refiner.layers.0")
    for part in ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "ffn.net.2")
]
LAYERS = [layer(name) for name in [*NAMES, "lone"]]


@pytest.mark.parametrize(
    ("by", "names"),
    [
        (
            "layer",
            [f"{b}.{x}" for b in ("layers.0", "layers.1", "layers.10", "refiner.layers.0")
             for x in (GROUP, "attention.to_out.0", "ffn.net.2")] + ["lone"],
        ),
        ("block", ["layers.0", "layers.1", "layers.10", "refiner.layers.0", "lone"]),
        (
            "pattern",
            [f"{b}.*.{x}" for b in ("layers", "refiner.layers") for x in (GROUP, "attention.to_out.0", "ffn.net.2")]
            + ["lone"],
        ),
    ],
)  # fmt: skip
def test_every_layer_is_in_one_unit_and_its_pattern_matches_it_alone(by: By, names: list[str]) -> None:
    found = units(LAYERS, by)
    assert [unit.name for unit in found] == names
    assert sorted(one.name for unit in found for one in unit.layers) == sorted(one.name for one in LAYERS)
    for unit in found:
        matched = [one.name for one in LAYERS if matches(unit.pattern, one.name)]
        assert matched == [one.name for one in unit.layers], unit.pattern


def test_patterns_are_names_where_names_are_enough() -> None:
    patterns = {unit.name: unit.pattern for unit in units([layer(name) for name in NAMES[:15]], "layer")}
    assert patterns["layers.1.ffn.net.2"] == "layers.1.ffn.net.2"
    assert patterns[f"layers.1.{GROUP}"] == r"re:layers\.1\.attention\.(?:to_q|to_k|to_v)"
    assert patterns["layers.10.attention.to_out.0"] == "layers.10.attention.to_out.0"


def test_components_and_modes_are_apart() -> None:
    mixed = [layer("blocks.0.a"), layer("blocks.0.a", "transformer_2"), layer("blocks.0.mod", mode="storage")]
    found = units(mixed, "block")
    assert [unit.label for unit in found] == [
        "transformer.blocks.0", "transformer_2.blocks.0", "transformer.blocks.0 (stored)",
    ]  # fmt: skip
    assert [unit.stored for unit in found] == [False, False, True]
    assert matches(found[2].pattern, "blocks.0.mod")
    assert not matches(found[2].pattern, "blocks.0.a")


def test_what_keeping_a_unit_costs() -> None:
    (bf16,), (fp32,) = units([layer("a")], "layer"), units([layer("b", dtype="F32")], "layer")
    assert bf16.cost == 512 - 4
    assert fp32.cost == 3 * 512 - 4

"""What is FP8 in a component, and every fault in it, from headers that no conversion would write."""

from __future__ import annotations

from typing import Any

import pytest

from fp8_convert.converter.format.header import Header, TensorInfo
from fp8_convert.converter.format.layout import WeightFormat, encode_modules
from fp8_convert.converter.snapshot.fp8 import Fault, Fp8Component, read_fp8
from fp8_convert.converter.snapshot.snapshot import Component, Shard

TENSOR = WeightFormat("w8a8")
BLOCKS = WeightFormat("storage", (128, 64))
ROWS = WeightFormat("w8a8", channel=True)
CODES = ("F8_E4M3", (200, 100))
ONE = ("F32", ())
GRID = ("F32", (2, 2))
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def shard(path: str, tensors: Tensors, modules: dict[str, WeightFormat] | str) -> Shard:
    infos = tuple(TensorInfo(name, dtype, shape, 0, 0) for name, (dtype, shape) in tensors.items())
    text = modules if isinstance(modules, str) else encode_modules(modules)
    return Shard(path, 0, Header(infos, {"fp8_convert": text} if modules else {}, b""), None)


def read(*shards: Shard, name: str = "transformer", **config: Any) -> Fp8Component:
    whole = {"quantization_config": config} if config else {}
    return read_fp8(Component(name, "diffusers", "X", whole, "x", shards, None))


def one(tensors: Tensors, modules: dict[str, WeightFormat] | str, **config: Any) -> list[tuple[Fault, str]]:
    return [(p.fault, str(p)) for p in read(shard("a", tensors, modules), **config).problems]


def test_what_is_right() -> None:
    tensors = {"a.weight": CODES, "a.weight_scale": ONE, "b.weight": CODES, "b.weight_scale_inv": GRID}
    tensors |= {"c.weight": CODES, "c.weight_scale": ("F32", (200, 1))}
    found = read(shard("a", tensors, {"a": TENSOR, "b": BLOCKS, "c": ROWS}), activation_scheme="dynamic")
    assert found.stated == found.formats == {"a": TENSOR, "b": BLOCKS, "c": ROWS}
    assert (found.problems, found.config) == ((), {"activation_scheme": "dynamic"})


@pytest.mark.parametrize(
    ("tensors", "modules", "fault", "says"),
    [
        ({}, "[]", Fault.METADATA, "has unreadable fp8_convert metadata (not a JSON object)"),
        ({}, {"a": TENSOR}, Fault.ABSENT, "its metadata name a, whose weight it does not hold"),
        (
            {"a.weight": ("BF16", (2, 2)), "a.weight_scale": ONE},
            {"a": TENSOR},
            Fault.NOT_CODES,
            "a.weight is BF16, and the metadata say w8a8 tensor",
        ),
        (
            {"a.weight": ("F8_E4M3", (2, 2, 3)), "a.weight_scale_inv": GRID},
            {"a": BLOCKS},
            Fault.NOT_ROWS,
            "a.weight is [2, 2, 3], and scales of rows or blocks are for two dimensions",
        ),
        (
            {"a.weight": ("F8_E4M3", (2, 2, 3)), "a.weight_scale": ("F32", (2, 1))},
            {"a": ROWS},
            Fault.NOT_ROWS,
            "a.weight is [2, 2, 3], and scales of rows or blocks are for two dimensions",
        ),
        (
            {"a.weight": CODES, "a.weight_scale_inv": GRID},
            {"a": ROWS},
            Fault.NO_SCALE,
            "a.weight has no scale a.weight_scale",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ("F32", (200,))},
            {"a": ROWS},
            Fault.SCALE,
            "a.weight_scale is F32 [200] instead of F32 [200, 1]",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ("F32", (200, 1))},
            {"a": TENSOR},
            Fault.SCALE,
            "a.weight_scale is F32 [200, 1] instead of F32 []",
        ),
        ({"a.weight": CODES}, {"a": TENSOR}, Fault.NO_SCALE, "a.weight has no scale a.weight_scale"),
        (
            {"a.weight": CODES, "a.weight_scale_inv": ("F32", (2, 1))},
            {"a": BLOCKS},
            Fault.SCALE,
            "a.weight_scale_inv is F32 [2, 1] instead of F32 [2, 2]",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ("BF16", ())},
            {"a": TENSOR},
            Fault.SCALE,
            "a.weight_scale is BF16 [] instead of F32 []",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ("F32", (1,))},
            {"a": TENSOR},
            Fault.SCALAR,
            "a.weight_scale is F32 [1] instead of F32 []",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ONE},
            {},
            Fault.UNNAMED,
            "a.weight is FP8 and the metadata do not name it",
        ),
        ({"a.bias": ("F8_E4M3", (2,))}, {}, Fault.NOT_WEIGHT, "a.bias is FP8 and the metadata do not name it"),
        ({"a.weight_scale": ONE}, {}, Fault.ORPHAN, "a.weight_scale is a scale without an FP8 weight"),
        (
            {"a.weight": CODES, "a.weight_scale": ONE, "a.input_scale": ("BF16", (1,))},
            {"a": TENSOR},
            Fault.INPUT_SCALE,
            "a.input_scale is BF16 [1] instead of F32 []",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_each_fault(tensors: Tensors, modules: dict[str, WeightFormat] | str, fault: Fault, says: str) -> None:
    assert one(tensors, modules) == [(fault, says)]


def test_static_activations_without_their_scales() -> None:
    tensors = {"a.weight": CODES, "a.weight_scale": ONE, "b.weight": CODES, "b.weight_scale_inv": GRID}
    (problem,) = read(shard("a", tensors, {"a": TENSOR, "b": BLOCKS}), activation_scheme="static").problems
    assert (problem.fault, problem.file, problem.module) == (Fault.NO_INPUT_SCALE, "transformer/config.json", "a")


def test_metadata_and_scales_in_other_files() -> None:
    """Readers find them all the same; a conversion keeps them together."""
    found = read(shard("one", {"a.weight": CODES}, {"a": TENSOR}), shard("two", {"a.weight_scale": ONE}, {}))
    assert found.formats == {"a": TENSOR}
    assert [(p.fault, p.file, p.name) for p in found.problems] == [(Fault.ELSEWHERE, "one", "a.weight_scale")]


def test_a_shard_with_damaged_metadata_does_not_hide_the_others() -> None:
    good = shard("good", {"a.weight": CODES, "a.weight_scale": ONE}, {"a": TENSOR})
    found = read(shard("bad", {"b.weight": CODES}, "{"), good)
    assert found.formats == {"a": TENSOR}
    assert [(p.fault, p.file) for p in found.problems] == [(Fault.METADATA, "bad")]


@pytest.mark.parametrize(
    ("name", "scale", "config", "guess"),
    [
        ("transformer_2", "weight_scale", {}, WeightFormat("w8a8")),
        ("text_encoder", "weight_scale", {}, WeightFormat("storage")),
        ("transformer", "weight_scale_inv", {}, WeightFormat("w8a8", (128, 128))),
        ("transformer", "weight_scale_inv", {"weight_block_size": [64, 32]}, WeightFormat("w8a8", (64, 32))),
        ("transformer", "weight_scale_inv", {"weight_block_size": [0, "x"]}, WeightFormat("w8a8", (128, 128))),
    ],
)
def test_the_format_of_what_no_metadata_name_is_guessed(
    name: str, scale: str, config: dict[str, Any], guess: WeightFormat
) -> None:
    found = read(shard("a", {"a.weight": CODES, f"a.{scale}": GRID}, {}), name=name, **config)
    assert (found.stated, found.guessed) == ({}, {"a": guess})


@pytest.mark.parametrize(("name", "mode"), [("transformer", "w8a8"), ("text_encoder", "storage")])
def test_scales_of_rows_are_told_by_their_shape(name: str, mode: str) -> None:
    found = read(shard("a", {"a.weight": CODES, "a.weight_scale": ("F32", (200, 1))}, {}), name=name)
    assert found.guessed == {"a": WeightFormat(mode, channel=True)}
    assert [p.fault for p in found.problems] == [Fault.UNNAMED]

"""Where every byte of a single file goes: without holes, aligned, and each chunk of a shard at its place."""

from __future__ import annotations

import json
import struct

import pytest

from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.format.layout import STORAGE, W8A8, WeightFormat
from fp8_convert.converter.plan.decide import Decision, PlannedTensor
from fp8_convert.converter.plan.single_file import SingleFile, lay_out_single_file, original_modules
from fp8_convert.converter.targets.comfyui import Extra
from fp8_convert.converter.targets.key_map import KeyMap, Rule
from fp8_convert.converter.telling.errors import ConvertError

NAMES = KeyMap("Toy", (Rule(("to_q", "to_k"), "qk"), Rule("norm", "norm"), Rule("table", "table"), Rule("mod", "mod")))
GROUPED = Decision("rule", "why", "Linear", WeightFormat(W8A8), "(to_q|to_k)", 0.5)
KEPT = Decision("rule", "why", "Linear")


def tensor(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, decision: Decision = KEPT) -> PlannedTensor:
    return PlannedTensor(TensorInfo(name, dtype, shape, 0, nbytes), decision)


def toy(q: Decision = GROUPED, k: Decision = GROUPED, k_dtype: str = "BF16") -> SingleFile:
    tensors = [
        tensor("norm.bias", "BF16", (3,), 6),
        tensor("to_k.weight", k_dtype, (2, 4), 16, k),
        tensor("to_q.weight", "BF16", (2, 4), 16, q),
        tensor("table", "F32", (1,), 4),
        tensor("mod.weight", "BF16", (4, 4), 32, Decision("rule", "why", "Linear", WeightFormat(STORAGE))),
    ]
    return lay_out_single_file(tensors, NAMES, "x/file.safetensors", {"a": "b"}, (Extra("pieces", "U8", (5,), "f"),))


def test_the_file_is_whole_and_aligned() -> None:
    file = toy().file
    assert [t.start for t in file.outputs] == [0, *(t.end for t in file.outputs[:-1])]
    assert all(t.start % t.itemsize == 0 for t in file.outputs)
    (length,) = struct.unpack("<Q", file.header[:8])
    header = json.loads(file.header[8:])
    assert len(file.header) == 8 + length
    assert header.pop("__metadata__") == {"a": "b", "format": "pt"}
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()} == {
        "qk.weight": ("F8_E4M3", (4, 4)),
        "qk.weight_scale": ("F32", ()),
        "qk.input_scale": ("F32", ()),
        "mod.weight": ("F8_E4M3", (4, 4)),
        "mod.weight_scale": ("F32", ()),
        "table": ("F32", (1,)),
        "norm.bias": ("BF16", (3,)),
        "pieces": ("U8", (5,)),
    }


def test_members_have_places_of_their_own_and_share_their_scales() -> None:
    single = toy()
    starts = {t.name: t.start for t in single.file.outputs}
    assert single.places["to_q.weight"] == starts["qk.weight"]
    assert single.places["to_k.weight"] == starts["qk.weight"] + 8
    for member in ("to_q", "to_k"):
        assert single.places[f"{member}.weight_scale"] == starts["qk.weight_scale"]
        assert single.places[f"{member}.input_scale"] == starts["qk.input_scale"]
    assert single.start_of(single.extras[0]) == starts["pieces"]


def test_kept_members_have_their_bytes() -> None:
    single = toy(KEPT, KEPT)
    starts = {t.name: (t.start, t.nbytes) for t in single.file.outputs}
    assert starts["qk.weight"][1] == 32
    assert single.places["to_k.weight"] == starts["qk.weight"][0] + 16


@pytest.mark.parametrize(
    ("q", "k", "dtype", "message"),
    [
        (GROUPED, KEPT, "BF16", "stored differently; ignore both or none"),
        (KEPT, KEPT, "F16", "stored differently; ignore both or none"),
        (Decision("r", "w", "Linear", WeightFormat(W8A8)), Decision("r", "w", "Linear", WeightFormat(W8A8)), "BF16",
         "no fusion group of the manifest gives them one scale"),
        (GROUPED, Decision("r", "w", "Linear", WeightFormat(STORAGE), "(to_q|to_k)"), "BF16", "stored differently"),
    ],
)  # fmt: skip
def test_members_that_differ_are_named(q: Decision, k: Decision, dtype: str, message: str) -> None:
    with pytest.raises(ConvertError, match=rf"to_q\.weight and to_k\.weight are one tensor .*{message}"):
        toy(q, k, dtype)


def test_modules_by_their_original_names() -> None:
    tensors = [tensor("to_q.weight", "BF16", (2, 4), 16, GROUPED), tensor("to_k.weight", "BF16", (2, 4), 16, GROUPED)]
    assert original_modules(tensors, NAMES) == {"qk": WeightFormat(W8A8)}

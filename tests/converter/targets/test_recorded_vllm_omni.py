"""The target's rules against those recorded from vLLM-Omni's own code, which tests/readers runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pipelines
import pytest
from safetensors import safe_open

from fp8_convert.converter import convert
from fp8_convert.converter.targets.vllm_omni import _DITS, is_layer_skipped

RECORDED = json.loads((Path(__file__).parent / "recorded/vllm_omni.json").read_text())
FAMILIES: dict[str, Any] = RECORDED["families"]


DITS: dict[str, Any] = {
    f"{family}-{name}": component
    for family, rules in FAMILIES.items()
    for name, component in rules["components"].items()
    if component["class"] in _DITS
}
each_dit = pytest.mark.parametrize("component", list(DITS.values()), ids=list(DITS))


def test_every_dit_that_the_target_knows_is_recorded() -> None:
    assert {component["class"] for component in DITS.values()} == {*_DITS}


@each_dit
def test_modules_have_the_names_that_the_reader_looks_for(component: dict[str, Any]) -> None:
    dit = _DITS[component["class"]]
    for prefix, layer in component["layers"].items():
        if layer["fp8"]:
            assert {dit.fused_name(row) or dit.name(row) for row in layer["rows"]} == {prefix}
            assert (len(layer["rows"]) > 1) == (dit.fused_name(layer["rows"][0]) is not None)


@each_dit
def test_the_reader_runs_in_fp8_what_the_target_says(component: dict[str, Any]) -> None:
    dit = _DITS[component["class"]]
    for layer in component["layers"].values():
        for row in layer["rows"]:
            assert bool(re.fullmatch(dit.fp8, row)) == layer["fp8"], row


@each_dit
def test_a_name_alone_skips_what_the_reader_skips(component: dict[str, Any]) -> None:
    fp8 = [prefix for prefix, layer in component["layers"].items() if layer["fp8"]]
    for name, skipped in component["alone"].items():
        assert [prefix for prefix in fp8 if is_layer_skipped(prefix, {name})] == skipped


@each_dit
def test_the_spellings_of_a_layer_skip_it_and_no_other(component: dict[str, Any]) -> None:
    dit = _DITS[component["class"]]
    fp8 = {prefix: layer["rows"] for prefix, layer in component["layers"].items() if layer["fp8"]}
    for prefix, rows in fp8.items():
        listed = dit.spellings(rows)
        assert [other for other in fp8 if is_layer_skipped(other, listed)] == [prefix]
        assert [x for name in sorted(listed) for x in component["alone"].get(name, [])] == [prefix]


@each_dit
def test_no_tensor_of_a_checkpoint_is_dropped(component: dict[str, Any]) -> None:
    assert component["dropped"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_under_the_config_of_the_dit_is_named_there(family: str, tmp_path: Path) -> None:
    encoder = FAMILIES[family]["components"].get("text_encoder")
    if encoder is None:
        return  # it is loaded by transformers, with its own config
    convert(pipelines.saved(family), tmp_path / "out", target="vllm-omni")
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert {prefix for prefix, layer in encoder["layers"].items() if layer["fp8"]} <= {*config["ignored_layers"]}


IGNORED = {"qwen_image": ["to_qkv", "txt_mlp"], "z_image": ["w13", "layers.0"], "wan22": ["blocks.0.ffn", "to_out"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_the_reader_expects_of_each_layer(family: str, tmp_path: Path) -> None:
    convert(pipelines.saved(family), tmp_path / "out", target="vllm-omni", ignored_layers=IGNORED[family])
    convert(pipelines.saved(family), tmp_path / "native", ignored_layers=IGNORED[family])
    for name in ("transformer", "transformer_2"):
        if component := FAMILIES[family]["components"].get(name):
            assert misread(tmp_path / "out" / name, component) == []
            assert misread(tmp_path / "native" / name, component) != []


def misread(folder: Path, component: dict[str, Any]) -> list[str]:
    """The modules of a converted DiT whose dtype is not what the reader takes them for, by its recorded rules."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    skipped = {prefix for name in config["ignored_layers"] for prefix in component["alone"].get(name, [])}
    expected = {
        row: layer["fp8"] and prefix not in skipped
        for prefix, layer in component["layers"].items()
        for row in layer["rows"]
    }
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as shard:
        weights = {name: shard.get_slice(name) for name in shard.keys() if name.endswith(".weight")}  # noqa: SIM118
        fp8 = {
            name.removesuffix(".weight"): weight.get_dtype() == "F8_E4M3"
            for name, weight in weights.items()
            if len(weight.get_shape()) == 2
        }
    assert fp8.keys() == expected.keys()
    return [module for module in fp8 if fp8[module] != expected[module]]


def test_no_family_tells_its_config_what_is_fused() -> None:
    """Once one does, names of members count, and `is_layer_skipped` has to know the mapping."""
    assert [rules["packed_modules_mapping"] for rules in FAMILIES.values()] == [{}] * len(FAMILIES)

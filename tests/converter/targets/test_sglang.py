"""What `--target sglang` writes, and what it refuses. The reader's own code runs in tests/readers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fp8_convert.converter import ConvertError, convert, plan_conversion, verify
from fp8_convert.converter.format.layout import W8A8, WeightFormat
from fp8_convert.converter.snapshot.snapshot import Component
from fp8_convert.converter.targets.sglang import DITS, Sglang, is_layer_skipped
from fp8_convert.converter.targets.target import Layer


def quantization(folder: Path) -> dict[str, Any] | None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config.get("quantization_config")


def problems(class_name: str, *layers: Layer, ignored: set[str]) -> list[str]:
    dit = Component("transformer", "diffusers", class_name, {}, "diffusion_pytorch_model", (), None)
    return list(Sglang().problems(dit, layers, ignored))


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan22"])
def test_the_dits_alone_become_fp8(name: str, tmp_path: Path) -> None:
    source = pipelines.saved(name)
    convert(source, tmp_path / "out", target="sglang")
    for dit in (tmp_path / "out").glob("transformer*"):
        assert quantization(dit) is not None
    assert quantization(tmp_path / "out/vae") is None
    assert quantization(tmp_path / "out/text_encoder") is None
    assert verify(tmp_path / "out", source=source).ok


def test_z_image_is_written_in_blocks_without_the_fused_gate(tmp_path: Path) -> None:
    convert(pipelines.saved("z_image"), tmp_path / "out", target="sglang")
    config = quantization(tmp_path / "out/transformer")
    assert config is not None
    assert config["weight_block_size"] == [128, 128]
    assert {"layers.0.feed_forward.w13", "layers.0.feed_forward.w1"} <= {*config["ignored_layers"]}
    with safe_open(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        scales = {name for name in file.keys() if "scale" in name}  # noqa: SIM118
    assert "layers.0.attention.to_q.weight_scale_inv" in scales
    assert not any("w1" in name or "w3" in name or name.endswith("weight_scale") for name in scales)


def test_modulation_stands_in_the_spelling_of_the_reader(tmp_path: Path) -> None:
    convert(pipelines.saved("qwen_image"), tmp_path / "out", target="sglang")
    config = quantization(tmp_path / "out/transformer")
    assert config is not None
    assert {"transformer_blocks.0.img_mod", "transformer_blocks.0.img_mod.1"} <= {*config["ignored_layers"]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compact": True}, "which --compact is not for"),
        ({"weight_block_size": [128, 128]}, "chooses the blocks that SGLang reads"),
        ({"components": ["text_encoder"]}, "--target sglang keeps text_encoder: SGLang builds text encoders from"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConvertError, match=says):
        plan_conversion(pipelines.saved("z_image"), **{"target": "sglang", **options})


def test_static_activations_are_refused_where_sglang_needs_blocks(tmp_path: Path) -> None:
    scales = tmp_path / "scales.safetensors"
    save_file({"layers.0.attention.to_q.input_scale": torch.tensor(0.5)}, scales)
    with pytest.raises(
        ConvertError, match=r"^The target sglang gives .* block128x128 scales, and static .* pass another --target"
    ):
        plan_conversion(
            pipelines.saved("z_image"), target="sglang", activation_scheme="static", input_scales=str(scales)
        )


def test_a_class_that_the_target_does_not_know_is_refused() -> None:
    with pytest.raises(ConvertError, match=r"knows how SGLang runs Qwen.*, and not FluxTransformer2DModel\.$"):
        plan_conversion(pipelines.saved("flux"), target="sglang")


@pytest.mark.parametrize(
    ("name", "ignored", "skipped"),
    [
        ("proj_out", "proj_out", True),
        ("single_transformer_blocks.3.proj_out", "proj_out", True),  # anywhere in the name
        ("single_transformer_blocks.3.my_proj_out", "proj_out", False),
        ("blocks.0.attn2.to_out", "blocks.0.to_out", False),
        ("blocks.0.ffn.fc_in", "blocks.0.ffn", True),
        ("blocks.10.ffn.fc_in", "blocks.1", False),
        ("layers.0.feed_forward.w13", "layers.0.feed_forward.w13", False),  # looked for by its members
        ("layers.0.attention.to_qkv", "layers.0.attention.to_qkv", True),
        ("layers.0.attention.to_qkv", "layers.0.attention.to_q", False),
    ],
)
def test_the_rule_of_skipping(name: str, ignored: str, skipped: bool) -> None:
    assert is_layer_skipped(name, {ignored}) is skipped


def test_a_fused_gate_is_skipped_where_both_of_its_members_are_named() -> None:
    assert is_layer_skipped("layers.0.feed_forward.w13", {"layers.0.feed_forward.w1", "layers.0.feed_forward.w3"})


# What SGLang's own code said: tests/readers/sglang/record.py.

_RECORDED = json.loads((Path(__file__).parent / "recorded" / "sglang.json").read_text())["families"]


@pytest.fixture(params=[*_RECORDED])
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = _RECORDED[request.param]
    return found


def test_every_linear_has_the_name_that_sglang_gives_it(recorded: dict[str, Any]) -> None:
    dit = DITS[recorded["class"]]
    for name, layer in recorded["layers"].items():
        for module in layer["rows"]:
            assert bool(re.fullmatch(dit.fp8, module)) is layer["fp8"], module
            if layer["fp8"]:
                assert (dit.fused_name(module) or dit.name(module)) == name
        if len(layer["rows"]) > 1:
            last = name.rpartition(".")[2]
            assert [module.rpartition(".")[2] for module in layer["rows"]] == [*dit.fused[last]]


def test_a_list_of_one_name_skips_what_it_skips_in_sglang(recorded: dict[str, Any]) -> None:
    fp8 = [name for name, layer in recorded["layers"].items() if layer["fp8"]]
    for entry, skipped in recorded["alone"].items():
        if not any(name.startswith("refused") for name in skipped):
            assert [name for name in sorted(fp8) if is_layer_skipped(name, {entry})] == skipped, entry


def test_nothing_is_fp8_whose_scale_sglang_drops(recorded: dict[str, Any]) -> None:
    target, class_name = Sglang(), recorded["class"]
    dit = Component("transformer", "diffusers", class_name, {}, "diffusion_pytorch_model", (), None)
    scale = "weight_scale" if target.block(dit, None) is None else "weight_scale_inv"
    kept = [pattern.removeprefix("re:") for pattern, _ in target.kept_layers(dit)]
    modules = {module for layer in recorded["layers"].values() if layer["fp8"] for module in layer["rows"]}
    fp8 = {module for module in modules if not any(re.fullmatch(pattern, module) for pattern in kept)}
    assert fp8
    assert fp8 <= {*recorded["scales"][scale]}


def test_a_short_name_that_skips_a_layer_with_codes_is_refused() -> None:
    fp8 = Layer("blocks.0.attn1.to_q", "Linear", WeightFormat(W8A8))
    (problem,) = problems("WanTransformer3DModel", fp8, ignored={"to_q"})
    assert problem == "SGLang would skip blocks.0.to_q and read the codes of blocks.0.attn1.to_q as weights"


def test_a_kept_layer_in_our_spelling_alone_is_refused() -> None:
    kept = Layer("transformer_blocks.0.img_mod.1", "Linear", None)
    (problem,) = problems("QwenImageTransformer2DModel", kept, ignored={"transformer_blocks.0.img_mod.1"})
    assert problem.endswith("nothing it looks for names transformer_blocks.0.img_mod")


def test_scales_of_rows_are_refused() -> None:
    rows = Layer("blocks.0.attn1.to_q", "Linear", WeightFormat(W8A8, channel=True))
    (problem,) = problems("WanTransformer3DModel", rows, ignored=set())
    assert problem == "SGLang reads one scale per tensor or block, and blocks.0.attn1.to_q has one per row"

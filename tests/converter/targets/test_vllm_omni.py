"""What `--target vllm-omni` writes, and what it refuses. The reader's own code runs in tests/readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipelines
import pytest

from fp8_convert.converter import ConvertError, convert, inspect, plan_conversion, verify
from fp8_convert.converter.format.layout import W8A8, WeightFormat
from fp8_convert.converter.snapshot.snapshot import Component
from fp8_convert.converter.targets.target import Layer
from fp8_convert.converter.targets.vllm_omni import VllmOmni

TENSOR = WeightFormat(W8A8)


def quantization(folder: Path) -> dict[str, Any] | None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config.get("quantization_config")


def component(class_name: str) -> Component:
    return Component("transformer", "diffusers", class_name, {}, "diffusion_pytorch_model", (), None)


def problems(class_name: str, *layers: Layer, ignored: set[str] | None = None) -> list[str]:
    dit = component(class_name)
    kept = [layer.name for layer in layers if layer.format is None]
    names = VllmOmni().ignored_layers(dit, kept, [dit]) if ignored is None else ignored
    return list(VllmOmni().problems(dit, layers, names))


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan22"])
def test_the_dit_alone_reads_fp8_per_tensor(name: str, tmp_path: Path) -> None:
    convert(pipelines.saved(name), tmp_path / "out", target="vllm-omni")
    for dit in (tmp_path / "out").glob("transformer*"):
        config = quantization(dit)
        assert config is not None
        assert (config["quant_method"], config["weight_block_size"]) == ("fp8", None)
    assert quantization(tmp_path / "out/vae") is None
    assert inspect(tmp_path / "out").target == "vllm-omni"
    assert verify(tmp_path / "out", source=pipelines.saved(name)).ok


def test_the_encoder_of_z_image_is_named_in_the_config_of_the_dit(tmp_path: Path) -> None:
    convert(pipelines.saved("z_image"), tmp_path / "out", target="vllm-omni")
    assert quantization(tmp_path / "out/text_encoder") is None
    config = quantization(tmp_path / "out/transformer")
    assert config is not None
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert {"lm_head", *(f"model.layers.{n}.{p}" for n in range(2) for p in parts)} <= {*config["ignored_layers"]}


def test_a_pipeline_that_loads_its_encoder_itself_keeps_block_scales_there(tmp_path: Path) -> None:
    convert(pipelines.saved("qwen_image"), tmp_path / "out", target="vllm-omni")
    config = quantization(tmp_path / "out/text_encoder")
    assert config is not None
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])


def test_ignored_layers_stand_in_both_spellings(tmp_path: Path) -> None:
    patterns = ["blocks.0.ffn", "attn1.to_qkv", "to_out"]
    convert(pipelines.saved("wan22"), tmp_path / "out", target="vllm-omni", ignored_layers=patterns)
    config = quantization(tmp_path / "out/transformer_2")
    assert config is not None
    theirs = {"blocks.0.ffn.net_0.proj", "blocks.0.ffn.net_2", "blocks.1.attn1.to_out", "blocks.1.attn1.to_qkv"}
    ours = {"blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2", "blocks.1.attn1.to_out.0", "blocks.1.attn1.to_q"}
    assert theirs | ours <= {*config["ignored_layers"]}
    assert verify(tmp_path / "out").ok


def test_a_list_that_lacks_a_spelling_is_found(tmp_path: Path) -> None:
    convert(pipelines.saved("wan22"), tmp_path / "out", target="vllm-omni", ignored_layers=["to_out"])
    path = tmp_path / "out/transformer/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignored_layers"].remove("blocks.0.attn1.to_out")
    path.write_text(json.dumps(config))
    found = [f.problem for f in verify(tmp_path / "out").findings if f.path == "transformer/config.json"]
    assert "ignored_layers are not exactly those that the target vllm-omni needs" in found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compact": True}, "which --compact is not for"),
        ({"weight_block_size": [128, 128]}, "one scale per tensor in the DiT alone"),
        ({"components": ["vae"]}, "--target vllm-omni keeps vae: vLLM-Omni loads it through diffusers"),
        ({"components": ["text_encoder"]}, "keeps text_encoder: vLLM-Omni builds it under the DiT's config"),
        ({"target": "vllm"}, "target is 'vllm'; use one of native, vllm-omni"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConvertError, match=says):
        plan_conversion(pipelines.saved("z_image"), **{"target": "vllm-omni", **options})


def test_a_class_that_the_target_does_not_know_is_refused() -> None:
    with pytest.raises(ConvertError, match=r"knows how vLLM-Omni runs Qwen.*, and not FluxTransformer2DModel\.$"):
        plan_conversion(pipelines.saved("flux"), target="vllm-omni")


def test_a_dit_of_z_image_alone_is_refused() -> None:
    with pytest.raises(ConvertError, match="it is not here to be named there; convert the whole pipeline"):
        plan_conversion(pipelines.saved("z_image") / "transformer", target="vllm-omni")


def test_fp8_where_the_reader_builds_none_is_refused() -> None:
    (problem,) = problems("QwenImageTransformer2DModel", Layer("transformer_blocks.0.img_mod.1", "Linear", TENSOR))
    assert problem.startswith("vLLM-Omni builds transformer_blocks.0.img_mod.1 without FP8 and would read the codes")


def test_a_kept_layer_that_nothing_names_is_refused() -> None:
    kept = Layer("blocks.0.ffn.net.2", "Linear", None)
    (problem,) = problems("WanTransformer3DModel", kept, ignored={"blocks.0.ffn.net.2"})  # our spelling alone
    assert problem.endswith("to FP8 without a scale: nothing it looks for names blocks.0.ffn.net_2")
    assert problems("WanTransformer3DModel", kept) == []


def test_a_named_layer_with_codes_is_refused() -> None:
    fp8 = Layer("layers.0.feed_forward.w2", "Linear", TENSOR)
    found = problems("ZImageTransformer2DModel", fp8, ignored={"layers.0.feed_forward.w2"})
    assert "vLLM-Omni would skip layers.0.feed_forward.w2" in found[0]


def test_half_of_a_fused_module_is_refused() -> None:
    parts = [Layer(f"layers.0.attention.to_{x}", "Linear", None if x == "q" else TENSOR) for x in "qkv"]
    found = problems("ZImageTransformer2DModel", *parts)
    assert "would cast layers.0.attention.to_q to FP8 without a scale" in found[0]


def test_names_of_members_alone_are_refused() -> None:
    """vLLM-Omni does not tell its config which modules are fused, so it looks for `to_qkv` alone."""
    parts = [Layer(f"layers.0.attention.to_{x}", "Linear", None) for x in "qkv"]
    found = problems("ZImageTransformer2DModel", *parts, ignored={layer.name for layer in parts})
    assert len(found) == 3
    assert "nothing it looks for names layers.0.attention.to_qkv" in found[0]
    assert problems("ZImageTransformer2DModel", *parts) == []


def test_one_dit_of_two_is_refused_where_the_other_would_inherit_its_config() -> None:
    with pytest.raises(ConvertError, match="and gives garbage; add --component transformer_2"):
        plan_conversion(pipelines.saved("wan22"), target="vllm-omni", components=["transformer"])
    assert plan_conversion(pipelines.saved("wan22"), target="vllm-omni", components=["transformer_2"])


def test_an_encoder_that_the_reader_does_not_find_is_noted() -> None:
    (note,) = plan_conversion(pipelines.saved("z_image"), target="vllm-omni").notes
    assert note.startswith("vLLM-Omni does not find the weights of text_encoder, converted or not")


def test_a_text_encoder_alone_is_refused() -> None:
    with pytest.raises(ConvertError, match="depends on the DiT beside it; convert the whole pipeline"):
        plan_conversion(pipelines.saved("z_image") / "text_encoder", target="vllm-omni")

"""Plain diffusers: from_pretrained of converted and original snapshots gives the modules that load_pipeline gives."""

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from own_manifests import with_scales_of_rows
from runs import assert_same_weights, converted, quiet, run
from safetensors.torch import load_file, save_file

from fp8_convert.loader import Fp8Config, load_component, load_pipeline, report
from fp8_convert.loader.weights import Fp8Weight

CLASSES = {
    ("z_image", "transformer"): ZImageTransformer2DModel,
    ("qwen_image", "transformer"): QwenImageTransformer2DModel,
    ("qwen_image", "vae"): AutoencoderKLQwenImage,
    ("wan22", "transformer_2"): WanTransformer3DModel,
}


@pytest.mark.parametrize(("name", "part"), CLASSES, ids=lambda v: v)
def test_converted_components(name: str, part: str) -> None:
    model = CLASSES[name, part].from_pretrained(converted(name) / part)
    expected = load_component(converted(name), part, device="cpu")
    assert_same_weights(model, expected)
    assert report(model).ok
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in expected.named_modules()}
    assert not model.training


def test_scales_of_rows() -> None:
    folder = converted("z_image", manifest=with_scales_of_rows("z-image"))
    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    assert_same_weights(model, load_component(folder, "transformer", device="cpu"))
    assert {m.scheme for m in model.modules() if isinstance(m, Fp8Weight)} == {"channel"}
    assert report(model).ok


@pytest.mark.parametrize(("name", "part"), CLASSES, ids=lambda v: v)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}], ids=["one-file", "shards"])
def test_originals_convert_while_they_load(name: str, part: str, options: dict[str, str]) -> None:
    fp32 = {"fp32_dits": True} if name == "wan22" else {}  # scales must come from the FP32 values
    source = pipelines.saved(name, **fp32, **options)
    model = CLASSES[name, part].from_pretrained(source / part, dtype=torch.bfloat16, quantization_config=Fp8Config())
    expected = load_component(source, part, device="cpu", quantization="fp8")
    assert_same_weights(model, expected)
    assert report(model).ok


def test_settings_reach_the_conversion() -> None:
    config = Fp8Config(weight_block_size=[128, 128], ignored_layers=["txt_mlp"])
    source = pipelines.saved("qwen_image")
    model = QwenImageTransformer2DModel.from_pretrained(source / "transformer", quantization_config=config)
    settings = {"weight_block_size": [128, 128], "ignored_layers": ["txt_mlp"]}
    expected = load_component(source, "transformer", device="cpu", quantization_config=settings)
    assert_same_weights(model, expected)
    assert "transformer_blocks.0.txt_mlp.net.2" in model.hf_quantizer.quantization_config.ignored_layers


def test_a_whole_converted_pipeline() -> None:
    pipe = quiet(DiffusionPipeline.from_pretrained(converted("qwen_image"), dtype=torch.bfloat16))
    ours = quiet(load_pipeline(converted("qwen_image"), device="cpu"))
    assert_same_weights(pipe.transformer, ours.transformer)
    assert_same_weights(pipe.vae, ours.vae)
    assert not any(isinstance(m, Fp8Weight) for m in pipe.text_encoder.modules())  # stock transformers read it
    pipe.text_encoder = ours.text_encoder
    assert torch.equal(run(pipe, "qwen_image"), run(ours, "qwen_image"))


@pytest.mark.parametrize("mapped", [True, False], ids=["mapping", "backend"])
def test_pipeline_quantization_config(mapped: bool) -> None:
    if mapped:
        config = PipelineQuantizationConfig(quant_mapping={"transformer": Fp8Config(), "vae": Fp8Config()})
    else:
        config = PipelineQuantizationConfig(
            quant_backend="fp8_convert",
            quant_kwargs={"activation_scheme": "dynamic"},
            components_to_quantize=["transformer", "vae"],
        )
    source = pipelines.saved("qwen_image")
    pipe = quiet(DiffusionPipeline.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config))
    for part in ("transformer", "vae"):
        assert_same_weights(pipe.components[part], load_component(source, part, device="cpu", quantization="fp8"))
    assert report(pipe).ok


def test_text_encoders_are_refused_by_name() -> None:
    config = PipelineQuantizationConfig(
        quant_backend="fp8_convert",
        quant_kwargs={"activation_scheme": "dynamic"},
        components_to_quantize=["text_encoder"],
    )
    with pytest.raises(ValueError, match="load the pipeline with"):
        DiffusionPipeline.from_pretrained(pipelines.saved("qwen_image"), quantization_config=config)


def test_device_map() -> None:
    folder = converted("z_image") / "transformer"
    model = ZImageTransformer2DModel.from_pretrained(folder, device_map={"": "cpu"})
    assert_same_weights(model, load_component(converted("z_image"), "transformer", device="cpu"))
    with pytest.raises(ValueError, match="cannot be offloaded to disk by device_map"):
        ZImageTransformer2DModel.from_pretrained(folder, device_map={"": "disk"}, offload_folder="unused")


def test_saving_what_was_converted_while_loading(tmp_path: Path) -> None:
    source = pipelines.saved("qwen_image")
    model = AutoencoderKLQwenImage.from_pretrained(
        source / "vae", dtype=torch.bfloat16, quantization_config=Fp8Config()
    )
    model.save_pretrained(tmp_path)
    offline = converted("qwen_image") / "vae"
    saved, expected = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, offline))
    assert saved.keys() == expected.keys()
    assert all(
        torch.equal(saved[k].reshape(-1).view(torch.uint8), expected[k].reshape(-1).view(torch.uint8)) for k in saved
    )
    key = "quantization_config"
    assert (
        json.loads((tmp_path / "config.json").read_text())[key]
        == json.loads((offline / "config.json").read_text())[key]
    )


def test_codes_without_a_scale_raise(tmp_path: Path) -> None:
    folder = shutil.copytree(converted("qwen_image") / "vae", tmp_path / "vae")
    shard = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(shard)
    tensors.pop(next(k for k in tensors if k.endswith(".weight_scale")))
    save_file(tensors, shard)
    with pytest.raises(RuntimeError, match="holds FP8 codes, but"):
        AutoencoderKLQwenImage.from_pretrained(folder)

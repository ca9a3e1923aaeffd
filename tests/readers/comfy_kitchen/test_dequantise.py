"""comfy-kitchen, with which ComfyUI computes: it dequantises our codes and scales to our weights, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout
from safetensors import safe_open
from snapshot import dequantised, read

Made = Callable[..., Path]
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("source", ["qwen_image", "z_image", "wan22"])
def test_a_weight_of_one_scale_is_ours(made: Made, source: str) -> None:
    component = made(source) / "transformer"
    tensors, _ = read(component)
    expected = dequantised(component)
    codes = [name for name, tensor in tensors.items() if tensor.dtype == FP8]
    assert codes
    for name in codes:
        found = comfy_kitchen.dequantize_per_tensor_fp8(tensors[name], tensors[f"{name}_scale"], torch.float32)
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("source", ["qwen_image", "z_image", "wan22"])
def test_every_layer_that_a_file_for_comfyui_names_is_its_tensor_class(made: Made, source: str) -> None:
    files = sorted(made(source, target="comfyui").rglob("*.safetensors"))
    layers = 0
    for file in files:
        with safe_open(file, "pt") as shard:
            metadata = json.loads((shard.metadata() or {}).get("_quantization_metadata", '{"layers": {}}'))
            for layer, how in metadata["layers"].items():
                assert how["format"] == "float8_e4m3fn"
                codes, scale = shard.get_tensor(f"{layer}.weight"), shard.get_tensor(f"{layer}.weight_scale")
                parameters = TensorCoreFP8Layout.Params(
                    scale=scale, orig_dtype=torch.float32, orig_shape=tuple(codes.shape)
                )
                weight = QuantizedTensor(codes, "TensorCoreFP8Layout", parameters)
                assert torch.equal(weight.dequantize(), codes.float() * scale), layer
                layers += 1
    assert layers > 0


@pytest.mark.parametrize("change", ["weight_scale", "codes"])
def test_a_changed_number_is_seen(made: Made, change: str) -> None:
    component = made("qwen_image") / "transformer"
    tensors, _ = read(component)
    name = "transformer_blocks.0.attn.to_q.weight"
    codes, scale = tensors[name], tensors[f"{name}_scale"]
    if change == "weight_scale":
        scale = scale * 2
    else:
        codes.view(torch.uint8)[0, 0] ^= 0x40
    found = comfy_kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
    assert not torch.equal(found, dequantised(component)[name])

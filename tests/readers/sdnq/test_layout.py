"""Why there is no target for SDNQ: our codes fit its layout, and diffusers rounds our scales on their way there.

`_as_sdnq` writes a DiT as SDNQ saves one: `NAME.scale` of shape [1, 1], `group_size` -2 for one scale per tensor, the
names of kept weights in `modules_to_not_convert`. diffusers casts every tensor that is floating-point, and no FP8, to
the dtype that is loaded for before its quantizer sees it: the float32 scale is BF16 then. SDNQ's scales in two parts
(`scale_dtype`, `scale_2`) are multiplied in the dtype of `scale_2`, which is cast alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from sdnq.utils import get_sdnq_params
from snapshot import dequantised, quantization_config, read, rewrite

Made, Copy = Callable[..., Path], Callable[[Path], Path]


def _as_sdnq(component: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name.replace(".weight_scale", ".scale")] = tensors.pop(name).reshape(1, 1)

    kept = [f"{name}.weight" for name in quantization_config(component)["ignored_layers"]]
    rewrite(component, change)
    config = json.loads((component / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "sdnq",
        "weights_dtype": "float8_e4m3fn",
        "group_size": -2,
        "use_quantized_matmul": False,
        "dequantize_fp32": True,
        "modules_to_not_convert": kept,
    }
    (component / "config.json").write_text(json.dumps(config))


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "sdnq_dequantizer")}


@pytest.fixture
def native(made: Made) -> Path:
    return made("qwen_image") / "transformer"


@pytest.fixture
def changed(native: Path, copy: Copy) -> Path:
    component = copy(native)
    _as_sdnq(component)
    return component


def test_loaded_in_float32_every_weight_is_ours(native: Path, changed: Path) -> None:
    expected = dequantised(native)
    layers = _layers(QwenImageTransformer2DModel.from_pretrained(changed, torch_dtype=torch.float32))
    assert {f"{name}.weight" for name in layers} == {n for n, t in read(native)[0].items() if t.itemsize == 1}
    for name, module in layers.items():
        weight = module.sdnq_dequantizer(**get_sdnq_params(module))
        assert torch.equal(weight, expected[f"{name}.weight"]), name


def test_loaded_in_bfloat16_every_scale_is_rounded(native: Path, changed: Path) -> None:
    tensors, _ = read(native)
    layers = _layers(QwenImageTransformer2DModel.from_pretrained(changed, torch_dtype=torch.bfloat16))
    for name, module in layers.items():
        ours = tensors[f"{name}.weight_scale"]
        assert torch.equal(module.weight.view(torch.uint8), tensors[f"{name}.weight"].view(torch.uint8))
        assert torch.equal(module.scale, ours.to(torch.bfloat16).float().reshape(1, 1))
        assert not torch.equal(module.scale, ours.reshape(1, 1))

"""What compressed-tensors itself compresses is imported, and means what compressed-tensors makes of it again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from conftest import PROJECT_PYTHON
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

SHARD = "diffusion_pytorch_model.safetensors"
LINEARS = "re:.*(layers|refiner).*(to_q|to_k|to_v|w1|w2|w3)$"
IMPORT = """
import sys
from fp8_convert.converter import dequantize, import_checkpoint, verify
import_checkpoint(sys.argv[1], sys.argv[2])
assert verify(sys.argv[2]).ok
dequantize(sys.argv[2], sys.argv[3])
"""


def compressed(source: Path, folder: Path, strategy: str) -> tuple[Any, Any]:
    """The DiT of `source` in `folder` as compressed-tensors saves it; returns the model and its compressor."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "transformer" / "config.json").read_bytes())
    model = ZImageTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    weights = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, dynamic=False, **block)
    scheme = QuantizationScheme(targets=[LINEARS], weights=weights)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status=QuantizationStatus.FROZEN,
        ignore=[],
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(scales(module.weight.data.float(), module.weight_scale.shape, strategy))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / SHARD, {"format": "pt"})
    stated = compressor.quantization_config.model_dump(mode="json") | {"quant_method": "compressed-tensors"}
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": stated}))
    return model, compressor


def scales(weight: torch.Tensor, shape: torch.Size, strategy: str) -> torch.Tensor:
    """max|w| / 448 of what each scale covers."""
    if strategy == "tensor":
        return weight.abs().max().reshape(shape) / 448
    if strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / 448
    found = torch.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            found[i, j] = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].abs().max() / 448
    return found


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_import(made: Callable[..., Path], tmp_path: Path, strategy: str) -> None:
    model, compressor = compressed(made("z_image", None), tmp_path / "source", strategy)
    arguments = [str(tmp_path / name) for name in ("source", "fp8", "plain")]
    subprocess.run([PROJECT_PYTHON, "-c", IMPORT, *arguments], check=True, cwd=Path(__file__).parents[3])
    codes = {n: t for n, t in load_file(tmp_path / "source" / SHARD).items() if t.dtype == torch.float8_e4m3fn}
    imported = load_file(tmp_path / "fp8" / SHARD)
    assert len(codes) == 24
    assert all(torch.equal(imported[name].view(torch.uint8), t.view(torch.uint8)) for name, t in codes.items())
    compressor.decompress_model(model)
    theirs, ours = model.state_dict(), load_file(tmp_path / "plain" / SHARD)
    assert all(torch.equal(theirs[name].bfloat16(), tensor) for name, tensor in ours.items())

"""Conversion on CUDA gives the bytes that the CPU gives."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import saved
from safetensors.torch import save_file

from fp8_convert.converter import ConvertError, convert, verify
from fp8_convert.converter.stream.quantize import amax, quantize_blocks, quantize_rows, quantize_tensor, tensor_scale

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("qwen_image", torch.bfloat16, {}),
        ("qwen_image", torch.bfloat16, {"compact": True}),
        ("z_image", torch.float16, {"weight_block_size": (128, 128)}),
        ("z_image", torch.float32, {}),
        ("wan22", torch.float32, {"weight_block_size": (64, 32)}),
        ("flux", torch.bfloat16, {}),
    ],
)
def test_cuda_bytes_equal_cpu_bytes(name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    source = saved(name, dtype=dtype)
    convert(source, tmp_path / "cpu", device="cpu", **options)
    convert(source, tmp_path / "cuda", device="cuda", **options)
    assert digests(tmp_path / "cpu") == digests(tmp_path / "cuda")
    assert verify(tmp_path / "cuda").ok


@pytest.mark.parametrize("options", [{}, {"weight_block_size": (32, 48)}], ids=["tensor", "block"])
def test_shards_under_way_share_the_device(options: dict[str, Any], tmp_path: Path) -> None:
    source = saved("z_image", max_shard_size="300KB")
    convert(source, tmp_path / "cpu", device="cpu", shards=1, **options)
    for shards in (1, 2, 4, 8):
        convert(source, tmp_path / str(shards), device="cuda", shards=shards, workers=shards, **options)
        assert digests(tmp_path / str(shards)) == digests(tmp_path / "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 2.0**-126, 7.7e30])
def test_every_code_on_cuda(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31 - 1, (1 << 22,), generator=torch.Generator().manual_seed(0))
        values = bits.to(torch.int32).view(dtype)
    else:
        values = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)
    values = values[values.isfinite()].repeat(2)
    factor = np.float32(scale)
    on_cpu = quantize_tensor(values, factor)
    on_cuda = quantize_tensor(values.to(CUDA), factor)
    assert torch.equal(on_cpu, on_cuda.cpu())
    assert amax(values) == amax(values.to(CUDA))


def test_blocks_on_cuda() -> None:
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[:, 500:] *= 1e-6
    cpu_codes, cpu_scales, cpu_finite = quantize_blocks(x, (128, 128))
    codes, scales, finite = quantize_blocks(x.to(CUDA), (128, 128))
    assert torch.equal(cpu_codes, codes.cpu())
    assert np.array_equal(cpu_scales, scales)
    assert cpu_finite
    assert finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_on_cuda(dtype: torch.dtype) -> None:
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-6, 1, 300)[:, None]
    x[7] = 0
    x = x.to(dtype)
    cpu_codes, cpu_scales, cpu_finite = quantize_rows(x)
    codes, scales, finite = quantize_rows(x.to(CUDA))
    assert torch.equal(cpu_codes, codes.cpu())
    assert np.array_equal(cpu_scales, scales)
    assert cpu_finite
    assert finite


def test_nan_is_refused_on_cuda(tmp_path: Path) -> None:
    source = tmp_path / "source"
    weights = {"blocks.0.attn1.to_out.0.weight": torch.full((16, 16), float("nan"), dtype=torch.bfloat16)}
    assert tensor_scale(0.0) == 1
    source.mkdir()
    (source / "config.json").write_text('{"_class_name": "WanTransformer3DModel", "num_layers": 1}')
    save_file(weights, source / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConvertError, match="holds NaN or Inf"):
        convert(source, tmp_path / "out", device="cuda", manifest="default")
    assert not (tmp_path / "out").exists()

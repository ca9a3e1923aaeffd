"""Damage to a converted snapshot, byte by byte: what the file format and every header check lets through."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHARD = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "layers.0.attention.to_q"


def set_float(shard: Path, tensor: str, value: float) -> None:
    """Overwrite the last float32 of a tensor in a safetensors file."""
    data = bytearray(shard.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    stop = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][1]
    data[stop - 4 : stop] = struct.pack("<f", value)
    shard.write_bytes(data)


def set_config(folder: Path, value: object) -> None:
    """Replace the quantization_config in a component's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": value}))


def rewrite(shard: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a tensor of a safetensors file by what `change` makes of it; all else, metadata included, stays."""
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    tensors[tensor] = change(tensors[tensor].clone()).contiguous()
    save_file(tensors, shard, metadata)

"""A reader of snapshots that knows the files alone: what every weight is worth, and changes to make one wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def dequantised(component: Path) -> dict[str, torch.Tensor]:
    """All tensors of a component but its scales; FP8 weights as float32, multiplied by their scales."""
    tensors, _ = read(component)
    block = quantization_config(component).get("weight_block_size")
    return {
        name: _dequantise(tensors, name, block)
        for name in tensors
        if not name.endswith(("_scale", "_scale_inv", ".input_scale"))
    }


def _dequantise(tensors: dict[str, torch.Tensor], name: str, block: list[int] | None) -> torch.Tensor:
    tensor = tensors[name]
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    if f"{name}_scale" in tensors:
        return tensor.float() * tensors[f"{name}_scale"]
    assert block is not None, name
    scale = tensors[f"{name}_scale_inv"].repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]


def read(component: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a component, and the metadata of its last file."""
    tensors, metadata = dict[str, torch.Tensor](), dict[str, str]()
    for file in sorted(component.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            metadata = shard.metadata() or {}
    return tensors, metadata


def rewrite(component: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Let `change` alter the tensors of a component with one file, in place."""
    tensors, metadata = read(component)
    change(tensors)
    (file,) = component.glob("*.safetensors")
    save_file(tensors, file, metadata)


def quantization_config(component: Path) -> dict[str, Any]:
    return json.loads((component / "config.json").read_text()).get("quantization_config") or {}


def reconfigure(component: Path, **keys: Any) -> None:
    """Set keys of a component's quantization_config."""
    config = json.loads((component / "config.json").read_text())
    config.setdefault("quantization_config", {}).update(keys)
    (component / "config.json").write_text(json.dumps(config))

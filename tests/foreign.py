"""Checkpoints as other tools write them: codes and scales in their names, dtypes and shapes, by formulas of their own.

Each writer takes plain weights and gives the tensors of its file, the file's metadata, and what its config.json would
have under `quantization_config`. `meant` is what a reader of that layout computes, without a look at this project.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipelines import copied, saved
from reference import decode
from safetensors.torch import save_file
from torch import Tensor

_SHARD = "diffusion_pytorch_model.safetensors"
E4M3 = torch.float8_e4m3fn
_VALUES = torch.from_numpy(np.array([decode(code) for code in range(256)], np.float32))


@dataclass
class Checkpoint:
    """One component's file. codes: the FP8 tensors by name; meant: every tensor as float32 numbers."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    config: dict[str, Any] | None = None
    codes: dict[str, Tensor] = field(default_factory=dict)
    meant: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, codes: Tensor, scale: Tensor) -> None:
        """Codes, and what they mean; scale broadcasts over them."""
        self.tensors[name] = self.codes[name] = codes
        self.meant[name] = _VALUES[codes.view(torch.uint8).long()] * scale

    def keep(self, name: str, tensor: Tensor) -> None:
        self.tensors[name], self.meant[name] = tensor, tensor.float()


Writer = Callable[[Mapping[str, Tensor], Iterable[str]], Checkpoint]


def comfyui(weights: Mapping[str, Tensor], layers: Iterable[str], *, full_precision: bool = False) -> Checkpoint:
    """The current layout, its statement in the header."""
    made, entry = Checkpoint(), {"format": "float8_e4m3fn"}
    stated = entry | ({"full_precision_matrix_mult": True} if full_precision else {})
    layers = [*layers]
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module not in layers:
            made.keep(name, weight)
            continue
        codes, scale = _per_tensor(weight)
        made.put(name, codes, scale)
        made.tensors[f"{module}.weight_scale"] = scale
    statement = {"format_version": "1.0", "layers": dict.fromkeys(layers, stated)}
    made.metadata["_quantization_metadata"] = json.dumps(statement)
    return made


def comfyui_tensors(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    """The current layout, its statement in a tensor of each layer."""
    made = comfyui(weights, layers)
    for module, entry in json.loads(made.metadata.pop("_quantization_metadata"))["layers"].items():
        made.tensors[f"{module}.comfy_quant"] = torch.tensor([*json.dumps(entry).encode()], dtype=torch.uint8)
    return made


def comfyui_scaled(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    """The older layout: a marker, and scales of weights and inputs."""
    made = comfyui(weights, layers)
    del made.metadata["_quantization_metadata"]
    for name in [name for name in made.tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        made.tensors[f"{module}.scale_weight"] = made.tensors.pop(name)
        made.tensors[f"{module}.scale_input"] = torch.tensor(1.0)
    made.tensors["scaled_fp8"] = torch.empty(0, dtype=E4M3)
    return made


def bare(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    """Everything cast, whatever it is; nothing says so."""
    made = Checkpoint(metadata={})
    for name, weight in weights.items():
        made.put(name, weight.to(E4M3), torch.tensor(1.0))
    return made


def modelopt(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    made = comfyui(weights, layers)
    del made.metadata["_quantization_metadata"]
    for number, module in enumerate(made.codes):
        made.tensors[module.removesuffix(".weight") + ".input_scale"] = torch.tensor(0.01 * (1 + number))
    made.config = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "dynamic": False}}},
        "ignore": ["proj_out"],
    }
    return made


def compressed_tensor(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    """compressed-tensors with one scale: shape [1], in the model's dtype."""
    made = Checkpoint(config=_compressed("tensor"))
    layers = [*layers]
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module not in layers:
            made.keep(name, weight)
            continue
        scale = (weight.float().abs().max() / 448).bfloat16().reshape(1)
        made.put(name, _codes(weight, scale.float()), scale.float())
        made.tensors[f"{module}.weight_scale"] = scale
    return made


def compressed_channel(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    made = channel(weights, layers)
    made.config = _compressed("channel")
    return made


def channel(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    """As LightX2V writes it: a scale for each row, [N, 1], in the weight's dtype; no config and no marker."""
    made, layers = Checkpoint(), [*layers]
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module not in layers:
            made.keep(name, weight)
            continue
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / 448.0
        made.put(name, _codes(weight, scale.float()), scale.float())
        made.tensors[f"{module}.weight_scale"] = scale
    return made


def blocks(weights: Mapping[str, Tensor], layers: Iterable[str]) -> Checkpoint:
    """As DeepSeek writes it: blocks of 128x128."""
    made, layers = Checkpoint(), [*layers]
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module not in layers:
            made.keep(name, weight)
            continue
        rows, columns = weight.shape
        grid = torch.zeros(-(-rows // 128), -(-columns // 128))
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                grid[i, j] = part.float().abs().max().clamp(min=1e-4) / 448
        each = grid.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        made.put(name, _codes(weight, each), each)
        made.tensors[f"{module}.weight_scale_inv"] = grid
    made.config = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    return made


WRITERS: dict[str, Writer] = {
    "ComfyUI": comfyui,
    "ComfyUI by tensors": comfyui_tensors,
    "ComfyUI scaled": comfyui_scaled,
    "bare cast": bare,
    "ModelOpt": modelopt,
    "compressed-tensors": compressed_tensor,
    "compressed-tensors by channel": compressed_channel,
    "scales of rows": channel,
    "scales of blocks": blocks,
}


def linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Modules of the DiT's blocks that tools make FP8."""
    blocks = ("layers.", "noise_refiner.", "context_refiner.", "transformer_blocks.", "blocks.")
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.startswith(blocks) and name.endswith(".weight") and tensor.ndim == 2 and "mod" not in name.lower()
    ]


def as_file(made: Checkpoint, file: Path) -> Path:
    save_file({n: t.contiguous() for n, t in made.tensors.items()}, file, made.metadata)
    return file


def as_folder(made: Checkpoint, folder: Path, name: str = "z_image", component: str = "transformer") -> Path:
    """A pipeline's folder of which one component is the checkpoint."""
    copied(saved(name), folder)
    as_file(made, folder / component / _SHARD)
    if made.config is not None:
        config = json.loads((folder / component / "config.json").read_text())
        (folder / component / "config.json").write_text(json.dumps(config | {"quantization_config": made.config}))
    return folder


def _per_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().max() / 448
    return _codes(weight, scale), scale


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() / scale).clamp(-448, 448).to(E4M3)


def _compressed(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"], "format": "float-quantized"}},
        "ignore": ["proj_out"],
        "kv_cache_scheme": None,
    }

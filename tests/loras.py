"""LoRAs for the tiny pipelines' DiTs, in the spellings that trainers write, and what diffusers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pipelines import copied
from safetensors.torch import save_file

from fp8_convert.converter.snapshot.building import quiet_libraries

State = dict[str, torch.Tensor]
CLASSES = {"z_image": "ZImagePipeline", "qwen_image": "QwenImagePipeline", "wan22": "WanPipeline"}


def bare_pipeline(source: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The pipeline of a snapshot with nothing but its DiTs."""
    import diffusers

    with quiet_libraries():
        return getattr(diffusers, CLASSES[name]).from_pretrained(
            source, text_encoder=None, tokenizer=None, vae=None, dtype=dtype
        )


def linears(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """The shapes [N, K] of a model's linear layers."""
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def pairs(
    shapes: Mapping[str, tuple[int, int]], rank: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> State:
    """Random matrices under PEFT's names, `MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module, (rows, columns) in shapes.items():
        a = torch.randn(rank, columns, generator=generator) / rank**0.5
        b = torch.randn(rows, rank, generator=generator) * 0.02
        state |= {f"{module}.lora_A.weight": a.to(dtype), f"{module}.lora_B.weight": b.to(dtype)}
    return state


def kohya(state: State, rename: Callable[[str], str], alpha: float = 4.0) -> State:
    """The same as kohya's trainers write it: underscores, down and up, an alpha for each module."""
    found = {}
    for key, value in state.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        name = "lora_unet_" + rename(module).replace(".", "_")
        found[f"{name}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def write(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, path, dict(metadata) if metadata else None)
    return path


def adapter_metadata(**config: Any) -> dict[str, str]:
    """What diffusers' save_lora_weights says of the transformer's adapter."""
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return {"format": "pt", "lora_adapter_metadata": text}


def fused(
    source: Path,
    folder: Path,
    name: str,
    loras: Iterable[tuple[Path, float]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    into: str = "transformer",
) -> Path:
    """A copy of the snapshot in which diffusers' fuse_lora merged the LoRAs, one after the other."""
    pipe = bare_pipeline(source, name, dtype)
    second = {"load_into_transformer_2": True} if into == "transformer_2" else {}
    with quiet_libraries():
        for path, scale in loras:
            pipe.load_lora_weights(str(path), **second)
            pipe.fuse_lora(components=[into], lora_scale=scale)
            pipe.unload_lora_weights()
    copied(source, folder)
    for shard in (folder / into).glob("*.safetensors*"):
        shard.unlink()
    getattr(pipe, into).save_pretrained(folder / into)
    return folder

"""SGLang's own loader of DiTs: `load(folder)` does what its worker does, up to the weights in their layers.

Classes, configs, name maps, skip rules and weight loaders are the released ones: `TransformerLoader.load_customized` on
SGLang's own CPU platform.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import without_torchvision  # noqa: F401  (before sglang)
from sglang.multimodal_gen.configs.pipeline_configs.qwen_image import QwenImagePipelineConfig
from sglang.multimodal_gen.configs.pipeline_configs.wan import Wan2_2_T2V_A14B_Config
from sglang.multimodal_gen.configs.pipeline_configs.zimage import ZImagePipelineConfig
from sglang.multimodal_gen.runtime.distributed import parallel_state
from sglang.multimodal_gen.runtime.layers.quantization import fp8
from sglang.multimodal_gen.runtime.loader import fsdp_load
from sglang.multimodal_gen.runtime.loader.component_loaders.transformer_loader import TransformerLoader
from sglang.multimodal_gen.runtime.loader.utils import get_param_names_mapping, hf_to_custom_state_dict
from sglang.multimodal_gen.runtime.models.registry import ModelRegistry
from sglang.multimodal_gen.runtime.server_args.server_args import ServerArgs, set_global_server_args
from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import get_diffusers_component_config

logging.disable(logging.INFO)

_PIPELINES = {
    "QwenImageTransformer2DModel": QwenImagePipelineConfig,
    "ZImageTransformer2DModel": ZImagePipelineConfig,
    "WanTransformer3DModel": Wan2_2_T2V_A14B_Config,
}


@dataclass
class Loaded:
    """A DiT as its files came in; `model` is what post-processing made of it.

    raw: parameters by SGLang's names, before post-processing. Of these SGLang says no more than a warning:
    unset: parameters that no tensor of the files fills, so that ones or zeros stand there. unread: tensors of the
    files that have no parameter. cast: parameters where codes were taken as numbers, or numbers cast to codes.
    """

    model: torch.nn.Module
    raw: dict[str, torch.Tensor]
    unset: list[str]
    unread: list[str]
    cast: list[str]


def load(component: Path) -> Loaded:
    """Load the folder of a DiT."""
    arguments = _arguments(component)
    with _watched() as seen:
        model = TransformerLoader().load_customized(str(component), arguments, component.name)
    both = set(seen.raw) & set(seen.files)
    return Loaded(
        model,
        seen.raw,
        unset=sorted(set(seen.raw) - both),
        unread=sorted(set(seen.files) - both),
        cast=sorted(name for name in both if _has_codes(seen.files[name]) != _has_codes(seen.raw[name])),
    )


def build(component: Path, config: fp8.Fp8Config) -> torch.nn.Module:
    """The DiT of a folder without any weight, its linears under a config."""
    arguments = _arguments(component)
    described = get_diffusers_component_config(component_path=str(component))
    dit_config = arguments.pipeline_config.dit_config
    dit_config.update_model_arch(described)
    model_class, _ = ModelRegistry.resolve_model_cls(described.pop("_class_name"))
    config.packed_modules_mapping = getattr(model_class, "packed_modules_mapping", {})
    with torch.device("meta"):
        return model_class(config=dit_config, hf_config=described, quant_config=config)


def destination(model: torch.nn.Module, name: str) -> tuple[str, int]:
    """The parameter that a tensor of the files goes to, and which part of it, 0 if it is all of it."""
    valid = set(model.state_dict())
    names = get_param_names_mapping(model.param_names_mapping, valid_target_names=valid)
    _, found = hf_to_custom_state_dict({name: torch.empty(0)}, names, valid_target_names=valid)
    ((target, (_, part, _)),) = found.items()
    return target, part or 0


def _has_codes(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float8_e4m3fn


def _arguments(component: Path) -> ServerArgs:
    config = json.loads((component / "config.json").read_text())
    pipeline = _PIPELINES[config["_class_name"]]()
    if config["_class_name"] == "ZImageTransformer2DModel":  # it takes these from Z-Image-Turbo, not from config.json
        pipeline.dit_config.arch_config.num_attention_heads = config["n_heads"]
        pipeline.dit_config.arch_config.num_layers = config["n_layers"]
    arguments = ServerArgs(model_path=str(component.parent), pipeline_config=pipeline, num_gpus=1)
    set_global_server_args(arguments)
    _one_rank()
    return arguments


def _one_rank() -> None:
    if torch.distributed.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    parallel_state.maybe_init_distributed_environment_and_model_parallel(1, 1)


@dataclass
class _Seen:
    files: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def _watched() -> Iterator[_Seen]:
    """See what the loader takes from files and what stands in the model then; let it go on as on a GPU.

    On a CPU it would requantise scales per tensor with a CUDA kernel and repack blocks with an AMX one. On a GPU of
    compute capability 8.9 or newer it does neither: plain PyTorch widens a scale to one for each row.
    """
    seen = _Seen()
    real_map, real_process = fsdp_load.hf_to_custom_state_dict, fsdp_load.process_model_weights_after_loading

    def mapped(*arguments: Any, **keywords: Any) -> Any:
        result = real_map(*arguments, **keywords)
        seen.files = dict(result[0])
        return result

    def process(model: torch.nn.Module) -> int:
        seen.raw = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for module in model.modules():
            if isinstance(getattr(module, "quant_method", None), fp8.Fp8LinearMethod):
                module.quant_method.cutlass_fp8_supported = True
        return real_process(model)

    fsdp_load.hf_to_custom_state_dict, fsdp_load.process_model_weights_after_loading = mapped, process
    fp8._is_cpu = False
    try:
        yield seen
    finally:
        fsdp_load.hf_to_custom_state_dict, fsdp_load.process_model_weights_after_loading = real_map, real_process
        fp8._is_cpu = True

"""SGLang's own DiT loader on a CPU: `load(component)` does what its worker does, up to the weights in their layers.

Classes, configs, name maps, skip rules and weight loaders are the released ones: `TransformerLoader.load_customized` on
SGLang's own CPU platform. What is missing here is patched in this file alone, each with its reason; none of it touches
a name, a shape or a copy of a weight.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import socket
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "SGLANG_DIFFUSION_LOGGING_LEVEL": "ERROR"}


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"BICUBIC": 3, "__init__": lambda *_, **__: None})


def _stub_torchvision() -> None:
    """Processors of vision models import its transforms, and its wheel wants CUDA's torch; nothing here runs them."""
    transformers.utils.is_torchvision_available()  # first: it must go on saying no
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = _Stub(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name].__path__ = []


_stub_torchvision()

from sglang.multimodal_gen.configs.pipeline_configs.qwen_image import QwenImagePipelineConfig
from sglang.multimodal_gen.configs.pipeline_configs.wan import Wan2_2_T2V_A14B_Config
from sglang.multimodal_gen.configs.pipeline_configs.zimage import ZImagePipelineConfig
from sglang.multimodal_gen.runtime.distributed.parallel_state import (
    maybe_init_distributed_environment_and_model_parallel,
)
from sglang.multimodal_gen.runtime.layers.quantization import fp8
from sglang.multimodal_gen.runtime.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.multimodal_gen.runtime.loader import fsdp_load
from sglang.multimodal_gen.runtime.loader.component_loaders.transformer_loader import TransformerLoader
from sglang.multimodal_gen.runtime.models.registry import ModelRegistry
from sglang.multimodal_gen.runtime.server_args.server_args import ServerArgs, set_global_server_args
from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import get_diffusers_component_config

PIPELINES = {
    "QwenImageTransformer2DModel": QwenImagePipelineConfig,
    "ZImageTransformer2DModel": ZImagePipelineConfig,
    "WanTransformer3DModel": Wan2_2_T2V_A14B_Config,
}


@dataclass
class Loaded:
    """A DiT as its files came in, before post-processing; `model` after it, as on a GPU.

    raw: parameters by SGLang's names. unset: parameters that no tensor of the files fills: SGLang puts ones or zeros
    there. unread: names of tensors that have no parameter. cast: parameters whose tensor has another kind of dtype, so
    codes taken as numbers or numbers cast to codes. The last three are warnings at most there.
    """

    model: torch.nn.Module
    raw: dict[str, torch.Tensor]
    unset: list[str]
    unread: list[str]
    cast: list[str]


def load(component: Path) -> Loaded:
    """Load one DiT folder through SGLang's TransformerLoader."""
    arguments = _arguments(component)
    with _watched() as seen:
        model = TransformerLoader().load_customized(str(component), arguments, component.name)
    names = set(seen.raw)
    fp8 = torch.float8_e4m3fn
    return Loaded(
        model,
        seen.raw,
        sorted(names - set(seen.files)),
        sorted(set(seen.files) - names),
        sorted(n for n in names & set(seen.files) if (seen.files[n].dtype == fp8) != (seen.raw[n].dtype == fp8)),
    )


def build(component: Path, config: Fp8Config | None) -> torch.nn.Module:
    """The DiT class of a folder without any weight, its linears under `config`."""
    arguments = _arguments(component)
    hf_config = get_diffusers_component_config(component_path=str(component))
    hf_config.pop("quantization_config", None)
    dit_config = arguments.pipeline_config.dit_config
    dit_config.update_model_arch(hf_config)
    model_class, _ = ModelRegistry.resolve_model_cls(hf_config.pop("_class_name"))
    if config is not None:
        config.packed_modules_mapping = getattr(model_class, "packed_modules_mapping", {})
    with torch.device("meta"):
        return model_class(config=dit_config, hf_config=hf_config, quant_config=config)


def _arguments(component: Path) -> ServerArgs:
    config = json.loads((component / "config.json").read_text())
    pipeline = PIPELINES[config["_class_name"]]()
    if config["_class_name"] == "ZImageTransformer2DModel":  # it takes these from Z-Image-Turbo, not from config.json
        pipeline.dit_config.arch_config.num_attention_heads = config["n_heads"]
        pipeline.dit_config.arch_config.n_kv_heads = config["n_kv_heads"]
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
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    maybe_init_distributed_environment_and_model_parallel(1, 1)


@dataclass
class _Seen:
    files: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def _watched() -> Iterator[_Seen]:
    """See what the loader maps and what it puts into the model; post-process as for compute capability 9.0."""
    seen = _Seen()
    real_map, real_process = fsdp_load.hf_to_custom_state_dict, fsdp_load.process_model_weights_after_loading

    def mapped(*arguments: Any, **keywords: Any) -> Any:
        result = real_map(*arguments, **keywords)
        seen.files = dict(result[0])
        return result

    def process(model: torch.nn.Module) -> int:
        seen.raw = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for module in model.modules():
            if isinstance(getattr(module, "quant_method", None), Fp8LinearMethod):
                module.quant_method.cutlass_fp8_supported = True
        return real_process(model)

    fsdp_load.hf_to_custom_state_dict, fsdp_load.process_model_weights_after_loading = mapped, process
    fp8._is_cpu = False  # its CPU path repacks blocks for AMX with a compiled kernel; a GPU's is plain PyTorch
    try:
        yield seen
    finally:
        fsdp_load.hf_to_custom_state_dict, fsdp_load.process_model_weights_after_loading = real_map, real_process
        fp8._is_cpu = True

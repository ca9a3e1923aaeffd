"""vLLM-Omni's own loader: `load(snapshot)` does what its worker does, up to the weights in their layers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import on_cpu  # noqa: F401  (before vllm)
import torch
from vllm.config import LoadConfig, set_current_vllm_config
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm_omni.diffusion.forward_context import set_forward_context
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config


@dataclass
class Loaded:
    """A loaded pipeline: its parameters as they came from the files, and those that no file has set."""

    pipeline: torch.nn.Module
    raw: dict[str, torch.Tensor] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)


def load(snapshot: Path, quantization: str | None = None) -> Loaded:
    """Load a snapshot as vLLM-Omni's worker does: config from the files, classes from the registry.

    quantization: what the server is started with as `--quantization`; None where it finds the files' own.
    """
    with loading(snapshot, quantization) as config:
        loader = _Watched(LoadConfig(), config)
        pipeline = loader.load_model("cpu")
    return Loaded(pipeline, loader.raw, loader.unset)


@contextmanager
def loading(snapshot: Path, quantization: str | None = None) -> Iterator[OmniDiffusionConfig]:
    """Enter the contexts that its worker loads a model in; yield the snapshot's config."""
    config = OmniDiffusionConfig(model=str(snapshot), quantization_config=quantization)
    config.enrich_config()
    with ExitStack() as stack:
        vllm_config = create_diffusion_vllm_config(torch.device("cpu"), config)
        stack.enter_context(set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config))
        stack.enter_context(set_current_vllm_config(vllm_config))
        stack.enter_context(set_default_torch_dtype(config.dtype))
        _one_rank()
        if config.model_class_name == "ZImagePipeline":
            stack.enter_context(_tiny_z_image(config.tf_model_config.params))
        yield config


def unset(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Set every element to NaN, so that what no file sets can be told."""
    for parameter in parameters.values():
        if parameter.dtype == torch.float8_e4m3fn:
            parameter.data.view(torch.uint8).fill_(0x7F)
        else:
            parameter.data.fill_(float("nan"))


class _Watched(DiffusersPipelineLoader):
    """The loader, with NaN in every parameter that files must set, before they are read."""

    def load_weights(self, model: torch.nn.Module, **keywords: Any) -> None:
        prefixes = tuple(source.prefix for source in model.weights_sources)
        watched = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}
        unset(watched)
        super().load_weights(model, **keywords)
        self.unset = sorted(name for name, p in watched.items() if p.data.float().isnan().any())
        self.raw = {name: p.data.clone() for name, p in watched.items()}


def _one_rank() -> None:
    if torch.distributed.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    init_distributed_environment(world_size=1, rank=0)
    initialize_model_parallel()


_Z_IMAGE_SIZES = (
    "all_patch_size", "all_f_patch_size", "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads",
    "norm_eps", "qk_norm", "cap_feat_dim", "rope_theta", "t_scale", "axes_dims", "axes_lens",
)  # fmt: skip


@contextmanager
def _tiny_z_image(config: dict[str, Any]) -> Iterator[None]:
    """Its pipeline builds the DiT with Z-Image-Turbo's sizes, whatever config.json says: give it the tiny ones."""
    from vllm_omni.diffusion.models.z_image import pipeline_z_image

    real, sizes = pipeline_z_image.ZImageTransformer2DModel, {key: config[key] for key in _Z_IMAGE_SIZES}
    pipeline_z_image.ZImageTransformer2DModel = lambda **keywords: real(**sizes, **keywords)
    try:
        yield
    finally:
        pipeline_z_image.ZImageTransformer2DModel = real

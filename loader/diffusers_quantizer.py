"""diffusers' hooks for FP8 models: saving, and plain `from_pretrained` of converted and original components.

A converted DiT or VAE loads through `from_pretrained`, and an original one converts while it loads with
`quantization_config=Fp8Config(...)`. Both give the modules and bytes that `load_pipeline` gives.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..converter.format import layout
from ..converter.plan.plan import ComponentPlan
from ..converter.snapshot.snapshot import Component
from ..converter.stream.component_stream import convert_component
from ..converter.stream.engine import Engine
from ..converter.stream.supply import FolderSupply
from .build import install_all, tensor_names
from .checkpoint import Fp8Modules, check_scale, fp8_modules
from .context_parallel import watch_inputs
from .fp8_config import Fp8Config
from .original import ChosenFiles, component_of, plan_of, planned_modules
from .saving import saved_state
from .shared_input import settle
from .weights import Fp8Weight

logger = logging.getLogger(__name__)


class Fp8DiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Fill diffusers' hooks. After loading it stays on the model as `hf_quantizer`, for saving and `report`."""

    use_keep_in_fp32_modules = True  # or Wan's tables, norms and time embedder would become BF16
    supports_parallel_loading = False
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Fp8Config, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.fp8 = Fp8Modules({}, {})
        self.names: dict[str, str] = {}
        self._dtype = torch.bfloat16
        self._component: Component | None = None
        self._plan: ComponentPlan | None = None
        self._folder = Path()
        self._waiting: set[str] = set()

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("FP8 models cannot be offloaded to disk by device_map; use enable_group_offload instead.")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self._dtype = torch_dtype or torch.bfloat16
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The only sight of the files before modules are swapped: what is FP8 in them, or is to be."""
        component, self._folder = component_of([Path(f) for f in checkpoint_files], self.quantization_config)
        self._component = component
        if self.pre_quantized:
            self.fp8 = fp8_modules(component)
        else:
            self._plan = plan_of(component, self._folder, self.quantization_config)
            self.fp8 = planned_modules(self._plan)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        assert self._component is not None
        keys = [t.name for t in self._component.tensors]
        keys += [m + layout.WEIGHT for m in self.fp8.modules]
        every = tensor_names(model, keys, self.fp8.modules)
        self.names = {m: every[m + layout.WEIGHT].removesuffix(layout.WEIGHT) for m in self.fp8.modules}
        install_all(model, self.fp8, every, dtype=self._dtype, label=self._component.label)
        self._waiting = {name + layout.WEIGHT for name in self.names.values()}

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        own = {
            f"{name}.{buffer}"
            for name in self.names.values()
            for buffer, _ in model.get_submodule(name).named_buffers()
        }
        return missing_keys if self.pre_quantized else [key for key in missing_keys if key not in own]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **options: Any
    ) -> bool:
        path, _, leaf = param_name.rpartition(".")
        return leaf != "bias" and isinstance(model.get_submodule(path), Fp8Weight)

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: Any = None,
        **options: Any,
    ) -> None:
        """Set codes and scales as the file has them, never `param_value`, which was cast to the model's dtype."""
        path, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        if self.pre_quantized:
            value = state_dict[param_name]
            if leaf == "weight":
                codes = value.view(torch.int8).to(target_device)
                module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
            else:
                assert self._component is not None
                check_scale(param_name, value, self._component.label)  # diffusers reads files into host memory
                module._buffers[leaf] = value.to(target_device).view(module._buffers[leaf].shape)
            return
        module._parameters["weight"] = nn.Parameter(
            torch.empty_like(module.weight, device=target_device), requires_grad=False
        )
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device=target_device)
        self._waiting.discard(param_name)
        if not self._waiting:  # every weight has its place, on whatever device: convert the files into them
            self._convert_into(model)

    def _convert_into(self, model: nn.Module) -> None:
        assert self._plan is not None
        devices = {model.get_submodule(name).codes.device for name in self.names.values()}
        supply = FolderSupply(ChosenFiles(self._folder))
        with Engine(next((d for d in devices if d.type == "cuda"), torch.device("cpu"))) as engine:
            for stream in convert_component(self._plan, supply, engine):
                for chunk in stream.chunks:
                    path, _, leaf = chunk.name.rpartition(".")
                    if path in self.names and leaf != "bias":
                        held = getattr(model.get_submodule(self.names[path]), leaf)
                        raw = held.detach().reshape(-1).view(torch.uint8)
                        raw[chunk.offset : chunk.offset + chunk.data.numel()].copy_(chunk.data)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        assert self._component is not None
        if self._plan is not None and self._plan.config is not None:
            self.quantization_config = Fp8Config(**self._plan.config[layout.CONFIG_KEY])
        self._component = self._plan = None
        settle(model)
        self.attach(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        metadata = {layout.METADATA_KEY: layout.encode_modules(self.fp8.modules)}
        return saved_state(state_dict, self.names.values()), metadata

    def attach(self, model: Any) -> None:
        """Put the quantizer and its config on the model, so that it saves itself as it was loaded."""
        model.hf_quantizer = self
        model.is_quantized = False  # it would forbid `.to(dtype)` and `save_lora_adapter`, which work
        model.register_to_config(quantization_config=self.quantization_config.to_dict())
        model.fuse_lora = refuse_fuse_lora
        if hasattr(model, "fuse_qkv_projections"):
            model.fuse_qkv_projections = keep_projections
        watch_inputs(model)


def refuse_fuse_lora(*_: Any, **__: Any) -> None:
    """Stands in for `fuse_lora` on an FP8 model."""
    raise RuntimeError(
        "FP8 weights cannot take in a LoRA: fusing would requantise them and lose most of it. Leave the adapter beside "
        "them (it runs unfused, set_adapters sets its weight), or fuse it into the BF16 model and convert that."
    )


def keep_projections(*_: Any, **__: Any) -> None:
    """Stands in for `fuse_qkv_projections`, which would copy codes without their scales."""
    logger.info("q, k and v with FP8 weights share their input already (shared_input.py): nothing is fused anew")

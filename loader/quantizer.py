"""diffusers' and transformers' view of FP8 models: the config class, saving, and plain `from_pretrained`.

Importing `fp8_convert.loader` registers two names with diffusers, `fp8` and `fp8_convert`, so that DiTs and
VAEs of a converted snapshot load through `from_pretrained`, and original ones convert while they load with
`quantization_config=Fp8Config(...)`. Both give the modules and bytes that `load_pipeline` gives. transformers
keeps its own `fp8`; `fp8_convert` is refused there with a sentence, since only `load_pipeline` installs
storage in text encoders.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn
from transformers.quantizers import auto as transformers_auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..converter.format import layout
from ..converter.format.header import read_header
from ..converter.plan.manifest import choose_manifest
from ..converter.plan.plan import ComponentPlan
from ..converter.plan.planning import make_plan
from ..converter.plan.recipe import Recipe
from ..converter.snapshot.source import CONFIG, MODEL_INDEX, Component, LocalFiles, Shard, Snapshot, read_json
from ..converter.stream.component_stream import convert_component
from ..converter.stream.engine import Engine
from ..converter.stream.supply import FolderSupply
from ..converter.telling.errors import LoadError
from .build import install_all, tensor_names
from .checkpoint import Fp8Modules, check_scale, fp8_modules
from .config import config_problem
from .weights import Fp8Weight


class QuantMethod(StrEnum):
    """The two values of `quant_method` in a converted component's config.json."""

    FP8 = layout.QUANT_METHOD
    FP8_CONVERT = layout.QUANT_METHOD_NATIVE


class Fp8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is, or is to be, FP8; accepted by diffusers' `quantization_config=`.

    Keys as in config.json. `ignored_layers` are exact names in a converted checkpoint, and patterns beside
    the manifest's for one that is to be converted. Raises ValueError for values that mean nothing.
    """

    def __init__(
        self,
        activation_scheme: str = "dynamic",
        weight_block_size: list[int] | tuple[int, int] | None = None,
        ignored_layers: list[str] | None = None,
        is_checkpoint_fp8_serialized: bool = False,
        quant_method: str = layout.QUANT_METHOD_NATIVE,
        **unknown: Any,
    ) -> None:
        given = {
            "activation_scheme": activation_scheme,
            "weight_block_size": weight_block_size,
            "ignored_layers": ignored_layers,
            "is_checkpoint_fp8_serialized": is_checkpoint_fp8_serialized,
            "quant_method": quant_method,
        }
        if problem := config_problem({**given, **unknown}):
            raise ValueError(f"The quantization_config cannot be used: {problem}.")
        self.quant_method = QuantMethod(quant_method)
        self.activation_scheme = activation_scheme
        self.weight_block_size = list(weight_block_size) if weight_block_size is not None else None
        self.ignored_layers = list(ignored_layers or [])
        self.is_checkpoint_fp8_serialized = is_checkpoint_fp8_serialized

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in transformers and diffusers, which call it with what config.json has. Raises LoadError."""
        if problem := config_problem(config_dict):
            raise LoadError(
                f"config.json has a {layout.CONFIG_KEY} that cannot be used: {problem}: convert the snapshot again."
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json, JSON-safe."""
        return {**vars(self), "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class _Saving:
    """What both libraries' quantizers share: the FP8 modules, and float8 codes in what is saved."""

    fp8: Fp8Modules

    def _saved(self, state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
        """`state` with the codes of the modules `names` (the model's own) as float8_e4m3fn."""
        own = set(names.values())
        return {
            key: value.view(torch.float8_e4m3fn)
            if value.dtype == torch.int8
            and key.replace(".base_layer.", ".").removesuffix(layout.WEIGHT) in own
            and key.endswith(layout.WEIGHT)
            else value
            for key, value in state.items()
        }


class Fp8DiffusersQuantizer(_Saving, DiffusersQuantizer):  # type: ignore[misc]
    """diffusers' hooks. After loading it stays on the model as `hf_quantizer`, for saving and `report`."""

    use_keep_in_fp32_modules = True  # or Wan's tables, norms and time embedder would become BF16
    supports_parallel_loading = False
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Fp8Config, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.fp8 = Fp8Modules({}, {})
        self.names: dict[str, str] = {}
        self.problem: str | None = None
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
        component, self._folder = _component_of([Path(f) for f in checkpoint_files], self.quantization_config)
        self._component = component
        if self.pre_quantized:
            self.fp8 = fp8_modules(component)
        else:
            self._plan = _plan_of(component, self._folder, self.quantization_config)
            self.fp8 = planned_modules(self._plan)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        assert self._component is not None
        keys = [t.name for t in self._component.tensors]
        keys += [m + layout.WEIGHT for m in self.fp8.modules]
        every = tensor_names(model, keys, self.fp8.modules)
        self.names = {m: every[m + layout.WEIGHT].removesuffix(layout.WEIGHT) for m in self.fp8.modules}
        install_all(
            model,
            self.fp8.modules,
            every,
            dtype=self._dtype,
            activation_scheme=self.fp8.activation_scheme,
            backend="auto",
            label=self._component.label,
        )
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
        """Codes and scales as the file has them, never `param_value`, which was cast to the model's dtype
        already.
        """
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
        supply = FolderSupply(_ChosenFiles(self._folder))
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
        adopt(model, self)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        metadata = {layout.METADATA_KEY: layout.encode_modules(self.fp8.modules)}
        return self._saved(state_dict, self.names), metadata


class Fp8TransformersQuantizer(_Saving, HfQuantizer):  # type: ignore[misc]
    """Saves a text encoder that `load_pipeline` made. transformers itself never loads through it."""

    is_trainable = False
    fp8 = Fp8Modules({}, {})
    names: Mapping[str, str] = {}
    problem: str | None = None

    def validate_environment(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "transformers cannot hold fp8_convert weights by itself: load the pipeline with "
            "fp8_convert.loader.load_pipeline, or name only DiTs and VAEs in components_to_quantize."
        )

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        from transformers.core_model_loading import revert_weight_conversion

        # transformers renames keys while it saves; the metadata must name the modules as they then are.
        own = list(self.names)
        marks = {self.names[module] + layout.WEIGHT: torch.tensor(i) for i, module in enumerate(own)}
        written = {own[int(mark)]: key for key, mark in revert_weight_conversion(model, marks).items()}
        modules = {written[m].removesuffix(layout.WEIGHT): how for m, how in self.fp8.modules.items()}
        metadata = {layout.METADATA_KEY: layout.encode_modules(modules)}
        return self._saved(model.state_dict(), self.names), metadata


def adopt(model: Any, quantizer: Fp8DiffusersQuantizer | Fp8TransformersQuantizer) -> None:
    """Attaches the quantizer and the config, so that the model saves itself as it was loaded."""
    config = quantizer.quantization_config.to_dict()
    model.hf_quantizer = quantizer
    if isinstance(quantizer, DiffusersQuantizer):
        model.is_quantized = False  # it would forbid `.to(dtype)` and `save_lora_adapter`, which work
        model.register_to_config(quantization_config=config)
        model.fuse_lora = refuse_fuse_lora
    else:
        model.config.quantization_config = config


def refuse_fuse_lora(*_: Any, **__: Any) -> None:
    """Stands in for `fuse_lora` on an FP8 model."""
    raise RuntimeError(
        "FP8 weights cannot take in a LoRA: fusing would requantise them and lose most of it. Leave the adapter beside "
        "them (it runs unfused, set_adapters sets its weight), or fuse it into the BF16 model and convert that."
    )


def planned_modules(plan: ComponentPlan) -> Fp8Modules:
    """The FP8 modules that a conversion will make of a component."""
    modules = {t.module: t.decision.format for t in plan.tensors if t.decision.format is not None}
    return Fp8Modules(modules, (plan.config or {}).get(layout.CONFIG_KEY) or {})


class _ChosenFiles(LocalFiles):
    """The files that diffusers chose and reads itself, wherever they link to."""

    def local(self, path: str) -> Path:
        return self.root / path


def _component_of(files: list[Path], config: Fp8Config) -> tuple[Component, Path]:
    """The component that exactly `files` make up, as its folder and the pipeline around it describe it."""
    folder = files[0].parent
    local = LocalFiles(folder)
    settings = read_json(local, CONFIG) if (folder / CONFIG).is_file() else {}
    settings[layout.CONFIG_KEY] = config.to_dict()
    shards = tuple(Shard(f.name, f.stat().st_size, read_header(f, f"{f.name} in {folder}")) for f in sorted(files))
    name = folder.name if (folder.parent / MODEL_INDEX).is_file() else ""
    class_name = settings.get("_class_name")
    return Component(name, "diffusers", class_name, settings, files[0].name.split(".")[0], shards, None), folder


def _plan_of(component: Component, folder: Path, config: Fp8Config) -> ComponentPlan:
    """The plan for one original component, by the manifest that its whole pipeline would get."""
    pipeline, classes = None, {component.name: component.class_name}
    if component.name:
        index = read_json(LocalFiles(folder.parent), MODEL_INDEX)
        pipeline = index.get("_class_name")
        classes = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    original = {k: v for k, v in component.config.items() if k != layout.CONFIG_KEY}
    component = Component(
        component.name, component.library, component.class_name, original, component.stem, component.shards, None
    )
    recipe = Recipe(
        manifest=choose_manifest(None, pipeline, classes),
        ignored_layers=tuple(config.ignored_layers),
        block=None if config.weight_block_size is None else (config.weight_block_size[0], config.weight_block_size[1]),
        activation_scheme=config.activation_scheme,
    )
    # No pipeline: the manifest is not to miss the other components.
    snapshot = Snapshot(str(folder), None, None, None, (component,), (), LocalFiles(folder))
    return make_plan(snapshot, recipe).components[0]


def register() -> None:
    """Makes `fp8` and `fp8_convert` known to diffusers, and `fp8_convert` to transformers; harmless when
    repeated.
    """
    for method in QuantMethod:
        diffusers_auto.AUTO_QUANTIZER_MAPPING.setdefault(method.value, Fp8DiffusersQuantizer)
        diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method.value, Fp8Config)
    native = QuantMethod.FP8_CONVERT.value
    transformers_auto.AUTO_QUANTIZER_MAPPING.setdefault(native, Fp8TransformersQuantizer)
    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(native, Fp8Config)


__all__ = ["Fp8Config", "Fp8DiffusersQuantizer", "Fp8TransformersQuantizer", "LoadError", "register"]
